"""`analysis=weights`. Oracle: numbers by hand for small tensors; the quantizers themselves and `qat.functional` for nets."""

import pytest
import torch

import qat
from qat.analysis import NO_IMAGES, Table
from qat.analysis.weights import WeightAnalysis, activation_rows, iter_latent_weights, weight_row
from qat.functional import kurtosis, near_threshold
from qat.quantizers import StatsQ
from qat.spec import QuantSpec
from tests import tiny
from tests.analysis.common import (
    KINDS,
    affine,
    image_set,
    is_as_before,
    lsq,
    net_of,
    spec,
    state,
    studied,
)
from tests.quantizers.test_grid import Odd


def analysed(net, images=NO_IMAGES):
    return WeightAnalysis().run([studied(net)], images)


@pytest.mark.parametrize(
    ("weight", "quantizer", "expected"),
    [
        # Codes -2, -2 (clipped), 0, 0, 0, 1 (beyond), 1, 1 (clipped).
        (
            [[-2.0, -3.0, 0.0, 0.25], [-0.25, 1.25, 1.0, 2.0]],
            lsq(1.0, 1.0),
            {
                "unused levels": 1,
                "at the end codes, %": 62.5,
                "clipped, %": 25,
                "SNR (dB)": 9.54243,
            },
        ),
        (
            [[-0.5, 0.0, 0.5, 1.0], [-3.0, -2.0, -1.0, 0.25]],
            affine([0.5, 1.0], [1.0, 3.0]),
            {"clipped, %": 0},
        ),
        # 0.503 is near 1/2; of -2 and -1 around -1.5, neither is below the lowest code that occurs, -2.
        ([[0.503, 0.0, 1.0, -1.5]], lsq(1.0), {"near a threshold, %": 50}),
        (
            [[0.497, 0.0, 0.1, 0.2]],
            lsq(1.0),
            {"near a threshold, %": 0},
        ),  # without a weight at 1 there is no threshold at 1/2
        ([[0.0, 1.0, -2.0]], lsq(1.0), {"SNR (dB)": float("inf")}),
        # A row of zeros does not spoil the others: scale 2, levels at 0.5 and 1.5.
        (
            [[0.0, 0.0], [1.0, -1.0]],
            StatsQ(spec("statsq")),
            {"SNR (dB)": 6.0206},
        ),
        ([[0.5, 0.5]], StatsQ(spec("statsq")), {"kurtosis": 0}),
        # Nothing is known of the thresholds of a user's own quantizer.
        (
            [[1.0, -2.0], [3.0, 0.0]],
            Odd(QuantSpec("weight", "odd", 2)),
            {"unused levels": 1, "SNR (dB)": 4.47158},
        ),
        ([[1.0, -2.0], [3.0, 0.0]], None, {"bits": 32, "quantizer": "float"}),
    ],
)
def test_numbers_by_hand(weight, quantizer, expected):
    row = weight_row("fc", "weight", torch.tensor(weight), quantizer)
    assert {name: row[name] for name in expected} == pytest.approx(expected, abs=1e-5)
    assert ("clipped, %" in row) == (quantizer is not None and quantizer.spec.quantizer != "odd")
    assert ("SNR (dB)" in row) == (quantizer is not None)


@pytest.mark.sample(3)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_every_kind_of_net(kind):
    net = net_of(kind)
    before = state(net)
    found = analysed(net, image_set())
    assert is_as_before(net, before)
    weights, activations = (table.rows for table in [*found.tables, Table("", "", [])][:2])
    sites = {(site.layer, site.role): site for site in qat.iter_quantizers(net) if site.is_weight}
    assert {(row["layer"], row["role"]) for row in weights if row["bits"] < 32} == set(sites)
    for row in (row for row in weights if row["bits"] < 32):
        weight = sites[row["layer"], row["role"]].latent()
        noise = (
            (weight - sites[row["layer"], row["role"]].quantizer(weight)).double().square().sum()
        )
        assert row["kurtosis"] == pytest.approx(float(kurtosis(weight)), rel=1e-4)
        assert row["SNR (dB)"] == pytest.approx(
            float(10 * (weight.double().square().sum() / noise).log10()), rel=1e-4
        )
        if row["quantizer"] == "statsq":
            assert row["near a threshold, %"] == pytest.approx(
                100 * float(near_threshold(weight, row["bits"], 0.005).float().mean()), rel=1e-4
            )
    assert {row["quantizer of"] for row in activations} == {
        site.name
        for site in qat.iter_quantizers(net)
        if not site.is_weight and not site.quantizer.is_float
    }
    assert found.summary["net"]["quantized_weights"] == sum(
        site.latent().numel() for site in sites.values()
    )
    assert [drawing.name for drawing in found.drawings] == ["weights_histograms"]
    assert all("nan" not in drawing.alt for drawing in found.drawings)


def test_a_float_net_has_its_layers_in_order():
    net = tiny.vit()
    found = analysed(net, image_set())
    names = [
        name
        for name, module in net.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
    ]
    assert [layer for layer, *_ in iter_latent_weights(net)] == names
    (table,) = found.tables
    assert [row["layer"] for row in table.rows] == names
    assert [drawing.name for drawing in found.drawings] == ["weights_histograms"]


def test_a_histogram_counts_what_lies_outside_in_its_ends(monkeypatch):
    monkeypatch.setattr("qat.analysis.weights.MAX_PANELS", 99)
    net = net_of("lsq2")
    with torch.no_grad():
        net.blocks[0].mlp.fc1.weight.fill_(100.0)
    (drawing,) = analysed(net).drawings
    (axis,) = [
        axis
        for axis in drawing.figure.axes
        if axis.get_title(loc="left").startswith("blocks.0.mlp.fc1\n")
    ]
    heights = axis.patches[0].get_data().values
    assert (heights[-1], sum(heights)) == (pytest.approx(100), pytest.approx(100))


@torch.no_grad()
def test_activation_codes_are_those_of_the_quantizers():
    net, images = net_of("ofq2"), tiny.images()
    name = "blocks.0.attn.input_quantizer"
    quantizer = net.get_submodule(name)
    x, _ = tiny.watched(net)[name]
    (row,) = [row for row in activation_rows(net, images) if row["quantizer of"] == name]
    codes = quantizer.codes(x)
    assert row["at the end codes, %"] == pytest.approx(
        100 * float(((codes == -2) | (codes == 1)).float().mean()), rel=1e-5
    )
    assert (row["values from"], row["values to"]) == (
        pytest.approx(float(x.min()), rel=1e-5),
        pytest.approx(float(x.max()), rel=1e-5),
    )
    places = (x + quantizer.offset_before) / quantizer.quantizer.scale.view(1, -1, 1)
    assert row["clipped, %"] == pytest.approx(
        100 * float(((places < -2.5) | (places > 1.5)).float().mean()), rel=1e-5
    )


def test_only_so_many_images_are_read(monkeypatch):
    monkeypatch.setattr("qat.analysis.weights.ACTIVATION_IMAGES", 8)
    net, images = net_of("ofq2"), image_set(n=16, batch=6)
    (_, table) = analysed(net, images).tables
    every_second = torch.cat([batch for batch, _ in images.batches])[::2]
    assert [*table.rows] == [{"net": "net", **row} for row in activation_rows(net, every_second)]
