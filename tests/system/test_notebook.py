"""examples/quickstart.ipynb, run as Jupyter runs it, on fewer images. Oracle: files that come out, what the cells show."""

import json
import re

import nbformat
import pytest

from tests.notebook import NOTEBOOK, executed

# Of the digits every tenth, and one epoch.
BRIEF = """
EPOCHS = 1
import sklearn.datasets
every = sklearn.datasets.load_digits()
every.images, every.target = every.images[:180], every.target[:180]
sklearn.datasets.load_digits = lambda: every
"""


def shown(book):
    outputs = [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]
    return "".join(output.text for output in outputs if output.output_type == "stream"), outputs


def kept():
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.mark.long
def test_every_cell_does_what_it_says(tmp_path):
    text, outputs = shown(executed(tmp_path, BRIEF))
    assert "error:" not in text, text[-3000:]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    runs = tmp_path / "examples" / "outputs" / "quickstart"
    results = {
        name: json.loads((runs / name / "results.json").read_text())
        for name in ("float", "4bit", "predictions", "onnx")
    }
    assert (results["4bit"]["recipe"]["bits"], results["4bit"]["recipe"]["act_bits"]) == (4, 4)
    assert results["4bit"]["size_bytes"] < results["float"]["size_bytes"] / 5
    assert (runs / "4bit" / "report.html").exists()
    assert re.search(r"onnxruntime, .*; [\d.]+ of float's time", text)
    assert len(re.findall(r"^ *[\d.]+ ?%  digit_\d$", text, re.MULTILINE)) == 3 + 5


def test_what_is_kept_of_a_run_is_whole_and_small():
    text, _ = shown(kept())
    cells = [cell for cell in kept().cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert "error:" not in text
    assert len(re.findall(r"^test top-1 9\d\.\d\d %", text, re.MULTILINE)) == 2
    assert NOTEBOOK.stat().st_size < 200_000


def test_names_no_machine():
    assert not re.search(
        r"(?<![\w.])/(root|work|home|tmp|mnt|data|Users)\b|\x1b", NOTEBOOK.read_text()
    )
