"""Reports of evaluation runs: one self-contained page, to be opened in any browser."""

from vpt.evaluation.report.write import write_report

__all__ = ["write_report"]
