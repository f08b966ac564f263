"""Benchmark splits, scores, runner and report, on top of :mod:`vpt`."""
