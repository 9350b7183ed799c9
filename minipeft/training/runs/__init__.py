"""A run on disk: its state, checkpoints, lock and metrics."""
