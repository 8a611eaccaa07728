"""Window attention and Swin's layers on maps. Oracle: timm's where nothing is rounded, the formula written out where something is."""

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
        name.removeprefix("block.attn."): s.quantizer.n_scales
        for name, s in found.items()
        if "attn" in name and s.quantizer.n_scales
    }
    n = WINDOW**2
    of_input = (
        {"input_quantizer": n, "k_quantizer": n * HEADS}
        if preset == "ofq"
        else {"qkv.input_quantizer": n, "q_quantizer": n, "k_quantizer": n}
    )
    assert scales == {
        **of_input,
        "v_quantizer": WIDTH,
        "probs_quantizer": n,
        "proj.input_quantizer": n,
    }


def windows(x, shift):
    """Normalised tokens (B*windows, N, C) as timm's block cuts them."""
    x = (
        torch
        .roll(x, (-shift, -shift), (1, 2))
        .unflatten(2, (-1, WINDOW))
        .unflatten(1, (-1, WINDOW))
    )
    return x.transpose(2, 3).flatten(0, 2).flatten(1, 2)


def heads(t):
    return t.unflatten(-1, (HEADS, -1)).transpose(1, 2)


@pytest.mark.parametrize("preset", ["ofq", "ofq_noqkr"])
@pytest.mark.parametrize("shift", [0, 2])
def test_step_by_step(preset, shift):
    net = qat.initialize_scales(
        swapped(block(8, shift), qat.recipe(preset, bits=2)), [maps(seed=1)]
    )
    whole, attn = net.block, net.block.attn
    x = windows(whole.norm1(maps().permute(0, 2, 3, 1)), shift)
    if preset == "ofq":
        xq = attn.input_quantizer(x)
        folded = QF.statsq(QF.fold_qk(attn.q_weight, attn.k_weight, HEADS), 2).unflatten(
            0, (HEADS, WIDTH)
        )
        step = attn.k_quantizer.scale.view(-1, HEADS)
        keys = [
            QF.lsq(
                xq @ folded[h].T + attn.product_offset.view(HEADS, WIDTH)[h], step[:, h], -2, 1, 1
            )
            for h in range(HEADS)
        ]
        scores = torch.stack([xq @ k.transpose(1, 2) for k in keys], 1)
        v = attn.v(xq)
    else:
        q, k, v = attn.qkv(x).chunk(3, -1)
        scores = heads(attn.q_quantizer(q)) @ heads(attn.k_quantizer(k)).transpose(-1, -2)
    bias = (
        attn
        .relative_position_bias_table[attn.relative_position_index.flatten()]
        .view(16, 16, HEADS)
        .permute(2, 0, 1)
    )
    scores = scores / (WIDTH // HEADS) ** 0.5 + bias
    if shift:
        scores = scores + whole.attn_mask.repeat(2, 1, 1).unsqueeze(1)
    probs = attn.probs_quantizer(scores.softmax(-1))
    expected = attn.proj((probs @ heads(attn.v_quantizer(v))).transpose(1, 2).flatten(2))
    assert_close(attn(x, whole.attn_mask), expected)


def test_positions_that_are_always_padding():
    # A window larger than the map: the last row and column of every window are zeros, so their first step is the least.
    net = swapped(block(3, 2, always_partition=True), qat.recipe("ofq", bits=2), 3)
    qat.initialize_scales(net, [maps(3)])
    step = sites(net)["block.attn.input_quantizer"].quantizer.quantizer.scale.view(WINDOW, WINDOW)
    assert_close(step.min(), torch.tensor(QF.least_unit(1) / 64))
    net.train()(maps(3)).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())
