"""Exercises that check themselves: `minipeft learn`."""
