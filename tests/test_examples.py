"""examples/segmentation.py in a short form. Oracle: masks made by hand, and the float net that a quantized one without rounding is."""

import copy
import importlib.util

import pytest
import torch
from torch import nn

import qat
from tests.conftest import ROOT
from tests.tiny import float_recipe


@pytest.fixture(scope="module")
def segmentation():
    spec = importlib.util.spec_from_file_location("segmentation", ROOT / "examples" / "segmentation.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_images_are_a_function_of_the_seed_and_hold_all_classes(segmentation):
    image, label = segmentation.draw(64, 3)
    again, other = segmentation.draw(64, 3), segmentation.draw(64, 4)
    assert torch.equal(image, again[0])
    assert torch.equal(label, again[1])
    assert not torch.equal(label, other[1])
    shares = label.flatten().bincount(minlength=4) / label.numel()
    assert shares[0] > 0.5
    assert (shares[1:] > 0.02).all()


class Answers(nn.Module):
    """Gives the classes of the test images, of the first ones those that are told."""

    def __init__(self, segmentation, wrong, instead):
        super().__init__()
        self.label = segmentation.draw(segmentation.TEST_IMAGES, segmentation.TEST_SEED)[1]
        self.label[self.label == wrong] = instead
        self.at = 0

    def forward(self, x):
        self.at += len(x)
        return nn.functional.one_hot(self.label[self.at - len(x) : self.at], 4).permute(0, 3, 1, 2).float()


def test_intersection_over_union(segmentation):
    assert segmentation.iou(Answers(segmentation, 1, 1)).tolist() == [100] * 4
    label = segmentation.draw(segmentation.TEST_IMAGES, segmentation.TEST_SEED)[1]
    discs, squares = ((label == k).sum().item() for k in (1, 2))
    expected = [100, 0, 100 * squares / (discs + squares), 100]
    assert segmentation.iou(Answers(segmentation, 1, 2)).tolist() == pytest.approx(expected)


def test_a_twin_that_rounds_nothing_learns_what_the_float_net_learns(segmentation):
    torch.manual_seed(0)
    net = segmentation.Segmenter()
    twin = copy.deepcopy(net)
    qat.convert(twin.backbone, float_recipe("standard"), input_size=(3, segmentation.SIZE, segmentation.SIZE))
    assert qat.no_weight_decay(net) == qat.no_weight_decay(twin)
    for one in (net, twin):
        segmentation.train(one, 3, 1e-3, 0)
    x = segmentation.draw(4, 0)[0]
    with torch.no_grad():
        torch.testing.assert_close(net(x), twin(x), rtol=0, atol=1e-4)


@pytest.mark.slow
def test_the_table(segmentation, monkeypatch, capsys):
    monkeypatch.setattr(segmentation, "TEST_IMAGES", 64)
    monkeypatch.setattr("sys.argv", ["segmentation.py", "--bits", "4", "--steps", "30", "--seed", "0"])
    segmentation.main()
    head, *rows = (line.split() for line in capsys.readouterr().out.splitlines())
    assert head == ["net", "mean", "IoU", *segmentation.NAMES, "bytes", "seconds"]
    found = {name: ([float(v) for v in ious], int(size.replace(",", ""))) for name, *ious, size, _ in rows}
    assert list(found) == ["start", "float", "W4A4"]
    for (mean, *each), _ in found.values():
        assert mean == pytest.approx(sum(each) / 4, abs=0.01)
    # What calls everything background has 21 %.
    assert found["float"][0][0] > 40
    assert found["W4A4"][0][0] > 30
    sizes = {name: size for name, (_, size) in found.items()}
    assert sizes["start"] == sizes["float"] > 2 * sizes["W4A4"]
