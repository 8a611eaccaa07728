"""Loss on a plane. Oracle: closed forms on toys, nets whose scales were multiplied by hand, infoNCE computed here."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import qat
from qat.analysis.landscape.directions import has_both, scale_axes, weight_axes
from qat.analysis.landscape.landscape import ALL_WEIGHTS, ATTENTION_AND_MLP, Landscape
from qat.analysis.landscape.ruggedness import grid_of_rows, local_minima, ordered, positions, shape_of
from qat.analysis.ledger import Ledger
from qat.analysis.runner import measure
from qat.errors import UsageError
from qat.functional.infonce import info_nce
from qat.functional.statsq import statsq_with_scale
from qat.ptq.vector import stored_scale
from tests import tiny
from tests.analysis.common import image_set, is_as_before, net_of, state, studied
from tests.analysis.sensitivity.test_parts import resnet

ALL = (("*",), ("*",))


def rows_of(analysis, nets, folder):
    images = image_set(n=8, batch=8)
    return list(measure(analysis.points(nets, images), images, Ledger(folder, "inputs", resume=False)))


def bowl(points, radius=1.0):
    places = torch.tensor(positions(points, radius), dtype=torch.float64)
    return places.square().unsqueeze(1) + places.square()


def test_positions_are_even_and_zero_is_among_them():
    assert positions(5, 0.1) == [-0.1, -0.05, 0.0, 0.05, 0.1]
    assert positions(3, 2.0) == [-2.0, 0.0, 2.0]


@pytest.mark.parametrize("points", [3, 5, 7, 21])
def test_the_shape_of_a_bowl(points):
    shape = shape_of(bowl(points))
    assert (shape.centre, shape.lowest, shape.highest, shape.local_minima) == (0.0, 0.0, 2.0, 1)
    step = 2 / (points - 1)
    assert shape.roughness == pytest.approx(2 * step**2)
    assert shape.relative_roughness == pytest.approx(4 / (points - 1) ** 2)


def test_the_shape_of_a_slope_and_of_a_plain():
    slope = torch.arange(9.0, dtype=torch.float64).view(3, 3)
    assert (shape_of(slope).roughness, shape_of(slope).local_minima) == (0.0, 1)
    plain = shape_of(torch.ones(5, 5, dtype=torch.float64))
    assert (plain.relative_roughness, plain.local_minima) == (0.0, 0)


def test_local_minima_look_at_diagonal_neighbours():
    losses = torch.tensor([[0.0, 3, 3, 1], [3, 3, 2, 3], [3, 3, 3, 3], [1, 3, 3, 2.5]])
    # (1, 2) has the lower (0, 3) beside it.
    assert local_minima(losses) == 4


@pytest.mark.parametrize("points", [3, 5, 9, 15, 21])
def test_every_point_is_evaluated_once_coarse_grids_first(points):
    order = ordered(points)
    assert sorted(order) == [(i, j) for i in range(points) for j in range(points)]
    half = points // 2
    assert set(order[:9]) == {(i, j) for i in (0, half, 2 * half) for j in (0, half, 2 * half)}


def test_what_is_there_is_the_finest_full_grid():
    places = positions(9, 1.0)
    rows = [{"x": places[i], "y": places[j], "loss": 10 * places[j] + places[i]} for i, j in ordered(9)]
    assert grid_of_rows(rows[:8], 9, 1.0, "loss") is None
    for count, side in ((9, 3), (24, 3), (25, 5), (80, 5), (81, 9)):
        found, losses = grid_of_rows(rows[:count], 9, 1.0, "loss")
        assert len(found) == side
        assert losses[0, -1] == pytest.approx(-10 + 1)  # rows are y, columns x


class Toy(nn.Module):
    """Two layers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(3, 5), nn.Linear(5, 2)


def test_a_plane_of_weights_is_filter_normalised_and_flat():
    net = Toy()
    axes = weight_axes(net, (("*",), ("second.weight",)), 0)
    origin = state(net)
    with axes.move(1.0, 0.0):
        first = {name: t - origin[name] for name, t in state(net).items()}
    with axes.move(0.0, 1.0):
        second = {name: t - origin[name] for name, t in state(net).items()}
    for name in ("first.weight", "second.weight"):
        assert_close(first[name].norm(dim=1), origin[name].norm(dim=1))
    assert_close(second["second.weight"].norm(dim=1), origin["second.weight"].norm(dim=1))
    assert not any(second[name].any() for name in ("first.weight", "first.bias", "second.bias"))
    assert not any(first[name].any() for name in ("first.bias", "second.bias"))
    with axes.move(-0.3, 0.7):
        for name, tensor in net.state_dict().items():
            assert_close(tensor, origin[name] - 0.3 * first[name] + 0.7 * second[name])
        # The quadratic form of a toy whose loss is |W|^2 / 2.
        loss = 0.5 * sum(t.square().sum() for t in (net.first.weight, net.second.weight))
    w, a, b = (torch.cat([d["first.weight"].flatten(), d["second.weight"].flatten()]) for d in (origin, first, second))
    expected = 0.5 * (w @ w + 0.09 * a @ a + 0.49 * b @ b) - 0.3 * w @ a + 0.7 * w @ b - 0.21 * a @ b
    assert_close(loss.detach(), expected)
    assert is_as_before(net, origin)


def test_directions_of_folded_queries_and_keys_have_the_lengths_of_their_rows():
    net = net_of("ofq2")
    axes = weight_axes(net, (("attn.qk",), ("attn.v.weight",)), 0)
    assert axes.names == (("blocks.0.attn.qk", "blocks.1.attn.qk"), ("blocks.0.attn.v.weight", "blocks.1.attn.v.weight"))
    attention = net.blocks[0].attn
    before = [attention.q_weight.detach().clone(), attention.k_weight.detach().clone()]
    with axes.move(1.0, 0.0):
        for now, then in zip((attention.q_weight, attention.k_weight), before, strict=True):
            assert_close((now.detach() - then).norm(dim=1), then.norm(dim=1))


@pytest.mark.parametrize("kind", ["lsq4", "ptq4", "signed", "inputs"])
def test_stored_scales_are_multiplied(kind):
    net = net_of(kind)
    by_hand = copy.deepcopy(net)
    globs = ("attn.*.weight", "attn.proj.input")
    axes = scale_axes(net, tiny.SIZE, (globs, globs), seed=3)
    draws = [torch.Generator().manual_seed(2 * 3 + number) for number in (0, 1)]
    sites = {f"{site.name.rpartition('.')[0]}.{site.role}": site for site in qat.iter_quantizers(by_hand)}
    for name in axes.names[0]:
        scale = stored_scale(sites[name].quantizer)
        one, two = (2 * torch.rand(scale.shape, generator=generator) - 1 for generator in draws)
        inner = getattr(sites[name].quantizer, "quantizer", sites[name].quantizer)
        inner.set_scale(scale.detach() * (1 + (0.1 * one - 0.05 * two)))
    with axes.move(0.1, -0.05):
        assert_close(tiny.logits(net), tiny.logits(by_hand), rtol=0, atol=1e-6)
        moved = tiny.logits(net)
    assert not torch.equal(moved, tiny.logits(net))
    assert any(name.endswith("input") for name in axes.names[0])


def test_scales_that_are_read_off_a_weight_are_multiplied():
    net = net_of("ofq2")
    axes = scale_axes(net, tiny.SIZE, (("mlp.fc1.weight",), ("attn.qk",)), seed=0)
    layer = net.blocks[0].mlp.fc1
    factor = 1 + 0.2 * (2 * torch.rand(layer.weight.shape[0], generator=torch.Generator().manual_seed(0)) - 1)
    with axes.move(0.2, 0.0), torch.no_grad():
        found = layer.weight_quantizer(layer.weight)
        expected = statsq_with_scale(layer.weight, layer.weight_quantizer.scale_of(layer.weight) * factor.unsqueeze(1), 2)
        assert_close(found, expected, rtol=0, atol=1e-7)
        assert torch.equal(net.blocks[1].attn.qk_quantizer(net.blocks[1].attn.latent("qk")), qk_of(net))
    assert axes.names == (("blocks.0.mlp.fc1.weight", "blocks.1.mlp.fc1.weight"), ("blocks.0.attn.qk", "blocks.1.attn.qk"))


@pytest.mark.parametrize(("name", "members"), [("blocks.0.residual", ["residual1", "residual2"]), ("output", ["tokens", "positions"])])
def test_all_quantizers_of_one_module_and_role_move(name, members):
    net = net_of("ptq4")
    before, owner = state(net), net.blocks[0] if name.startswith("blocks") else net
    scales = [getattr(owner, f"{member}_quantizer").scale for member in members]
    expected = torch.cat(scales)
    expected *= 1 + 0.2 * (2 * torch.rand(len(expected), generator=torch.Generator().manual_seed(0)) - 1)
    with scale_axes(net, tiny.SIZE, ((name,), ("head.input",)), seed=0).move(0.2, 0.0):
        assert torch.equal(torch.cat(scales), expected)
    assert is_as_before(net, before)


@pytest.mark.parametrize("change", [0.7, -0.7])
def test_relative_steps_move_by_the_factor_asked_for_however_far_they_have_grown(change):
    net = net_of("lsq4")
    quantizer = net.blocks[0].mlp.fc1.input_quantizer
    with torch.no_grad():
        quantizer.start.fill_(quantizer.unit / 4)
        quantizer.change.fill_(change)
    before, scale = state(net), quantizer.scale.detach().clone()
    axes = scale_axes(net, tiny.SIZE, (("blocks.0.mlp.fc1.input",), ("blocks.1.mlp.fc1.input",)), seed=0)
    factor = 1 + 0.4 * (2 * torch.rand(scale.shape, generator=torch.Generator().manual_seed(0)) - 1)
    with axes.move(0.4, 0.0):
        assert torch.equal(quantizer.scale, scale * factor)
    assert is_as_before(net, before)


def qk_of(net):
    attention = net.blocks[1].attn
    return qat.functional.statsq(attention.latent("qk"), 2)


@pytest.mark.parametrize("kind", ["ofq2", "lsq2", "minmax", "ptq4", "corrected"])
@pytest.mark.parametrize("space", ["scales", "weights"])
def test_a_net_comes_back_bit_for_bit(kind, space):
    net = net_of(kind)
    before, expected = state(net), tiny.logits(net)
    axes = scale_axes(net, tiny.SIZE, ALL, 0) if space == "scales" else weight_axes(net, ALL, 0)
    with axes.move(0.0, 0.0):
        assert torch.equal(tiny.logits(net), expected)
    with axes.move(0.1, -0.1):
        assert not torch.equal(tiny.logits(net), expected)
    assert is_as_before(net, before)
    for away in (0.0, 0.1):
        with pytest.raises(RuntimeError, match="in the middle"), axes.move(away, 0.1):
            raise RuntimeError("in the middle")
        assert is_as_before(net, before)


def test_directions_depend_on_the_seed_alone():
    moved = []
    for seed in (0, 0, 1):
        axes = weight_axes(tiny.vit(), ALL, seed)
        with axes.move(0.5, 0.5):
            moved.append(tiny.logits(axes.net))
    assert torch.equal(moved[0], moved[1])
    assert not torch.equal(moved[0], moved[2])


def test_losses_on_the_grid_are_cross_entropies_there(tmp_path):
    net, images = net_of("ptq4"), image_set(n=8, batch=8)
    before = state(net)
    analysis = Landscape(side=3, radius=0.2)
    rows = rows_of(analysis, [studied(net)], tmp_path)
    assert len(rows) == 9
    axes = scale_axes(net, tiny.SIZE, ATTENTION_AND_MLP, 0)
    (x, target), *_ = images.batches
    for row in rows:
        with axes.move(row["x"], row["y"]):
            assert row["loss"] == pytest.approx(float(F.cross_entropy(tiny.logits(net, x), target)), rel=1e-6)
    assert is_as_before(net, before)
    outcome = analysis.outcome([studied(net)], rows)
    assert outcome.summary["directions"] == ["attention", "MLP"]
    middle = next(row for row in rows if (row["x"], row["y"]) == (0, 0))
    assert outcome.summary["net"]["centre"] == middle["loss"]
    assert outcome.summary["net"]["highest"] == max(row["loss"] for row in rows)


def test_infonce_is_to_the_nets_own_float_logits(tmp_path):
    net, images = net_of("ptq3"), image_set(n=8, batch=8)
    rows = rows_of(Landscape(side=3, loss="infonce", temperature=0.5), [studied(net)], tmp_path)
    x = images.batches[0][0]
    middle = next(row for row in rows if (row["x"], row["y"]) == (0, 0))
    assert middle["infonce"] == pytest.approx(float(info_nce(tiny.logits(net, x), tiny.logits(tiny.vit(), x), 0.5)), rel=1e-5)
    assert {row["infonce"] for row in rows} != {middle["infonce"]}
    outcome = Landscape(side=3, loss="infonce").outcome([studied(net)], rows)
    assert outcome.summary["net"]["centre"] == middle["infonce"]
    assert "infoNCE" in outcome.drawings[0].title


def test_compared_nets_move_alike_and_stand_on_one_range(tmp_path):
    nets = [studied(net_of("inputs"), "vit"), studied(resnet(), "cnn")]
    analysis = Landscape(side=3)
    rows = rows_of(analysis, nets, tmp_path)
    outcome = analysis.outcome(nets, rows)
    assert outcome.summary["directions"] == ["all weights, direction 1", "all weights, direction 2"]
    contours, surfaces = outcome.drawings
    first, second = surfaces.figure.axes
    assert first.get_zlim() == second.get_zlim()
    rises = []
    for label in ("vit", "cnn"):
        shape = outcome.summary[label]
        rises += [shape["lowest"] - shape["centre"], shape["highest"] - shape["centre"]]
        assert f"{label} (loss {shape['centre']:.4f} in the middle)" in contours.alt
    assert (min(rises), max(rises)) == pytest.approx(first.get_zlim())


def test_targets():
    net = net_of("ofq2")
    assert has_both(net, ATTENTION_AND_MLP)
    assert not has_both(resnet(), ATTENTION_AND_MLP)
    analysis = Landscape(side=3, targets=[["attn.qk", "attn.*.weight"], "mlp.fc1.weight"])
    assert analysis._targets([studied(net)]) == (("attn.qk", "attn.*.weight"), ("mlp.fc1.weight",))
    assert Landscape(targets=["head.weight"])._targets([]) == (("head.weight",), ("head.weight",))
    assert Landscape(space="weights")._targets([studied(net)]) == (ALL_WEIGHTS, ALL_WEIGHTS)


@pytest.mark.parametrize("part", ["attn", "mlp"])
def test_all_weights_move_where_those_of_attention_or_mlp_are_float(part):
    net = tiny.quantized("ofq_noqkr", bits=4, overrides={f"*.{part}*": {"weight_quantizer": "float"}})
    other = "mlp.fc1" if part == "attn" else "attn.proj"
    assert not has_both(net, ATTENTION_AND_MLP)
    assert Landscape()._targets([studied(net)]) == (ALL_WEIGHTS, ALL_WEIGHTS)
    first, second = scale_axes(net, tiny.SIZE, (ALL_WEIGHTS, ALL_WEIGHTS), 0).names
    assert first == second
    assert f"blocks.0.{other}.weight" in first
    assert not any(f".{part}." in name for name in first)


@pytest.mark.parametrize("count", [0, 5, 9, 24, 30])
def test_an_interrupted_run_shows_what_it_has(tmp_path, count):
    net = net_of("ptq4")
    analysis = Landscape(side=5)
    rows = rows_of(analysis, [studied(net)], tmp_path)[:count]
    outcome = analysis.outcome([studied(net)], rows)
    assert bool(outcome.drawings) == (count >= 9)
    assert bool(outcome.warnings) == (count < 9)
    if count >= 9:
        assert outcome.summary["net"]["points along a direction"] == (5 if count >= 25 and len(rows) == 25 else 3)


def test_a_loss_that_is_no_number_is_named():
    rows = [
        {"net": "net", "x": x, "y": y, "loss": float("nan") if x > 0 else 1.0 + y} for x in positions(3, 0.1) for y in positions(3, 0.1)
    ]
    outcome = Landscape(side=3).outcome([studied(net_of("ptq4"))], rows)
    assert [warning.what for warning in outcome.warnings] == ["the loss is not finite somewhere"]
    assert len(outcome.drawings) == 2


def test_scales_of_quantizers_that_nobody_knows_stay(tmp_path):
    rules = {"blocks.0.mlp.fc1": {"weight_quantizer": "tests.analysis.sensitivity.test_sensitivity:Doubling"}}
    net = qat.convert(tiny.vit(), qat.recipe("statsq", bits=4, overrides=rules), input_size=tiny.SIZE)
    qat.initialize_scales(net, [tiny.images()])
    analysis = Landscape(side=3)
    outcome = analysis.outcome([studied(net)], rows_of(analysis, [studied(net)], tmp_path))
    assert [warning.where for warning in outcome.warnings] == ["net: blocks.0.mlp.fc1"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"space": "inputs"}, "analysis.space='inputs': must be one of scales, weights"),
        ({"loss": "mse"}, "analysis.loss='mse': must be one of ce, infonce"),
        ({"side": 4}, "analysis.points=4: must be odd numbers, so that the net as it is lies in the middle"),
        ({"side": 1}, "analysis.points=1: must be an integer of at least 3"),
        ({"radius": 0.5}, "analysis.radius=0.5: must be a number above 0 to below 0.5"),
        ({"radius": 0, "space": "weights"}, "analysis.radius=0: must be a number above 0"),
        ({"seed": -1}, "analysis.seed=-1: must be an integer of at least 0"),
        ({"targets": "attn.*"}, "analysis.targets='attn.*': must be a list of one or two entries, each a glob or a list of globs"),
        ({"targets": [[], "b"]}, "analysis.targets=[[], 'b']: must be a list of one or two entries, each a glob or a list of globs"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(UsageError) as error:
        Landscape(**settings)
    assert str(error.value) == message


def test_nets_that_a_plane_does_not_fit():
    images = image_set()
    with pytest.raises(UsageError, match=r"analysis.space='scales': net is not quantized and has none; must be weights"):
        Landscape().points([studied(tiny.vit())], images)
    with pytest.raises(UsageError, match=r"analysis.targets=\['conv.*'\]: no scale has such a name; they are patch_embed.proj.weight,"):
        Landscape(targets=["conv*"]).points([studied(net_of("ofq2"))], images)
    with pytest.raises(UsageError, match=r"analysis.space='weights': the file holds integer codes alone; "):
        weight_axes(qat.freeze(net_of("ofq2")), (("*",), ("*",)), 0)
    with pytest.raises(UsageError, match=r"analysis.targets=\['conv.*'\]: no weight has such a name"):
        Landscape(targets=["mlp.*.weight", "conv*"], space="weights").points([studied(net_of("ofq2"))], images)
