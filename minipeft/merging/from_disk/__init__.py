"""Merging an adapter into a checkpoint on disk, one tensor at a time."""
