"""Cost of a model. Oracle: counted by hand for one block of width 32: 17 tokens, 2 heads of 16, MLP of 128, 10 classes."""

import pytest
import timm

from qat.model.cost import cost, matmuls, weights_by_bits
from tests.tiny import SIZE, convert, identical, vit, with_scales

TOKENS, WIDTH, HEADS, HIDDEN, CLASSES = 17, 32, 2, 128, 10
PATCH = 2 * 2
# Parameters that stay float32 whatever the recipe: tokens, position embedding, norms, biases behind weights (attention's without qkv).
FLOAT_REST = WIDTH + TOKENS * WIDTH + 3 * 2 * WIDTH + (WIDTH + WIDTH + HIDDEN + WIDTH + CLASSES)
# Weights of stem, proj, fc1, fc2, head.
STEM, PROJ, FC, HEAD = WIDTH * PATCH, WIDTH * WIDTH, HIDDEN * WIDTH, CLASSES * WIDTH
MACS = {
    "patch_embed.proj": 16 * STEM,
    "attn.proj": TOKENS * PROJ,
    "mlp.fc1": TOKENS * FC,
    "mlp.fc2": TOKENS * FC,
    "head": HEAD,
    "qkv": TOKENS * 3 * WIDTH * WIDTH,
    "scores": TOKENS**2 * WIDTH,  # over all heads
    "values": TOKENS**2 * WIDTH,
}
# Learned at 8 bit in stem and head: a step per row; a step and two offset maps for the image and its sign; a step and two offsets.
STEM_AND_HEAD = (WIDTH + 1 + 2 * 64 + 1) + (CLASSES + 1 + 2 * WIDTH)
# Inputs of proj, fc1, fc2: a step per token, two offsets per channel. Values: a step and two offsets per channel. Probabilities: a
# step per token.
INPUTS = 3 * TOKENS + 2 * (WIDTH + WIDTH + HIDDEN) + 3 * WIDTH + TOKENS


def net(preset, **knobs):
    return convert(vit(depth=1), preset, **knobs)


def test_float():
    found = cost(net("fp"), SIZE)
    params = FLOAT_REST + 3 * WIDTH * WIDTH + 3 * WIDTH + STEM + PROJ + 2 * FC + HEAD
    assert found.n_params == params
    assert found.size_bytes == 4 * params
    assert found.macs == sum(MACS.values())
    assert found.bitops == 32 * 32 * found.macs


def test_standard_attention_at_2_bits():
    found = cost(net("ofq_noqkr", bits=2), SIZE)
    codes = STEM + HEAD + (3 * WIDTH * WIDTH + PROJ + 2 * FC) // 4
    row_scales = 4 * (
        3 * WIDTH + WIDTH + HIDDEN + WIDTH
    )  # StatsQ's, made from the weights in training and stored for deployment
    # Input of qkv and q: a step per token, two offsets; k: one offset.
    qkv = 3 * WIDTH + 3 * TOKENS + 2 * WIDTH + 2 * WIDTH + WIDTH
    assert found.size_bytes == codes + row_scales + 4 * (FLOAT_REST + STEM_AND_HEAD + INPUTS + qkv)
    blocks = sum(n for name, n in MACS.items() if name not in {"patch_embed.proj", "head"})
    assert found.macs == sum(MACS.values())
    assert found.bitops == 64 * (MACS["patch_embed.proj"] + MACS["head"]) + 4 * blocks


def test_query_key_reparameterization_at_2_bits():
    found = cost(net("ofq", bits=2), SIZE)
    folded, v = HEADS * WIDTH * WIDTH, WIDTH * WIDTH
    codes = STEM + HEAD + (folded + v + PROJ + 2 * FC) // 4
    row_scales = 4 * (HEADS * WIDTH + WIDTH + WIDTH + HIDDEN + WIDTH)
    # v bias; input: a step per token, two offsets; product: a step per token and head, an offset per row of the folded matrix.
    attention = WIDTH + TOKENS + 2 * WIDTH + TOKENS * HEADS + HEADS * WIDTH
    assert found.size_bytes == codes + row_scales + 4 * (
        FLOAT_REST + STEM_AND_HEAD + INPUTS + attention
    )
    products = {
        "product": HEADS * TOKENS * WIDTH**2,
        "score": HEADS * TOKENS**2 * WIDTH,
        "v": TOKENS * v,
        "values": MACS["values"],
        **{name: MACS[name] for name in ("attn.proj", "mlp.fc1", "mlp.fc2")},
    }
    ends = MACS["patch_embed.proj"] + MACS["head"]
    assert found.macs == sum(products.values()) + ends
    assert found.bitops == 4 * sum(products.values()) + 64 * ends


def test_bits_of_both_operands_count():
    block = {m.module: m.bits for m in matmuls(net("ofq_noqkr", bits=2, act_bits=5), SIZE)}
    assert block["blocks.0.mlp.fc1"] == (2, 5)
    assert block["blocks.0.attn"] == (5, 5)
    assert block["head"] == (8, 8)
    qkr = [
        m
        for m in matmuls(net("ofq", bits=2, act_bits=5), SIZE)
        if m.module.startswith("blocks.0.attn")
    ]
    assert {(m.module, m.bits) for m in qkr} == {
        ("blocks.0.attn", (2, 5)),
        ("blocks.0.attn", (5, 5)),
        ("blocks.0.attn.v", (2, 5)),
        ("blocks.0.attn.proj", (2, 5)),
    }


def test_a_folded_query_bias_makes_a_score_of_each_key():
    counts = [
        {
            (m.module, m.bits): m.macs
            for m in matmuls(net("ofq", bits=2, act_bits=5, qk_bias=b), SIZE)
        }
        for b in ("drop", "fold")
    ]
    added = {key: macs for key, macs in counts[1].items() if key not in counts[0]}
    assert added == {("blocks.0.attn", (32, 5)): HEADS * TOKENS * WIDTH}


@pytest.mark.parametrize("training", [True, False])
def test_measuring_changes_nothing(training):
    model = with_scales(net("ofq")).train(training)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    cost(model, SIZE)
    assert model.training == training
    assert identical(before, model.state_dict())
    assert not any(m._forward_hooks for m in model.modules())


def test_swin_tiny_as_published():
    # Swin (arXiv 2103.14030), table 1: 4.5 G multiply-accumulates, 29 M parameters.
    found = cost(timm.create_model("swin_tiny_patch4_window7_224"), (3, 224, 224))
    assert found.macs / 1e9 == pytest.approx(4.5, abs=0.05)
    assert found.n_params / 1e6 == pytest.approx(29, abs=1)


def test_a_shared_weight_counts_once():
    apart, shared = vit(depth=2), vit(depth=2)
    shared.blocks[1].mlp.fc1.weight = shared.blocks[0].mlp.fc1.weight
    expected = weights_by_bits(convert(apart, "lsq", bits=2))
    expected[2] -= FC
    assert weights_by_bits(convert(shared, "lsq", bits=2)) == expected
