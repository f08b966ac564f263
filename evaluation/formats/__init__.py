"""Readers of benchmark files: one file per format, each giving samples and bad rows."""
