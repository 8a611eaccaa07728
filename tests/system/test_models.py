"""Every family of timm: converted, trained by one step, stored, reported. Oracle: timm's own outputs and weights."""

import copy

import pytest
import torch
from torch.testing import assert_close

import qat
from evidence.pages import models_page
from qat.model.transfer import timm_state_dict
from qat.nn import QkrAttention, ScoredAttention
from tests.conftest import ROOT
from tests.nets import ATTENTIONS, FAMILIES, GENERIC, families
from tests.tiny import float_recipe, logits, moved_by_a_step

EVERY_KIND = [
    (name, kind)
    for name, family in ATTENTIONS.items()
    for kind in ("qkr", "standard", "float")
    if family.qkr or kind != "qkr"
]


def converted(family, preset="ofq", **knobs):
    """A quantized net, scales NaN."""
    return family.converted(preset, **{"attention": family.attention, **knobs})


def quantized(family, **knobs):
    """A quantized net with scales from data."""
    return qat.initialize_scales(converted(family, **knobs), [family.images(4, seed=1)])


@pytest.mark.sample(10)
@pytest.mark.parametrize(
    ("name", "kind"), [*EVERY_KIND, *((name, GENERIC[name].attention) for name in GENERIC)]
)
def test_without_rounding_it_is_as_exact_as_timm(name, kind):
    # The yardstick is timm's own error against double precision.
    family = FAMILIES[name]
    net, x = family.build(), family.images()
    plain, exact = logits(net, x), logits(copy.deepcopy(net).double(), x.double())
    qat.convert(net, float_recipe(kind), input_size=family.input_size)
    ours = logits(net, x)
    assert_close(ours, plain, rtol=0, atol=3e-6 * plain.abs().max().item())
    assert (ours - exact).abs().max() <= 4 * (plain - exact).abs().max()


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", families())
def test_one_step_of_training(name, tmp_path):
    family = FAMILIES[name]
    net = quantized(family, bits=4)
    moved = moved_by_a_step(net, family.images(4))
    # Not all: in nets as small as these a window of one token or a dead unit leaves a weight without gradient.
    weights = [name for name, p in net.named_parameters() if p.ndim > 1]
    assert len(moved.intersection(weights)) > 0.8 * len(weights)
    qat.save(net, tmp_path / "net.ckpt")
    x = family.images()
    assert torch.equal(logits(qat.load(tmp_path / "net.ckpt"), x), logits(net, x))


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", families())
def test_eight_bits_are_close_and_two_are_not(name):
    family = FAMILIES[name]
    x, exact = family.images(4), logits(family.build(), family.images(4)).flatten()
    nets = (quantized(family, preset="minmax", bits=b, qk_bias="fold") for b in (2, 8))
    two, eight = (
        torch.corrcoef(torch.stack([logits(net, x).flatten(), exact]))[0, 1] for net in nets
    )
    assert eight > 0.94
    assert 1 - two > 4 * (1 - eight)


@pytest.mark.sample(6)
@pytest.mark.parametrize(("name", "kind"), EVERY_KIND)
def test_deviates_from_reference_pretrained_attention_is_kept(name, kind):
    # There `proj`, and without QKR also `qkv`, start at random.
    family = ATTENTIONS[name]
    expected = family.build().state_dict()
    kept = timm_state_dict(converted(family, attention=kind, qk_bias="fold"))
    assert set(kept) == set(expected)
    for key, value in expected.items():
        if kind == "qkr" and key.endswith("qkv.bias"):
            value = torch.cat([part * (i != 1) for i, part in enumerate(value.chunk(3))])
        assert torch.equal(kept[key], value), key


@pytest.mark.parametrize("name", ATTENTIONS)
def test_every_attention_of_a_known_family_is_quantized(name):
    net = converted(ATTENTIONS[name])
    assert not [n for n, cls in qat.conversion_report(net).stays_float if "products" in cls]
    # The queries of a pooling head are no tokens: nothing to fold there.
    found = [
        m for n, m in net.named_modules() if isinstance(m, ScoredAttention) and n != "attn_pool"
    ]
    assert {isinstance(m, QkrAttention) for m in found} == {ATTENTIONS[name].qkr}


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("name", "classes"),
    [
        ("swinv2_cr", {"WindowMultiHeadAttention"}),
        ("convnext", set()),
        ("levit", {"Attention", "AttentionDownsample"}),
        ("xcit", {"XCA", "ClassAttn"}),
        ("cait", {"TalkingHeadAttn", "ClassAttn"}),
        ("mobilevit", set()),
        ("hiera", {"MaskUnitAttention"}),
        ("pvt_v2", {"Attention"}),
    ],
)
def test_report_names_attentions_that_stay_float(name, classes):
    report = qat.conversion_report(converted(GENERIC[name]))
    note = " (products of activations)"
    assert {
        cls.removesuffix(note) for _, cls in report.stays_float if cls.endswith(note)
    } == classes
    lines = [line.replace("│", " ").split() for line in report.to_text().splitlines()]
    assert all([module, *cls.split()] in lines for module, cls in report.stays_float)


@pytest.mark.long
def test_the_page_is_what_the_code_does():
    committed = (ROOT / "docs/models.md").read_text()
    assert committed == models_page.page(), "make models-page"
