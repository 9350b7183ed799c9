"""Adapters as other tools write them, read as PEFT's kind; one file a format, see `minipeft.files.formats.foreign`."""
