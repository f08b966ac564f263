"""Reports of evaluation runs: one self-contained page, to be opened in any browser."""

from vpt.evaluation.report.page import write_comparison, write_report

__all__ = ["write_comparison", "write_report"]
