"""The report: one HTML file that shows a run to a reader without a network.

It knows no dataset, generator or metric by name: it shows what a run holds.
"""

from maskloom.pipeline.report.stage import write_report

__all__ = ["write_report"]
