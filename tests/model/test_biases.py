"""Biases that timm does not build. Oracle: closed form; what a file rebuilds."""

import pytest
import timm
import torch
from torch import nn

import qat
from qat.model.foreign_weights import grow_biases, grown_biases

MERGING = "layers.1.downsample.reduction"


def swin():
    torch.manual_seed(0)
    kwargs = {
        "img_size": 16,
        "patch_size": 2,
        "window_size": 4,
        "embed_dim": 8,
        "depths": (1, 1),
        "num_heads": (1, 2),
        "num_classes": 3,
    }
    return timm.create_model("swin_tiny_patch4_window7_224", **kwargs).eval()


def test_a_grown_bias_changes_nothing_at_first():
    net, x = swin(), torch.randn(2, 3, 16, 16)
    expected = net(x)
    grow_biases(net, [MERGING, "head.fc"])
    assert torch.equal(net(x), expected)
    assert net.get_submodule(MERGING).bias.tolist() == [0.0] * 16
    assert grown_biases(net) == [MERGING], "a bias that was there is none of ours"


@pytest.mark.parametrize("preset", ["fp", "ofq"])
def test_a_file_rebuilds_a_net_with_a_grown_bias(tmp_path, preset):
    net = swin()
    grow_biases(net, [MERGING])
    nn.init.normal_(net.get_submodule(MERGING).bias)
    qat.convert(net, qat.recipe(preset), input_size=(3, 16, 16))
    qat.save(net, tmp_path / "net.ckpt")
    again = qat.load(tmp_path / "net.ckpt")
    assert torch.equal(again.get_submodule(MERGING).bias, net.get_submodule(MERGING).bias)
    assert grown_biases(again) == [MERGING]
