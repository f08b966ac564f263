"""Data for models that write depth maps and boxes as tokens (Aurora, arXiv 2412.03548)."""
