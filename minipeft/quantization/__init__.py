"""Quantized bases: making them, and making them float again."""
