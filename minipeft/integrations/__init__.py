"""Adapted models inside other libraries, one file each."""
