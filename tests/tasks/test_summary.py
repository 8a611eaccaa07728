"""The first lines of a run. Oracle: the report that they condense."""

import re

import qat
from qat.data import Digits
from qat.tasks import summary
from tests.tasks.test_evaluate import DIGITS
from tests.tiny import converted


def test_quantizers_are_counted(tmp_path):
    net = converted("ofq", bits=2)
    text = summary.conversion(net, tmp_path)
    rows = qat.conversion_report(net).rows
    assert sum(map(int, re.findall(r" x(\d+)", text.splitlines()[1]))) == len(rows)
    assert "statsq 2 bit (qk) x2" in text
    assert "blocks.*.norm* (LayerNorm) x4" in text
    assert len((tmp_path / "conversion.txt").read_text().splitlines()) > len(rows)


def test_recipe_in_words():
    text = summary.describe_recipe(qat.recipe("ofq", bits=2, act_bits=3, overrides={"blocks.0.*": {"bits": 4}}))
    for part in ("weights 2 bit statsq", "activations 3 bit lsq", "attention qkr (query bias: drop)", "stem 8 bit", "1 override"):
        assert part in text
    assert "query bias" not in summary.describe_recipe(qat.recipe("lsq"))


def test_data_in_words():
    assert summary.describe_data(Digits(**DIGITS)) == "digits: 1257 train, 180 val, 360 test images, 10 classes"


def test_model_in_words():
    net = converted("fp")
    millions = sum(p.numel() for p in net.parameters()) / 1e6
    assert re.fullmatch(rf"tiny, {millions:.2f} M parameters, images 1 x 8 x 8", summary.describe_model("tiny", net, (1, 8, 8)))


def test_lines_are_aligned():
    assert summary.lines("title", {"a": "1", "long": "2"}) == "title\n  a     1\n  long  2"
