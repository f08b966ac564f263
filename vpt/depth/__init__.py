"""Depth as tokens: maps become 100 codes of a small codebook, and codes become maps again."""
