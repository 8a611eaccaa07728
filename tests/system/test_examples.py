"""examples/segmentation.py in a short form. Oracle: masks made by hand, and the float net that a quantized one without rounding is."""

import copy
import importlib.util

import pytest
import torch

import qat
from tests.conftest import ROOT
from tests.tiny import float_recipe


@pytest.fixture(scope="module")
def segmentation():
    spec = importlib.util.spec_from_file_location(
        "segmentation", ROOT / "examples" / "segmentation.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_twin_that_rounds_nothing_learns_what_the_float_net_learns(segmentation):
    torch.manual_seed(0)
    net = segmentation.Segmenter()
    twin = copy.deepcopy(net)
    qat.convert(
        twin.backbone,
        float_recipe("standard"),
        input_size=(3, segmentation.SIZE, segmentation.SIZE),
    )
    assert qat.no_weight_decay(net) == qat.no_weight_decay(twin)
    for one in (net, twin):
        segmentation.train(one, 3, 1e-3, 0)
    x = segmentation.draw(4, 0)[0]
    with torch.no_grad():
        torch.testing.assert_close(net(x), twin(x), rtol=0, atol=1e-4)


@pytest.mark.long
def test_the_table(segmentation, monkeypatch, capsys):
    monkeypatch.setattr(segmentation, "TEST_IMAGES", 64)
    monkeypatch.setattr(
        "sys.argv", ["segmentation.py", "--bits", "4", "--steps", "30", "--seed", "0"]
    )
    segmentation.main()
    _, *rows = (line.split() for line in capsys.readouterr().out.splitlines())
    found = {}
    for name, mean, *each, size, _ in rows:
        assert float(mean) == pytest.approx(sum(map(float, each)) / 4, abs=0.01)
        found[name] = float(mean), int(size.replace(",", ""))
    assert list(found) == ["start", "float", "W4A4"]
    # What calls everything background has 21 %.
    assert found["float"][0] > 40
    assert found["W4A4"][0] > 30
    assert found["start"][1] == found["float"][1] > 2 * found["W4A4"][1]
