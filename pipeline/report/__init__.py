"""The report: one self-contained HTML file that shows a run.

It knows no dataset, generator or metric by name and shows whatever a run contains.
"""

from maskloom.pipeline.report.stage import write_report

__all__ = ["write_report"]
