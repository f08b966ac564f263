"""The record of a run: its parts, loading and saving."""
