"""`analysis=weights`. Oracle: quantizers themselves, tensors made so that one thing is wrong with them, the net before."""

import json

import pytest
import torch

import qat
from qat.analysis import write_outcome
from qat.analysis.weights import WeightAnalysis
from qat.analysis.weights.activation_stats import activation_stats, look
from qat.analysis.weights.advice import advice
from qat.analysis.weights.weight_stats import Master, masters, weight_stats
from qat.errors import UsageError
from qat.quantizers import Affine
from qat.spec import QuantSpec
from tests import tiny
from tests.analysis.common import KINDS, image_set, is_as_before, net_of, state, studied
from tests.analysis.weights.test_weight_stats import lsq

NAMES = {"weights_histograms", "weights_codes", "weights_kurtosis"}


def outcome(net, images=None, **settings):
    analysis = WeightAnalysis(**settings)
    if images is not None:
        assert analysis.points([studied(net)], images) == []
    return analysis.outcome([studied(net)], [])


def table(found, name):
    (rows,) = [t.rows for t in found.tables if t.name == name]
    return rows


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_net(kind):
    net = net_of(kind)
    before = state(net)
    found = outcome(net, image_set())
    assert is_as_before(net, before)
    assert not net.training
    weights = [s for s in qat.iter_quantizers(net) if s.is_weight and s.quantizer.spec.bits < 32]
    assert found.summary["net"]["quantized_weights"] == sum(s.latent().numel() for s in weights)
    assert {d.name for d in found.drawings} == NAMES
    assert all("nan" not in drawing.alt for drawing in found.drawings)


def test_what_is_written(tmp_path):
    found = outcome(net_of("ofq2"), image_set())
    write_outcome(tmp_path, "weights", {}, found)
    index = json.loads((tmp_path / "weights.json").read_text())
    assert all((tmp_path / entry["png"]).stat().st_size > 5000 for entry in index["figures"])
    assert {entry["file"] for entry in index["tables"]} == {"weights.csv", "weights_codes.csv", "weights_activations.csv"}
    lines = (tmp_path / "weights.csv").read_text().splitlines()
    assert len(lines) == 1 + found.summary["net"]["tensors"]


def test_a_float_net_has_histograms_and_kurtosis_alone():
    found = outcome(tiny.vit(), image_set())
    assert {d.name for d in found.drawings} == {"weights_histograms", "weights_kurtosis"}
    assert [t.name for t in found.tables] == ["weights"]
    assert "SNR (dB)" not in table(found, "weights")[0]


def test_nets_of_different_kinds_beside_each_other():
    nets = [studied(net_of("ofq2"), "two"), studied(tiny.vit(), "float"), studied(net_of("ptq4"), "ptq")]
    found = WeightAnalysis(activation_images=0).outcome(nets, [])
    assert len({d.name for d in found.drawings}) == len(found.drawings) == 3 + 2 + 1
    assert {row["net"] for row in table(found, "weights")} == {"two", "float", "ptq"}
    assert set(found.summary) == {"two", "float", "ptq"}


def test_usage_of_codes_adds_up():
    rows = table(outcome(net_of("ofq2")), "weights_codes")
    sums = {}
    for row in rows:
        key = row["layer"], row["role"]
        sums[key] = sums.get(key, 0) + row["share, %"]
    assert all(value == pytest.approx(100, abs=0.01) for value in sums.values())
    assert len([r for r in rows if r["layer"] == "blocks.0.mlp.fc1"]) == 4
    assert all(r["share, %"] > 0 for r in rows if r["bits"] == 8)


def test_globs_choose_the_histograms():
    found = outcome(net_of("ofq2"), layers=["blocks.1.*"], max_panels=2)
    (drawing,) = [d for d in found.drawings if d.name == "weights_histograms"]
    assert "blocks.1.attn (qk): 2 bit" in drawing.alt
    assert "blocks.0" not in drawing.alt
    assert drawing.alt.count("SNR") == 2


def test_without_globs_ends_and_sharpest_are_drawn():
    net = net_of("ofq2")
    with torch.no_grad():
        net.blocks[1].mlp.fc2.weight[0, 0] = 1000.0
    found = outcome(net, max_panels=4)
    (drawing,) = [d for d in found.drawings if d.name == "weights_histograms"]
    assert all(f"{name}: " in drawing.alt for name in ("patch_embed.proj", "blocks.1.mlp.fc2", "head"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": [1]}, "analysis.layers=[1]: must be a list of globs such as blocks.0.*"),
        ({"max_panels": 0}, "analysis.max_panels=0: must be an integer of at least 1"),
        ({"boundary": 0.5}, "analysis.boundary=0.5: must be a number above 0 to below 0.5"),
        ({"activation_images": -1}, "analysis.activation_images=-1: must be an integer of at least 0"),
    ],
)
def test_mistakes_are_one_line(settings, message):
    with pytest.raises(UsageError) as error:
        WeightAnalysis(**settings)
    assert str(error.value) == message


def test_a_glob_that_matches_nothing_is_a_mistake():
    with pytest.raises(UsageError, match=r"analysis.layers: 'block.*' matches no layer with weights; patterns see names like 'head'"):
        outcome(net_of("ofq2"), layers=["block.*"])


def test_a_glob_may_match_in_one_of_the_nets_alone():
    nets = [studied(net_of("ofq2"), "qkr"), studied(net_of("noqkr"), "plain")]
    found = WeightAnalysis(activation_images=0, layers=["blocks.*.attn.qkv"]).outcome(nets, [])
    (drawing,) = [d for d in found.drawings if d.name.startswith("weights_histograms")]
    assert drawing.name == "weights_histograms_2"
    assert all(f"blocks.{i}.attn.qkv: " in drawing.alt for i in (0, 1))
    with pytest.raises(UsageError, match=r"analysis.layers: 'block.*' matches no layer"):
        WeightAnalysis(activation_images=0, layers=["block.*"]).outcome(nets, [])


def test_without_images_activations_have_what_their_quantizers_say():
    assert WeightAnalysis(activation_images=0).split is None
    assert WeightAnalysis().split == "train"
    found = WeightAnalysis(activation_images=0).outcome([studied(net_of("ofq2"), "net")], [])
    (table,) = [t for t in found.tables if t.name == "weights_activations"]
    assert {row["quantizer"] for row in table.rows} == {"lsq"}


@torch.no_grad()
def test_activation_codes_are_those_of_the_quantizers():
    net, images = net_of("ofq2"), image_set()
    seen = look(net, [batch for batch, _ in images.batches])
    expected = {}
    site = tiny.sites(net)["blocks.0.attn.input_quantizer"]
    hook = site.quantizer.register_forward_pre_hook(lambda m, args: expected.setdefault("x", []).append(args[0]))
    for batch, _ in images.batches:
        net(batch)
    hook.remove()
    codes = torch.cat([site.quantizer.codes(x).flatten() for x in expected["x"]])
    values = torch.cat([x.flatten() for x in expected["x"]])
    found = seen[site.name]
    assert found.counts.tolist() == [int((codes == code).sum()) for code in range(-2, 2)]
    assert (float(found.lowest), float(found.highest)) == (float(values.min()), float(values.max()))
    step = site.quantizer.quantizer.scale.view(1, -1, 1)
    places = torch.cat([(x + site.quantizer.offset_before).div(step).flatten() for x in expected["x"]])
    assert found.clipped_share == pytest.approx(float(((places < -2.5) | (places > 1.5)).float().mean()))


def test_only_so_many_images_are_looked_at():
    net, images = net_of("ofq2"), image_set(n=16, batch=6)
    analysis = WeightAnalysis(activation_images=8)
    analysis.points([studied(net)], images)
    image = next(s for s in qat.iter_quantizers(net) if s.role == "image")
    assert int(analysis._seen["net"][image.name].counts.sum()) == 8 * 64


@torch.no_grad()
def test_represented_ranges():
    net = net_of("ofq2")
    quantizer = tiny.sites(net)["blocks.0.mlp.fc1.input_quantizer"].quantizer
    quantizer.quantizer.start.fill_(0.5)
    quantizer.quantizer.start[0] = 1.0
    quantizer.offset_before.zero_()
    quantizer.offset_before[0] = 0.25
    found = {s.site: s for s in activation_stats(net, {})}["blocks.0.mlp.fc1.input_quantizer"]
    assert found.represents == (-2.25, 1.0)
    assert (found.step, found.before, found.seen) == ((0.5, 0.5, 1.0), 0.5, None)
    ptq = {s.site: s for s in activation_stats(net_of("ptq4"), {})}
    assert any(s.zero_point[1] > 0 for s in ptq.values())


def told(net, label="net", seen=None):
    weights = [weight_stats(m, 0.005) for m in masters(net)]
    return advice(label, weights, activation_stats(net, seen or {}))


def about(found, words):
    return [entry for entry in found if words in entry.what]


@pytest.fixture
def net():
    """A 2-bit net whose learnable offsets are not zero."""
    made = net_of("ofq2")
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "offset" in name:
                parameter.fill_(0.1)
    return made


def tensor(net, name):
    """A parameter or a buffer."""
    return net.state_dict()[name]


def change(net, name, value):
    with torch.no_grad():
        parameter = tensor(net, name)
        parameter.copy_(value if isinstance(value, torch.Tensor) else torch.full_like(parameter, value))


def test_a_sound_net_gives_no_cause_to_worry(net):
    assert told(net) == []


def heavy(like):
    """Few large weights among small ones."""
    weight = 0.001 * torch.randn(like.shape, generator=torch.Generator().manual_seed(0))
    weight[:, 0] = 1.0
    return weight


@pytest.mark.parametrize(
    ("name", "value", "words", "where"),
    [
        ("blocks.0.mlp.fc1.weight", 0.5, "constant", "net: blocks.0.mlp.fc1"),
        ("blocks.1.mlp.fc2.weight", lambda w: torch.cat([w[:1] * 0, w[1:]]), "dead channels", "net: blocks.1.mlp.fc2"),
        ("head.weight_quantizer.start", lambda s: torch.cat([s[:1] * 0, s[1:]]), "a step of zero", "net: head"),
        ("head.weight_quantizer.start", lambda s: torch.cat([s[:1] * 50, s[1:]]), "times the median one", "net: head"),
        ("head.weight_quantizer.start", 1e-3, "saturated", "net: head"),
        ("head.weight_quantizer.start", 1e-3, "at the two end codes", "net: head"),
        ("blocks.1.mlp.fc1.weight", heavy, "a kurtosis of up to", "net: blocks.1.mlp.fc1"),
        ("blocks.0.mlp.fc1.input_quantizer.offset_after", 0.0, "offset that is zero", "net: blocks.0.mlp.fc1.input_quantizer"),
        ("blocks.0.mlp.fc1.input_quantizer.quantizer.start", 0.0, "a step of zero or below", "net: blocks.0.mlp.fc1.input_quantizer"),
    ],
)
def test_each_thing_that_is_wrong_is_told(net, name, value, words, where):
    assert about(told(net), words) == []
    value = value(tensor(net, name)) if callable(value) else value
    change(net, name, value)
    (entry,) = about(told(net), words)
    assert where.removeprefix("net: ") in entry.where
    assert entry.advice


def one(weight, quantizer):
    return advice("net", [weight_stats(Master("fc", "weight", weight, quantizer), 0.005)], [])


def test_weights_farther_off_than_zeros_are_told():
    quantizer = Affine(QuantSpec("weight", "affine", 2, signed=False, axis=0))
    quantizer.scale, quantizer.zero_point = torch.ones(4), torch.zeros(4)
    weight = torch.linspace(-1, 1, 400).view(100, 4).T
    assert about(one(weight, quantizer), "than zeros would be") == []
    quantizer.zero_point -= 3  # levels from 3 to 6
    (entry,) = about(one(weight, quantizer), "than zeros would be")
    assert entry.where == "net: fc"


def test_codes_that_need_fewer_bits_are_told():
    weight = torch.randn(100, 100, generator=torch.Generator().manual_seed(0))
    assert about(one(weight, lsq(*[0.1] * 100, bits=8)), "entropy") == []
    (entry,) = about(one(weight, lsq(*[1.0] * 100, bits=8)), "entropy")
    # log2 of sqrt(2 pi e) = 2.05 bits, that of normal weights in steps of their deviation.
    assert entry.what == "the entropy of the codes is up to 5.9 bits below their width"


def test_empty_levels_of_few_bits_are_told():
    weight = torch.rand(10, 100, generator=torch.Generator().manual_seed(0)) - 0.5
    (entry,) = about(one(weight, lsq(*[0.5] * 10)), "levels are empty")
    assert entry.what == "at 4 bits or fewer, up to 25 % of the levels are empty"  # -2 of -2 .. 1


def test_an_offset_behind_keys_cannot_matter():
    net = net_of("noqkr")
    assert about(told(net), "cannot matter") == []
    quantizer = net.blocks[0].attn.k_quantizer
    quantizer.offset_after = torch.nn.Parameter(torch.ones(32))
    (entry,) = about(told(net), "cannot matter")
    assert entry.where == "net: blocks.0.attn.k_quantizer"


def test_clipped_activations_are_told(net):
    change(net, "blocks.0.attn.proj.input_quantizer.quantizer.start", 1e-3)
    seen = look(net, [tiny.images()])
    (entry,) = about(told(net, seen=seen), "are clipped")
    assert entry.where.startswith("net: blocks.0.attn.proj.input_quantizer")
    assert about(told(net), "are clipped") == []


def test_many_layers_are_one_entry():
    (entry,) = about(told(net_of("ofq2"), "run"), "offset that is zero")
    first, rest = entry.where.split(" and ")
    assert first.startswith("run: ")
    assert first.count(",") == 2
    assert rest.endswith(" more")
