"""Every family of timm: converted, trained by one step, stored, reported. Oracle: timm's own outputs and weights."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import qat
from evidence import models_page
from qat.model.convert import conversion_of
from qat.model.transfer import forget_attention_weights, timm_state_dict
from qat.nn import QkrAttention, ScoredAttention
from tests.conftest import ROOT
from tests.nets import ATTENTIONS, FAMILIES, GENERIC, OFTEN, families
from tests.tiny import float_recipe, logits, parameters, sites

KINDS = {name: ("qkr", "standard", "float") if family.qkr else ("standard", "float") for name, family in ATTENTIONS.items()}
REFUSED = sorted(set(KINDS) - {name for name, kinds in KINDS.items() if "qkr" in kinds})


def converted(family, preset="ofq", **knobs):
    """A quantized net, scales NaN."""
    return qat.convert(family.build(), qat.recipe(preset, **{"attention": family.attention, **knobs}), input_size=family.input_size)


def quantized(family, **knobs):
    """A quantized net with scales from data."""
    return qat.initialize_scales(converted(family, **knobs), [family.images(4, seed=1)])


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, kinds in KINDS.items() for kind in kinds])
def test_without_rounding_it_is_as_exact_as_timm(name, kind):
    # The yardstick is timm's own error against double precision.
    family = ATTENTIONS[name]
    net, x = family.build(), family.images()
    plain, exact = logits(net, x), logits(copy.deepcopy(net).double(), x.double())
    qat.convert(net, float_recipe(kind), input_size=family.input_size)
    ours = logits(net, x)
    assert_close(ours, plain, rtol=0, atol=3e-6 * plain.abs().max().item())
    assert (ours - exact).abs().max() <= 4 * (plain - exact).abs().max()


@pytest.mark.parametrize("name", GENERIC)
def test_without_rounding_the_generic_path_changes_nothing(name):
    family = GENERIC[name]
    plain = logits(family.build(), family.images())
    ours = logits(converted(family, **{"weight_quantizer": "float", "act_quantizer": "float", "qk_bias": "fold"}), family.images())
    assert_close(ours, plain, rtol=0, atol=3e-6 * plain.abs().max().item())


@pytest.mark.parametrize("name", families())
def test_one_step_of_training(name, tmp_path):
    family = FAMILIES[name]
    net = quantized(family, bits=4).train()
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    net(family.images(4)).square().sum().backward()
    assert [n for n, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0).step()
    # Not all: in nets as small as these a window of one token or a dead unit leaves a weight without gradient.
    moved = [not torch.equal(p, before[n]) for n, p in net.named_parameters() if p.ndim > 1]
    assert sum(moved) > 0.8 * len(moved)
    qat.save(net, tmp_path / "net.ckpt")
    assert torch.equal(logits(qat.load(tmp_path / "net.ckpt"), family.images()), logits(net, family.images()))


@pytest.mark.parametrize("name", sorted(OFTEN & set(ATTENTIONS)))
def test_works_under_autocast(name):
    family = ATTENTIONS[name]
    net = quantized(family, bits=4).train()
    with torch.autocast("cpu", torch.bfloat16):
        out = net(family.images())
        out.square().mean().backward()
    assert out.dtype == torch.bfloat16
    assert all(p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("name", families())
def test_eight_bits_are_close_and_two_are_not(name):
    family = FAMILIES[name]
    x, exact = family.images(4), logits(family.build(), family.images(4)).flatten()
    nets = (quantized(family, preset="minmax", bits=b, qk_bias="fold") for b in (2, 8))
    two, eight = (torch.corrcoef(torch.stack([logits(net, x).flatten(), exact]))[0, 1] for net in nets)
    assert eight > 0.94
    assert 1 - two > 4 * (1 - eight)


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, kinds in KINDS.items() for kind in kinds])
def test_all_weights_are_kept(name, kind):
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
    assert conversion_of(net).float_products == ()
    assert not [n for n, cls in qat.conversion_report(net).stays_float if "products" in cls]
    # The queries of a pooling head are no tokens: nothing to fold there.
    found = [m for n, m in net.named_modules() if isinstance(m, ScoredAttention) and n != "attn_pool"]
    assert {isinstance(m, QkrAttention) for m in found} == {ATTENTIONS[name].qkr}


@pytest.mark.parametrize("name", ATTENTIONS)
@pytest.mark.parametrize("kind", ["standard", "float"])
def test_all_linears_are_quantized_but_those_that_make_a_table(name, kind):
    left = [n for n, m in converted(ATTENTIONS[name], attention=kind).named_modules() if type(m) in {nn.Linear, nn.Conv2d}]
    assert [n for n in left if "cpb_mlp" not in n and "rel_pos" not in n] == []


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_reason_and_left_alone(name):
    family = ATTENTIONS[name]
    net = family.build()
    modules, before = list(net.named_modules()), parameters(net)
    reason = r"(normalises queries and keys|rotates queries and keys by position).*"
    with pytest.raises(qat.UsageError, match=rf"quant.attention='qkr': this net {reason}; here it must be one of standard, float"):
        qat.convert(net, qat.recipe("ofq"), input_size=family.input_size)
    assert list(net.named_modules()) == modules
    assert parameters(net) == before


@pytest.mark.parametrize("name", REFUSED)
def test_a_rule_may_lift_the_refusal(name):
    net = converted(ATTENTIONS[name], attention="qkr", overrides={"*attn": {"attention": "standard"}})
    assert {"q", "k", "v", "probs"} <= {site.role for site in qat.iter_quantizers(net)}


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
    assert {cls.removesuffix(note) for _, cls in report.stays_float if cls.endswith(note)} == classes
    assert all(f"  {module}  {cls}" in report.to_text() for module, cls in report.stays_float)


def test_report_of_a_float_attention_says_so():
    net = converted(ATTENTIONS["swin"], overrides={"layers.0.blocks.1.attn": {"attention": "float"}})
    products = [entry for entry in qat.conversion_report(net).stays_float if "products" in entry[1]]
    assert products == [("layers.0.blocks.1.attn", "WindowAttention (products of activations)")]


def test_a_module_that_is_gone_around_stays_float():
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.read = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x) @ self.read.weight

    net = nn.Sequential(nn.Flatten(1, 2), Around())
    read = net[1].read
    qat.convert(net, qat.recipe("ofq"), input_size=(1, 3, 4))
    assert net[1].read is read
    assert set(sites(net)) == {"1.used.input_quantizer", "1.used.weight_quantizer"}
    assert ("1.read", "Linear") in qat.conversion_report(net).stays_float
    with pytest.raises(qat.UsageError, match=r"overrides\['1.read'\] matches no module that is quantized"):
        qat.convert(nn.Sequential(nn.Flatten(1, 2), Around()), qat.recipe("ofq", overrides={"1.read": {"bits": 2}}), input_size=(1, 3, 4))


def test_a_layer_that_sees_several_lengths_has_one_scale():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(x).sum(1) + self.layer(x[:, 1:]).sum(1)

    net = nn.Sequential(nn.Flatten(1, 2), Twice())
    qat.convert(net, qat.recipe("ofq"), input_size=(1, 3, 4))
    x = torch.randn(2, 1, 3, 4, generator=torch.Generator().manual_seed(0))
    qat.initialize_scales(net, [x])
    assert sites(net)["1.layer.input_quantizer"].quantizer.n_scales == 1
    assert logits(net, x).isfinite().all()


def test_the_references_start_draws_swins_table_anew():
    net = converted(ATTENTIONS["swin"])
    table = net.layers[0].blocks[0].attn.relative_position_bias_table
    before = table.detach().clone()
    lost = forget_attention_weights(net)
    assert {"layers.0.blocks.0.attn.proj", "layers.0.blocks.0.attn.relative_position_bias_table"} <= set(lost)
    assert not torch.equal(table, before)
    assert table.abs().max() <= 2
    assert 0.01 < table.std() < 0.03


@pytest.mark.slow
def test_the_page_is_what_the_code_does():
    committed = (ROOT / "docs/models.md").read_text()
    assert committed == models_page.page(), "make models-page"
