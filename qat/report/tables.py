"""Tables for people, screen readers and sorting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qat.report.html import Html, element, joined
from qat.report.numbers import number, shown

MOST_ROWS = 200


def table(caption: str, rows: Sequence[Mapping[str, object]], *, sortable: bool = False, ident: str | None = None) -> Html:
    """Rows with the same keys; the first column names them.

    Args:
        caption: says what it is.
        rows: cells by column name; text, numbers, or `Html`.
        sortable: a click on a column's name sorts by it.
        ident: of the caption.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    numeric = {column for column in columns[1:] if _is_numeric([row.get(column) for row in rows])}
    head = element("tr", *(element("th", column, scope="col", class_="n" if column in numeric else None) for column in columns))
    body = [element("tr", *(_cell(row.get(c), first=not i, numeric=c in numeric) for i, c in enumerate(columns))) for row in rows]
    content = element(
        "table",
        element("caption", element("span", caption), id=ident),
        element("thead", head),
        element("tbody", joined(body, "\n")),
        data_sortable=sortable and len(rows) > 1,
    )
    label = {"aria_labelledby": ident} if ident else {"aria_label": caption}
    return element("div", content, class_="scroll", role="region", tabindex="0", **label)


def long_table(caption: str, rows: Sequence[Mapping[str, object]], file: str) -> Html:
    """A table that may be too long for a page: the rest is in a file."""
    if len(rows) <= MOST_ROWS:
        return table(caption, rows, sortable=True)
    rest = element("p", f"The first {MOST_ROWS} of {len(rows):,} rows; all of them are in {file}.", class_="hint")
    return joined([table(caption, rows[:MOST_ROWS], sortable=True), rest])


def _is_numeric(cells: Sequence[object]) -> bool:
    known = [cell for cell in cells if cell not in {None, "", "–"}]
    return bool(known) and all(number(cell) is not None or (isinstance(cell, str) and cell[:1] in "+−–0123456789") for cell in known)


def _cell(value: object, *, first: bool, numeric: bool) -> Html:
    text = value if isinstance(value, Html) else shown(value)
    if first:
        return element("th", text, scope="row")
    return element("td", text, class_="n" if numeric else None)
