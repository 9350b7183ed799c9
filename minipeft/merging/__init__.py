"""Folding adapters into base weights, and back."""
