"""Window attention and Swin's layers on maps. Oracle: timm's where nothing is rounded; the reference's values are in test_goldens.py."""

import copy

import pytest
import torch
from timm.models.swin_transformer import SwinTransformerBlock
from torch import nn
from torch.testing import assert_close

import qat
from qat import functional as QF
from tests.tiny import float_recipe, logits, randn, shake, sites

HEADS, WIDTH, WINDOW = 2, 16, 4


class Holder(nn.Module):
    """Shows a block to `convert`: (B, C, H, W) to (B, H, W, C)."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return self.block(x.permute(0, 2, 3, 1))


def block(side=8, shift=0, **settings):
    torch.manual_seed(0)
    return shake(
        SwinTransformerBlock(
            WIDTH, (side, side), HEADS, window_size=WINDOW, shift_size=shift, **settings
        )
    ).eval()


def maps(side=8, n=2, seed=0):
    return randn(n, WIDTH, side, side, seed=seed)


def swapped(plain, recipe, side=8):
    return qat.convert(Holder(copy.deepcopy(plain)), recipe, input_size=(WIDTH, side, side))


@pytest.mark.parametrize("kind", ["qkr", "standard", "float"])
@pytest.mark.parametrize(
    ("side", "shift", "settings"),
    [
        (8, 0, {}),
        (8, 2, {}),
        (7, 2, {}),
        (3, 2, {}),
        (8, 2, {"qkv_bias": False}),
        (8, 2, {"head_dim": 4}),
        (6, 2, {"dynamic_mask": True}),
    ],
    ids=str,
)
def test_without_rounding_it_is_timms(kind, side, shift, settings):
    plain = block(side, shift, **settings)
    ours = swapped(plain, float_recipe(kind), side)
    assert_close(logits(ours, maps(side)), logits(Holder(plain), maps(side)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("preset", ["ofq", "ofq_noqkr"])
def test_scales_are_those_of_positions_in_a_window(preset):
    found = sites(swapped(block(12), qat.recipe(preset), 12))
    scales = {
        name.removeprefix("block.attn.").removesuffix("_quantizer"): s.quantizer.num_stored_scales
        for name, s in found.items()
        if "attn" in name and s.quantizer.num_stored_scales
    }
    n = WINDOW**2
    of_input = {"qkv.input": n, "q": n, "k": n}
    if preset == "ofq":
        of_input = {"input": n, "k": n * HEADS}
    assert scales == {**of_input, "v": WIDTH, "probs": n, "proj.input": n}


def test_positions_that_are_always_padding():
    # A window larger than the map: the last row and column of every window are zeros, so their first step is the least.
    net = swapped(block(3, 2, always_partition=True), qat.recipe("ofq", bits=2), 3)
    qat.initialize_scales(net, [maps(3)])
    step = sites(net)["block.attn.input_quantizer"].quantizer.quantizer.scale.view(WINDOW, WINDOW)
    assert_close(step.min(), torch.tensor(QF.min_reliable_step(1) / 64))
    net.train()(maps(3)).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())
