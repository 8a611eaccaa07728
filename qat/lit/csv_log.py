"""Lightning's CSV logger, which goes on with the file of a run that is continued."""

from __future__ import annotations

import csv
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger


def read_rows(path: Path, *, before_step: int) -> list[dict[str, str]]:
    """Rows of a metrics file that were written before an optimizer step; none if there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if int(row["step"]) < before_step]


def continue_csv(logger: CSVLogger, rows: list[dict[str, str]]) -> None:
    """Put earlier rows in front of what the logger will write. Its own start deletes the file of an earlier run.

    Args:
        logger: a fresh logger.
        rows: of `read_rows`, read before the logger was used.
    """
    if not rows:
        return
    writer = logger.experiment
    writer.metrics = [{key: value for key, value in row.items() if value} for row in rows]
    writer.save()
