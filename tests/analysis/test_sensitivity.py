"""Sensitivity of layers, and bits for a size. Oracle: models without quantizers, and models that were converted again."""

import copy
import itertools
import math
import re
import statistics

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from torch import nn

import qat
from qat.analysis.requantize import block_weights, weight_sites
from qat.analysis.sensitivity import (
    Sensitivity,
    bypass_quantizers,
    greedy_bits,
    override_setting,
    sizes_by_bits,
)
from qat.model.convert import conversion_of
from qat.model.cost import size_bytes
from qat.model.ptq_spec import PtqRecipe
from qat.nn.fqvit import IntegerLayerNorm
from qat.ptq.calibrate import in_float
from qat.quantizers import Float
from qat.utils.text import format_count
from tests import tiny
from tests.analysis.common import PTQ, QAT, image_set, is_as_before, net_of, ptq, state, studied
from tests.errors import usage_error


def run(net, **settings):
    """Lines of the table by layer, the summary, the figures."""
    outcome = Sensitivity(**settings).run([studied(net)], image_set())
    return (
        {line["layer"]: line for line in outcome.tables[0].rows},
        outcome.summary["net"],
        outcome.drawings,
    )


def without_quantizers(net, names):
    """A copy in which the quantizers of these names leave all as it is."""
    net = copy.deepcopy(net)
    for site in list(qat.iter_quantizers(net)):
        if site.name in names:
            setattr(site.owner, site.name.rpartition(".")[2], Float(site.quantizer.spec))
    return net


def converted_anew(kind, overrides):
    """The net of this kind with rules, its tensors those of the net without them."""
    if kind in PTQ:
        recipe = PtqRecipe(**PTQ[kind], overrides=overrides)
        return tiny.fitted(tiny.vit(), tiny.images(seed=1), recipe)
    preset, knobs = QAT[kind]
    net = tiny.convert(tiny.vit(), preset, **knobs, overrides=overrides)
    if kind == "lsq4":
        return tiny.with_scales(net).eval()
    net.load_state_dict(net_of(kind).state_dict())
    return net.eval()


def overrides(setting):
    """What Hydra makes of a setting: the group and its rules."""
    parsed = OverridesParser.create().parse_override(setting)
    group, _, key = parsed.key_or_group.rpartition(".")
    assert key == "overrides"
    return group, OmegaConf.to_container(OmegaConf.create(parsed.value()))


@pytest.mark.sample(1)
@pytest.mark.parametrize("kind", ["ofq2", "minmax", "corrected", "ptq4"])
def test_changes_are_those_of_nets_without_quantizers_and_of_nets_converted_with_other_bits(kind):
    net, images = net_of(kind), image_set()
    before, as_is = state(net), images.score(net)
    lines, summary, _ = run(net, bits=[8, 3])
    assert is_as_before(net, before)
    assert summary["as_is"] == as_is
    sites = [site for site in qat.iter_quantizers(net) if not site.quantizer.is_float]
    assert list(lines) == list(dict.fromkeys(site.layer or "(net)" for site in sites))
    for name, line in lines.items():
        own = {site.name for site in sites if (site.layer or "(net)") == name}
        found = images.score(without_quantizers(net, own))
        assert line["in float: loss change"] == found["loss"] - as_is["loss"]
        assert line["in float: top-1 change (points)"] == found["top1"] - as_is["top1"]
    best = min(lines.values(), key=lambda line: line["in float: loss change"])
    assert summary["most_sensitive"] == {
        "layer": best["layer"],
        "loss_change": best["in float: loss change"],
    }

    recipe = conversion_of(net).recipe
    for name in ("blocks.0.mlp.fc1", "blocks.1.mlp.fc2"):
        found = images.score(converted_anew(kind, {name: {"bits": 8, "act_bits": recipe.act_bits}}))
        assert (lines[name]["bits"], lines[name]["weights"]) == (recipe.bits, 32 * 128)
        assert lines[name]["8 bits: loss change"] == found["loss"] - as_is["loss"]


@pytest.mark.parametrize(
    "side",
    [
        "blocks.1.mlp.fc1.input_quantizer",
        "blocks.0.residual1_quantizer",
        "blocks.0.mlp.fc1.weight_quantizer",
    ],
)
def test_an_integer_norm_is_a_norm_where_a_quantizer_beside_it_is_in_float(side):
    net = ptq(bits=4, layernorm="integer", residual_observer="ptf")
    sites = {site.name: site.quantizer for site in qat.iter_quantizers(net)}
    with bypass_quantizers(net, [sites[side]]):
        found = {
            name
            for name, m in net.named_modules()
            if isinstance(m, IntegerLayerNorm) and m.__dict__.get("forward") == m.in_float
        }
    assert found == {
        name
        for name, m in net.named_modules()
        if isinstance(m, IntegerLayerNorm) and sites[side] in m.outer_quantizers
    }
    assert len(found) == ("weight" not in side)
    with in_float(net):
        expected = tiny.logits(net)
    with bypass_quantizers(net, list(sites.values())):
        assert torch.equal(tiny.logits(net), expected)


def test_weights_of_a_float_net_have_the_step_sizes_of_least_error():
    net, images = tiny.vit(), image_set()
    before, by_hand = state(net), copy.deepcopy(net)
    lines, summary, drawings = run(net, bits=[3])
    weight = by_hand.blocks[0].mlp.fc1.weight
    scale, zero = qat.functional.affine_scale(weight, 3, signed=True, axis=0, method="mse")
    weight.data = qat.functional.fake_quantize_affine(weight.data, scale, zero, -4, 3, 0)
    expected = images.score(by_hand)["loss"] - images.score(net)["loss"]
    assert lines["blocks.0.mlp.fc1"]["3 bits: loss change"] == pytest.approx(expected, abs=1e-7)
    assert lines.keys() == {
        name for name, m in net.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)
    }
    assert "most_sensitive" not in summary
    assert "in float:" not in drawings[0].alt
    assert is_as_before(net, before)


@pytest.mark.sample(1)
@pytest.mark.parametrize("n_images", [1, 16])
def test_changes_within_noise_have_no_colour(caplog, n_images):
    caplog.set_level("INFO")
    net, images = net_of("ofq2"), image_set(n_images)

    @torch.no_grad()
    def losses(net):
        pairs = [(net(x), target) for x, target in images.batches]
        return torch.cat([nn.functional.cross_entropy(*p, reduction="none") for p in pairs])

    outcome = Sensitivity(bits=[8]).run([studied(net)], images)
    (table,), (drawing,) = outcome.tables, outcome.drawings
    noise = []
    for row in table.rows:
        own = {site.name for site in qat.iter_quantizers(net) if site.layer == row["layer"]}
        found = losses(without_quantizers(net, own)) - losses(net)
        expected = 2 * found.double().std() / n_images**0.5 if n_images > 1 else math.nan
        assert row["in float: loss noise"] == pytest.approx(float(expected), nan_ok=True)
    hidden = drawing.figure.axes[0].images[0].get_array().mask
    for row, hidden_cells in zip(table.rows, hidden, strict=True):
        for change, is_hidden in zip(("8 bits", "in float"), hidden_cells, strict=True):
            if f"{change}: loss change" in row:
                noise.append(row[f"{change}: loss noise"])
                assert is_hidden == (not abs(row[f"{change}: loss change"]) > noise[-1])
    assert hidden.all() == (n_images == 1)
    median = statistics.median(noise)
    said = outcome.summary["net"]["noise"]
    assert said == pytest.approx({"images": n_images, "loss_change": median}, nan_ok=True)
    limit = "of any size" if n_images == 1 else f"below {median:.2g} "
    assert f"on {format_count(n_images, 'image')}, loss changes {limit}" in caplog.text
    assert ("no layer adds more than noise" in drawing.alt) >= (n_images == 1)


@pytest.mark.sample(2)
@pytest.mark.parametrize("kind", ["ofq2", "noqkr", "lsq4", "statsq", "ptq4", "inputs"])
def test_sizes_and_bits_are_those_of_nets_converted_with_the_setting(kind):
    net = net_of(kind)
    rest, sizes = sizes_by_bits(net, block_weights(weight_sites(net, tiny.SIZE)[1]), (2, 3, 8))
    bits = dict(zip(sizes, itertools.cycle((2, 8, 3))))
    group, rules = overrides(override_setting(conversion_of(net), bits))
    assert group == ("ptq" if kind in PTQ else "quant")
    anew = converted_anew(kind, rules)
    found = {
        site.layer: site.quantizer.spec.bits for site in qat.iter_quantizers(anew) if site.is_weight
    }
    assert {name: found[name] for name in bits} == bits
    assert rest + sum(sizes[name][width] for name, width in bits.items()) == size_bytes(anew)
    acts = [
        {s.name: s.quantizer.spec for s in qat.iter_quantizers(n) if not s.is_weight}
        for n in (net, anew)
    ]
    assert acts[0] == acts[1]


def test_rules_that_a_net_has_stay():
    own = {"bits": 8, "act_bits": 6, "act_observer": "omse"}
    # The last rule wins over the first.
    last = {"blocks.[01].*.fc1": {"act_observer": "minmax"}}
    rules = {"blocks.0.mlp.fc1": own, "*.proj": {"act_bits": 5}, **last}
    net = tiny.convert(tiny.vit(), PtqRecipe(bits=4, overrides=rules))
    bits = {"blocks.0.mlp.fc1": 2, "blocks.1.attn.proj": 3}
    _, found = overrides(override_setting(conversion_of(net), bits))
    assert found["*.proj"] == {"act_bits": 5}
    settled = own | {"bits": 2, "act_observer": "minmax"}
    assert settled.items() <= found["blocks.0.mlp.fc1"].items()
    assert list(found)[:2] == ["*.proj", *last]
    assert found["blocks.1.attn.proj"]["bits"] == 3


def test_float_weights_get_a_quantizer():
    net = tiny.convert(tiny.vit(), PtqRecipe(weight_quantizer="float"))
    _, found = overrides(override_setting(conversion_of(net), {"head": 3}))
    assert found == {"head": {"bits": 3, "weight_quantizer": "affine"}}


@pytest.mark.parametrize(
    ("room", "expected"),
    [
        # All at what loses least; of equal losses the fewer bytes.
        (100, {"a": 4, "b": 8, "c": 2}),
        # a from 4 to 2 bits adds 0.02 a byte, b from 8 to 4 bits 0.025, and from 8 to 2 bits 0.05.
        (15, {"a": 2, "b": 8, "c": 2}),
        (11, {"a": 2, "b": 4, "c": 2}),
        (8, {"a": 2, "b": 2, "c": 2}),
    ],
)
def test_the_reduction_that_adds_least_loss_per_byte_comes_first(room, expected):
    sizes = {"a": {2: 4, 4: 8, 8: 16}, "b": {2: 2, 4: 4, 8: 8}, "c": {2: 2, 8: 8}}
    rises = {"a": {2: 0.08, 4: 0.0, 8: 0.01}, "b": {2: 0.3, 4: 0.1, 8: 0.0}, "c": {2: 0.0, 8: 0.0}}
    assert greedy_bits(sizes, rises, room) == expected


@pytest.mark.sample(1)
@pytest.mark.parametrize("kind", ["ofq2", "ptq4"])
def test_a_suggestion_is_evaluated_as_a_whole(kind, caplog):
    caplog.set_level("INFO")
    net = net_of(kind)
    rest, sizes = sizes_by_bits(net, block_weights(weight_sites(net, tiny.SIZE)[1]), (2, 4))
    budget = round((rest + sum(sum(of.values()) for of in sizes.values()) / 2) / 1e6, 5)
    lines, summary, _ = run(net, bits=[2, 4], budget_mb=budget)
    suggested = summary["suggestion"]
    assert suggested["size_bytes"] <= budget * 1e6
    bits = suggested["bits_of_layers"]
    assert len(set(bits.values())) > 1
    assert bits == {
        name: line[f"bits for {budget:g} MB"] for name, line in lines.items() if name in bits
    }
    rises = (lines[name].get(f"{width} bits: loss change", 0.0) for name, width in bits.items())
    assert suggested["expected_loss"] == pytest.approx(
        summary["as_is"]["loss"] + sum(rises), abs=1e-12
    )
    group, rules = overrides(suggested["setting"])
    assert group == ("quant" if kind == "ofq2" else "ptq")
    anew = converted_anew(kind, rules)
    assert image_set().score(anew)["loss"] == suggested["loss"]
    assert size_bytes(anew) == suggested["size_bytes"]
    assert f"'{suggested['setting']}'" in caplog.text


def test_a_budget_needs_weights_whose_bits_can_be_chosen():
    net = tiny.fitted(tiny.vit(), tiny.images(), "mxfp4")
    with usage_error(r"analysis.budget_mb=1: .* no weights on a uniform grid .*must be null"):
        run(net, bits=[2], budget_mb=1)


def test_the_smallest_size_that_is_printed_can_be_typed():
    net = net_of("ofq2")
    with usage_error("must be at least ") as error:
        run(net, bits=[2, 8], budget_mb=0.001)
    printed = re.search(r"must be at least ([\d.]+)", str(error.value))[1]
    _, summary, _ = run(net, bits=[2, 8], budget_mb=float(printed))
    assert set(summary["suggestion"]["bits_of_layers"].values()) == {2}
