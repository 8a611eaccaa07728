"""The changes that are evaluated, and their results. Oracle: the nets' own accuracy under each change, nets quantized by hand."""

import dataclasses
import functools
import operator
import re

import pytest
import torch
from omegaconf import OmegaConf

import qat
from qat.analysis.requantize import nearest_power_of_two, requantize_weights, weight_sites
from qat.analysis.robustness import Robustness
from tests import tiny
from tests.analysis.common import image_set, is_as_before, net_of, state, studied
from tests.conftest import ROOT
from tests.errors import usage_error

SMALL = {"ratios": 3, "bits": (2, 4, 32)}


def run(net, images=None, **settings):
    """Table and summary of one net."""
    outcome = Robustness(**SMALL | settings).run([studied(net)], images or image_set())
    return outcome.tables[0].rows, outcome.summary["net"]


@pytest.mark.sample(1)
@pytest.mark.parametrize("kind", ["ofq2", "lsq2", "minmax", "ptq3"])
@torch.no_grad()
def test_accuracies_are_those_of_the_changed_weights(kind):
    net, images = net_of(kind), image_set(24)
    before, (_, weights) = state(net), weight_sites(net, tiny.SIZE)
    rows, found = run(net, images, low=0.5, high=2.0, ratios=4, bits=[4, 2, 32])
    assert is_as_before(net, before)
    blocks = [site for site in weights if site.place == "block"]
    measured = {(row["part"], row["ratio"], row["bits"]): row for row in rows}
    for key, row in measured.items():
        part, ratio, bits = key
        sites = [site for site in blocks if site.bits != bits] if part == "bits" else weights
        resize = (
            nearest_power_of_two
            if part == "power_of_two"
            else functools.partial(operator.mul, ratio or 1.0)
        )
        with requantize_weights(sites, bits=bits if part == "bits" else None, resize=resize):
            expected = images.score(net)
        assert (row["top-1 (%)"], row["loss"]) == (expected["top1"], expected["loss"]), key
    own = weights[1].bits
    assert [key[1] for key in measured if key[0] == "steps"] == [0.5, 1.0, 1.5, 2.0]
    assert [key[2] for key in measured if key[0] == "bits"] == [2, 4, 32]
    percents = {
        ratio: row["top-1 (%)"] for (part, ratio, _), row in measured.items() if part == "steps"
    }
    assert found["steps"] == {
        "at_1": percents[1.0],
        "lowest": min(percents.values()),
        "lowest_at": min(percents, key=percents.get),
        "mean": pytest.approx(sum(percents.values()) / 4),
    }
    assert found["widths"] == {
        name: measured["bits", None, bits]["top-1 (%)"]
        for name, bits in (("2", 2), ("4", 4), ("float", 32))
    }
    assert (found["top1"], found["bits"], found["power_of_two"]) == (
        measured["clean", None, own]["top-1 (%)"],
        own,
        measured["power_of_two", None, None]["top-1 (%)"],
    )


def test_the_width_of_a_mixed_net_is_a_mean_and_weights_that_have_a_width_keep_their_step_sizes():
    # LSQ's first step size at a width it has would be another than the learned one.
    net = tiny.quantized("lsq", bits=4, overrides={"*.mlp.*": {"bits": 2}}).eval()
    rows, found = run(net, parts=["bits"], bits=[2])
    # Of a block of width 32: qkv 3, proj 1, mlp 8 times 32 x 32.
    assert found["bits"] == pytest.approx((4 * 4 + 8 * 2) / 12)
    assert list(found["widths"]) == ["2"]
    images, (_, weights) = image_set(), weight_sites(net, tiny.SIZE)
    with requantize_weights(
        [site for site in weights if site.place == "block" and ".mlp." not in site.name], bits=2
    ):
        assert rows[1]["loss"] == images.score(net)["loss"]


def test_a_float_net_has_widths_alone():
    rows, found = run(tiny.vit())
    assert [row["part"] for row in rows] == ["clean", "bits", "bits", "bits"]
    assert found.keys() == {"top1", "bits", "widths"}
    assert found["widths"]["float"] == found["top1"]


@pytest.mark.long
@pytest.mark.sample(1)
@pytest.mark.parametrize("scales", ["channel", "tensor"])
@torch.no_grad()
def test_a_float_net_is_quantized_where_that_is_wanted(scales):
    net, images, axis = tiny.vit(), image_set(24), 0 if scales == "channel" else None
    rows, found = run(
        net,
        images,
        parts=["steps", "power_of_two"],
        float_bits=3,
        float_scales=scales,
        steps_from="mse",
    )
    assert [row["part"] for row in rows] == ["clean", "steps", "steps", "steps", "power_of_two"]
    twin = tiny.vit()
    for name, module in twin.named_modules():
        if isinstance(module, torch.nn.Linear) and name.startswith("blocks."):
            scale, zero = qat.functional.affine_scale(
                module.weight, 3, signed=True, axis=axis, method="mse"
            )
            module.weight.copy_(
                qat.functional.fake_quantize_affine(module.weight, scale, zero, -4, 3, axis)
            )
    assert (
        rows[2]["loss"]
        == pytest.approx(images.score(twin.eval())["loss"], rel=1e-6)
        != rows[0]["loss"]
    )
    assert found["steps"]["at_1"] == rows[2]["top-1 (%)"]


def test_two_nets_are_compared():
    outcome = Robustness(**SMALL).run(
        [studied(net_of("ofq2"), "ours"), studied(tiny.vit(), "float")], image_set()
    )
    assert list(outcome.summary) == ["ours", "float"]
    assert [
        (row["net"], row["bits"]) for row in outcome.tables[0].rows if row["part"] == "bits"
    ] == [(label, bits) for label in ("ours", "float") for bits in (2, 4, 32)]
    assert ["float: " in drawing.alt for drawing in outcome.drawings] == [False, True]
    assert all("ours: " in drawing.alt and "%" in drawing.alt for drawing in outcome.drawings)
    assert [drawing.name for drawing in outcome.drawings] == ["step_sizes", "bit_widths"]


@torch.no_grad()
def test_ratios_are_drawn_where_they_are():
    (drawing,) = (
        Robustness(parts=["steps"], low=1e-7, high=32, ratios=2)
        .run([studied(net_of("ofq2"))], image_set())
        .drawings
    )
    assert [*drawing.figure.axes[0].lines[0].get_xdata()] == [1e-7, 1, 32]
    assert drawing.alt.endswith(" % at 32.")
    assert " % at 1e-07, " in drawing.alt


def test_the_yaml_has_every_setting_at_its_default():
    found = OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / "analysis" / "robustness.yaml"))
    assert found.pop("_target_") == "qat.analysis.robustness.Robustness"
    assert Robustness(**found) == Robustness(bits=[2, 3, 4, 5, 6, 8, 32])
    assert list(found) == [field.name for field in dataclasses.fields(Robustness)]


@pytest.mark.parametrize("parts", [["bits", "steps"], ["steps"]])
def test_step_sizes_of_a_float_net(parts):
    with usage_error(rf"^analysis\.parts={re.escape(repr(parts))}: net has no quantized weights"):
        Robustness(parts=parts).run([studied(tiny.vit())], image_set())


def test_floats_in_blocks_have_no_step_sizes_to_change():
    with usage_error("analysis=robustness: net has no weights on a uniform grid besides"):
        Robustness().run([studied(tiny.quantized("nvfp4"))], image_set())
