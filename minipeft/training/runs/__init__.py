"""A run's state, checkpoints, lock and metrics."""
