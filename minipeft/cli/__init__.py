"""The commands: ``minipeft ...`` and ``python -m minipeft ...``, one file each."""
