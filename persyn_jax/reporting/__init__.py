"""The report of a run, from its records alone: report.json, the HTML page, ten lines of text."""

from persyn_jax.reporting.page import render_page
from persyn_jax.reporting.report import build_report
from persyn_jax.reporting.run_records import RunRecords
from persyn_jax.reporting.summary import summary_lines

__all__ = ["RunRecords", "build_report", "render_page", "summary_lines"]
