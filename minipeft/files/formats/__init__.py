"""Adapters of other tools, read into PEFT's format; one file for each of them, see `minipeft.files.formats.foreign`."""
