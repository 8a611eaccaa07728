"""What came of runs, for people to look at: a table of several, a page for each."""

from qat.report.collect import collect, table
from qat.report.files import Origin
from qat.report.page import write_report

__all__ = ["Origin", "collect", "table", "write_report"]
