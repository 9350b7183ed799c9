"""Folding adapters: into base weights and back, in memory and on disk, and several into one."""
