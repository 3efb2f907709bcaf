"""Weights on disk, whatever the format: one table of weights, and readers and writers of files."""
