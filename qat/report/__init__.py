"""What runs have in common, for people to look at."""

from qat.report.collect import collect, table

__all__ = ["collect", "table"]
