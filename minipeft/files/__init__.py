"""Adapters to and from disk and the hub, in PEFT's format."""
