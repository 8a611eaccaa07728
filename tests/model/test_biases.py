"""Biases that timm does not build. Oracle: closed form; what a file rebuilds."""

import pytest
import torch
from torch import nn

import qat
from qat.model.foreign_weights import add_biases, added_biases
from tests.nets import FAMILIES
from tests.tiny import logits

MERGING = "layers.1.downsample.reduction"


def swin():
    return FAMILIES["swin"].build()


def test_a_grown_bias_changes_nothing_at_first():
    net, x = swin(), FAMILIES["swin"].images()
    expected = logits(net, x)
    add_biases(net, [MERGING, "head.fc"])
    assert torch.equal(logits(net, x), expected)
    assert net.get_submodule(MERGING).bias.tolist() == [0.0] * 32
    assert added_biases(net) == [MERGING], "a bias that was there is none of ours"


@pytest.mark.parametrize("preset", ["fp", "ofq"])
def test_a_file_rebuilds_a_net_with_a_grown_bias(tmp_path, preset):
    net = swin()
    add_biases(net, [MERGING])
    nn.init.normal_(net.get_submodule(MERGING).bias)
    qat.convert(net, qat.recipe(preset), input_size=(3, 32, 32))
    qat.save(net, tmp_path / "net.ckpt")
    again = qat.load(tmp_path / "net.ckpt")
    assert torch.equal(again.get_submodule(MERGING).bias, net.get_submodule(MERGING).bias)
    assert added_biases(again) == [MERGING]
