"""Serving many adapters of one base: all of a server but its HTTP, which is in ``examples/serve_many.py``."""
