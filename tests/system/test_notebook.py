"""examples/quickstart.ipynb, run as Jupyter runs it, on fewer images. Oracle: files that come out, what the cells show."""

import re

import nbformat
import pytest

import qat
from tests.notebook import NOTEBOOK, executed

# Of the digits every tenth, and one epoch.
BRIEF = """
EPOCHS = 1
every = load_digits()
every.images, every.target = every.images[:180], every.target[:180]
load_digits = lambda: every
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
    net = qat.load(runs / "4bit" / "best.ckpt")
    assert {site.quantizer.spec.bits for site in qat.iter_quantizers(net)} == {4, 8}
    assert not list(qat.iter_quantizers(qat.load(runs / "float" / "best.ckpt")))
    assert (runs / "net.onnx").stat().st_size < 4 * sum(p.numel() for p in net.parameters()) / 5
    assert "onnxruntime: same class on" in text
    assert len(re.findall(r"^ *[\d.]+ %  digit_\d$", text, re.MULTILINE)) == 5


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
