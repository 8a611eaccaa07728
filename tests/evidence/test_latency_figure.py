"""The figure of exported files. Oracles: the log that it is drawn from, the page that shows the same numbers."""

import itertools
import xml.etree.ElementTree as ET

from evidence.speed.latency_figure import DOCS, LOG, TITLES, draw, read

TABLES = LOG.read_text()
COLUMNS = ("MB", "batch 1, onnxruntime", "batch 1, openvino")


def test_the_page_has_the_numbers_of_the_log():
    tables = read(TABLES)
    lines = (DOCS / "deployment.md").read_text().splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("| file | DeiT-T: MB |"))
    rows = [
        [cell.strip(" `") for cell in line.strip("|").split("|")]
        for line in itertools.takewhile(bool, lines[begin + 2 :])
    ]
    assert (
        len(rows) >= len(tables[next(iter(TITLES))]) - 2
    )  # of a recipe at two widths the page may leave one out
    for file, *cells in rows:
        assert cells == [
            tables[net][file].get(column, "") for net in TITLES for column in COLUMNS
        ], file


def test_a_figure_has_a_panel_for_each_model(tmp_path):
    draw(read(TABLES), tmp_path / "latency.svg")
    groups = [
        group.get("id", "")
        for group in ET.parse(tmp_path / "latency.svg").iter("{http://www.w3.org/2000/svg}g")
    ]
    assert sum(name.startswith("axes_") for name in groups) == len(TITLES)
