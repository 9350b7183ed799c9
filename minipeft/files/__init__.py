"""Adapters to and from disk and the hub: in PEFT's format, in other tools', and for the programs that read them."""
