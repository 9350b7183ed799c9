"""Before training: what it will take, which settings to begin with, and what changed between two adapters or runs."""
