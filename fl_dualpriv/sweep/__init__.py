"""Sweeps: many runs described by one file, and the table of their results."""
