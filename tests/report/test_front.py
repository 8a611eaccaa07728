"""The drawing of size against fitness. Oracle: files that image readers take, the same from the same points."""

import xml.etree.ElementTree as ElementTree

from PIL import Image

from qat.report.front import draw_front

ROWS = [
    {"size_bytes": 1000 * n, "fitness": 1 / n, "top1": 50.0 + n if n != 2 else None, "selected": n == 3, "bits": {}} for n in range(1, 5)
]
OTHERS = [(1000 * n, 2 / n) for n in range(1, 5)]


def texts(folder, rows):
    draw_front(folder, rows, OTHERS, budget=3500, uniform={2: (1000, 1.5), 8: (4000, 0.4)})
    root = ElementTree.parse(folder / "front.svg").getroot()
    return (folder / "front.svg").read_text(), root.tag


def test_both_files_can_be_read_and_are_the_same_each_time(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one, tag = texts(tmp_path / "a", ROWS)
    assert tag.endswith("svg")
    assert one == texts(tmp_path / "b", ROWS)[0]
    with Image.open(tmp_path / "a" / "front.png") as image:
        assert image.format == "PNG"
        assert image.width > 1300
    assert {p.name for p in (tmp_path / "a").iterdir()} == {"front.svg", "front.png"}


def test_without_accuracies_there_is_one_panel(tmp_path):
    texts(tmp_path, [row | {"top1": None} for row in ROWS])
    with Image.open(tmp_path / "front.png") as image:
        assert image.width < 1000
