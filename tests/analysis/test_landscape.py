"""`analysis=landscape`. Oracle: closed forms on toys, nets whose scales were multiplied by hand, infoNCE computed here."""

import copy

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

import qat
from qat.analysis.landscape import Landscape, measure_ruggedness, random_plane
from qat.functional.infonce import info_nce
from qat.functional.statsq import statsq_with_scale
from tests import tiny
from tests.analysis.common import image_set, is_as_before, net_of, state, studied
from tests.errors import usage_error


def draws(shape, seed):
    return 2 * torch.rand(shape, generator=torch.Generator().manual_seed(seed)) - 1


@pytest.mark.parametrize("points", [3, 5, 7, 21])
def test_the_shape_of_a_bowl(points):
    places = (torch.arange(points, dtype=torch.float64) - points // 2) / (points // 2)
    shape = measure_ruggedness(places.square().unsqueeze(1) + places.square())
    assert (shape["centre"], shape["lowest"], shape["highest"], shape["local_minima"]) == (
        0,
        0,
        2,
        1,
    )
    assert shape["roughness"] == pytest.approx(2 * (2 / (points - 1)) ** 2)
    assert shape["relative_roughness"] == pytest.approx(4 / (points - 1) ** 2)


def test_the_shape_of_a_slope_and_of_a_plain():
    slope, plain = (
        measure_ruggedness(torch.arange(9.0).view(3, 3)),
        measure_ruggedness(torch.ones(5, 5)),
    )
    assert (slope["roughness"], slope["local_minima"]) == (0, 1)
    assert (plain["relative_roughness"], plain["local_minima"]) == (0, 0)


def test_local_minima_look_at_diagonal_neighbours():
    losses = torch.tensor([[0.0, 3, 3, 1], [3, 3, 2, 3], [3, 3, 3, 3], [1, 3, 3, 2.5]])
    assert measure_ruggedness(losses)["local_minima"] == 4  # (1, 2) has the lower (0, 3) beside it


@pytest.mark.parametrize("kind", ["lsq4", "ptq4", "signed", "inputs"])
def test_stored_scales_are_multiplied(kind):
    net = net_of(kind)
    by_hand = copy.deepcopy(net)
    move = random_plane(net, ["blocks.0.mlp.fc1.weight"], 3)
    quantizer = by_hand.blocks[0].mlp.fc1.weight_quantizer
    scale = getattr(quantizer, "quantizer", quantizer).scale.detach()
    quantizer.set_scale(scale * (1 + (0.1 * draws(scale.shape, 6) - 0.05 * draws(scale.shape, 7))))
    with move(0.1, -0.05):
        moved = tiny.logits(net)
    assert_close(moved, tiny.logits(by_hand), rtol=0, atol=1e-6)
    assert not torch.equal(moved, tiny.logits(net))


def test_scales_that_are_read_off_a_weight_are_multiplied_where_the_target_is():
    net = net_of("ofq2")
    layer, attention = net.blocks[0].mlp.fc1, net.blocks[1].attn
    with random_plane(net, ["mlp.fc1.weight"], 0)(0.2, 0.0), torch.no_grad():
        scale = layer.weight_quantizer.scale_of(layer.weight) * (
            1 + 0.2 * draws(layer.weight.shape[0], 0).unsqueeze(1)
        )
        assert_close(
            layer.weight_quantizer(layer.weight),
            statsq_with_scale(layer.weight, scale, 2),
            rtol=0,
            atol=1e-7,
        )
        assert torch.equal(
            attention.qk_quantizer(attention.latent("qk")),
            qat.functional.statsq(attention.latent("qk"), 2),
        )


@pytest.mark.parametrize("kind", ["ofq2", "lsq2", "minmax", "ptq4", "corrected"])
def test_a_net_comes_back_bit_for_bit(kind):
    net = net_of(kind)
    before, expected = state(net), tiny.logits(net)
    move = random_plane(net, ["*"], 0)
    with move(0.0, 0.0):
        assert torch.equal(tiny.logits(net), expected)
    with move(0.1, -0.1):
        assert not torch.equal(tiny.logits(net), expected)
    assert is_as_before(net, before)
    with pytest.raises(RuntimeError, match="in the middle"), move(0.1, -0.1):
        raise RuntimeError("in the middle")
    assert is_as_before(net, before)


def test_losses_on_the_grid_are_cross_entropies_there():
    net, images = net_of("ptq4"), image_set(n=8, batch=8)
    before, targets = state(net), ["attn.*.weight", "mlp.*.weight"]
    outcome = Landscape(points=3, radius=0.2, targets=targets).run([studied(net)], images)
    rows = outcome.tables[0].rows
    assert [(row["x"], row["y"]) for row in rows] == [
        (x, y) for y in (-0.2, 0, 0.2) for x in (-0.2, 0, 0.2)
    ]
    move, ((x, target),) = random_plane(net, targets, 0), images.batches
    for row in rows:
        with move(row["x"], row["y"]):
            assert row["loss"] == pytest.approx(
                float(F.cross_entropy(tiny.logits(net, x), target)), rel=1e-6
            )
    assert is_as_before(net, before)
    assert outcome.summary["net"]["centre"] == rows[4]["loss"]
    assert outcome.summary["net"]["highest"] == max(row["loss"] for row in rows)
    (drawing,) = outcome.drawings
    assert f"net: {rows[4]['loss']:.4f} in the middle" in drawing.alt


def test_infonce_is_to_the_nets_own_float_logits():
    net, images = net_of("ptq3"), image_set(n=8, batch=8)
    rows = Landscape(points=3, loss="infonce").run([studied(net)], images).tables[0].rows
    x = images.batches[0][0]
    assert rows[4]["infonce"] == pytest.approx(
        float(info_nce(tiny.logits(net, x), tiny.logits(tiny.vit(), x))), rel=1e-5
    )
    assert len({row["infonce"] for row in rows}) > 1


@pytest.mark.parametrize("net", [tiny.vit, lambda: net_of("ofq2")], ids=["float", "quantized"])
def test_nets_that_a_plane_does_not_fit(net):
    with usage_error(r"^analysis.targets=\['conv\*'\]: must match "):
        random_plane(net(), ["conv*"], 0)
