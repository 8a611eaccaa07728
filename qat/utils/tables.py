"""Tables for terminals and text files."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qat.utils.text import MISSING, one_line

MAX_LINE_LENGTH = 1000  # characters


def text_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table as text, as wide as its cells, up to `MAX_LINE_LENGTH`.

    The first column names the row. Other columns are aligned to the right if all of their cells
    start with a digit or `<`, or are None.
    """
    table = Table(box=box.ROUNDED)
    texts = []
    for row in rows:
        texts.append([_cell(value) for value in row])
    for column, name in enumerate(header):
        is_numeric = column > 0 and all(re.match(rf"[\d<{MISSING}]", row[column]) for row in texts)
        table.add_column(name, justify="right" if is_numeric else "left", no_wrap=True)
    for row in texts:
        table.add_row(*map(Text, row))
    # In a notebook, rich would also display the table.
    console = Console(
        width=MAX_LINE_LENGTH, color_system=None, file=io.StringIO(), force_jupyter=False
    )
    with console.capture() as capture:
        console.print(table)
    return capture.get().rstrip()


def _cell(value: object) -> str:
    return MISSING if value is None else one_line(str(value))
