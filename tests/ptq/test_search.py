"""The search as a whole: what it may change, what it promises of the fitness, what it refuses."""

import csv

import pytest
import torch
from torch import nn

import qat
from qat.errors import UsageError
from qat.ptq.drivers import DRIVERS
from qat.ptq.fitness import Evaluator, plain_fitness
from qat.ptq.search import search
from qat.ptq.search_settings import GRADIENT_METHODS, SearchSettings
from tests import tiny
from tests.ptq.searching import batches, changed, quantized, state

METHODS = tuple(DRIVERS)


def settings(**knobs):
    return SearchSettings(**{"passes": 2, "micro_batch": 3, "radius": 0.05, "relative": True, **knobs})


def lines(folder):
    with (folder / "search.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("method", METHODS)
def test_fitness_never_rises_and_only_the_chosen_scales_change(method, tmp_path):
    net, targets = quantized()
    before, modes = state(net), [m.training for m in net.modules()]
    result = search(net, batches(), targets, settings(method=method), run_dir=tmp_path)
    accepted = [float(line["fitness"]) for line in lines(tmp_path) if line["accepted"] == "1"]
    assert accepted == sorted(accepted, reverse=True)
    assert len(accepted) == result.accepted + 1
    assert result.accepted > 0
    assert result.fitness == accepted[-1] < result.fitness_before == accepted[0]
    chosen = {f"blocks.{b}.attn.{layer}.weight_quantizer.scale" for b in range(2) for layer in ("qkv", "proj")}
    assert set() < changed(before, net) <= chosen
    assert result.fitness == plain_fitness(net, batches(), targets, settings())
    assert [m.training for m in net.modules()] == modes
    assert not any("forward" in module.__dict__ for module in net.modules())
    assert not any(buffer.requires_grad for buffer in net.buffers())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_spends_the_same_number_of_forward_passes(method, monkeypatch):
    """Six cycles for each of two blocks. A gradient is a forward and a backward, which counts as one; one of twelve is left over."""
    net, targets = quantized()
    forwards, gradients = [], []
    monkeypatch.setattr(Evaluator, "fitness", _counted(Evaluator.fitness, forwards))
    monkeypatch.setattr(Evaluator, "gradient", _counted(Evaluator.gradient, gradients))
    result = search(net, batches(), targets, settings(method=method, passes=1, cycles=6))
    incumbent = 1
    spent = len(forwards) - incumbent + 2 * len(gradients)
    assert (spent, result.evaluations) == ((11, 5) if method in GRADIENT_METHODS else (12, 12))


@pytest.mark.parametrize("method", GRADIENT_METHODS)
def test_gradient_methods_move_all_blocks_and_go_on_from_where_they_are(method, tmp_path):
    """Two passes of five steps are ten steps on one way, which leads up at first: the radius is too large for an early success."""
    net, targets = quantized()
    before = state(net)
    search(net, batches(), targets, settings(method=method, cycles=6, radius=0.2), run_dir=tmp_path)
    once = [float(line["fitness"]) for line in lines(tmp_path)]
    assert {line["accepted"] for line in lines(tmp_path)} == {"0", "1"}
    assert len({name.split(".")[1] for name in changed(before, net)}) == 2
    net, targets = quantized()
    search(net, batches(), targets, settings(method=method, cycles=11, passes=1, radius=0.2), run_dir=tmp_path)
    alike = [float(line["fitness"]) for line in lines(tmp_path)]
    assert len(once) == len(alike) == 1 + 10
    assert once == alike


def test_deviates_from_reference_the_incumbent_is_measured_once(monkeypatch):
    net, targets = quantized()
    forwards = []
    monkeypatch.setattr(Evaluator, "fitness", _counted(Evaluator.fitness, forwards))
    search(net, batches(), targets, settings(passes=3))
    assert len(forwards) == 1 + 3 * 2 * 3


def _counted(function, calls):
    def wrapper(*args, **kwargs):
        calls.append(1)
        return function(*args, **kwargs)

    return wrapper


@pytest.mark.parametrize("fitness", ["mse", "kl", "cosine"])
def test_other_fitnesses(fitness):
    net, targets = quantized()
    result = search(net, batches(), targets, settings(fitness=fitness))
    assert result.fitness < result.fitness_before
    assert result.fitness == plain_fitness(net, batches(), targets, settings(fitness=fitness))


def test_deviates_from_reference_draws_depend_on_the_seed_alone():
    found = []
    for seed in (0, 0, 1):
        net, targets = quantized()
        torch.manual_seed(len(found))
        search(net, batches(), targets, settings(seed=seed))
        found.append(state(net))
    assert changed(found[0], _with(found[1])) == set()
    assert changed(found[0], _with(found[2])) != set()


def _with(values):
    net, _ = quantized()
    net.load_state_dict(values)
    return net


@pytest.mark.parametrize(
    ("preset", "knobs", "targets", "expected"),
    [
        ("minmax", {}, ["mlp.*.weight"], {"mlp.fc1.weight_quantizer", "mlp.fc2.weight_quantizer"}),
        ("minmax", {}, ["mlp.fc1.input", "attn.probs"], {"mlp.fc1.input_quantizer", "attn.probs_quantizer"}),
        ("lsq", {"weight_quantizer": "lsq"}, SearchSettings().targets, {"attn.qkv.weight_quantizer", "attn.proj.weight_quantizer"}),
        ("ofq", {"weight_quantizer": "lsq"}, SearchSettings().targets, {f"attn.{s}_quantizer" for s in ("qk", "v.weight", "proj.weight")}),
        ("ofq", {"weight_quantizer": "lsq"}, ["attn.v"], {"attn.v_quantizer.quantizer"}),
    ],
)
def test_targets(preset, knobs, targets, expected):
    net, logits = quantized(preset=preset, **knobs)
    before = state(net)
    search(net, batches(), logits, settings(targets=targets, passes=1, cycles=12, radius=0.02))
    places = {name.rpartition(".")[0] for name in changed(before, net)}
    assert places <= {f"blocks.{b}.{name}" for b in range(2) for name in expected}
    assert {place.split(".", 2)[2] for place in places} == expected


def test_deviates_from_reference_equal_losses_are_no_error():
    net, targets = quantized()
    before = state(net)
    result = search(net, batches()[:1], [torch.zeros_like(targets[0])], settings(fitness="infonce", passes=1))
    assert result.accepted == 0
    assert result.evaluations == 6
    assert changed(before, net) == set()


def test_no_pass_changes_nothing():
    net, targets = quantized()
    before = state(net)
    result = search(net, batches(), targets, settings(passes=0))
    assert (result.evaluations, result.fitness) == (0, result.fitness_before)
    assert changed(before, net) == set()


def test_reference_selection_keeps_what_validation_liked_and_says_so():
    net, targets = quantized()
    seen, accuracies = [], iter([50.0, 40.0, 45.0, 40.0])

    def validate():
        seen.append(state(net))
        return next(accuracies)

    result = search(net, batches(), targets, settings(reference_selection=True, cycles=10), validate=validate)
    assert result.selected_on == "validation"
    assert len(seen) == 4
    # During the first pass the latest stays, whatever its accuracy; 45 is more than 40.
    assert changed(seen[2], net) == set()
    assert changed(seen[0], net) != set()


def test_deviates_from_reference_no_validation_image_is_looked_at():
    net, targets = quantized()
    result = search(net, batches(), targets, settings(passes=1), validate=lambda: pytest.fail("validation images were looked at"))
    assert result.selected_on == "calibration"


def test_a_fitness_that_is_no_number_names_block_and_candidate():
    net, targets = quantized()
    before = state(net)

    def overflow(module, args, output):
        touched = not torch.equal(module.weight_quantizer.scale, before["blocks.0.attn.qkv.weight_quantizer.scale"])
        return output * float("nan") if touched else output

    handle = net.blocks[0].attn.qkv.register_forward_hook(overflow)
    with pytest.raises(UsageError, match=r"candidate 0 of block blocks\.0 in pass 0 is nan"):
        search(net, batches(), targets, settings(passes=1))
    handle.remove()
    assert not changed(before, net) & {"blocks.0.attn.qkv.weight_quantizer.scale", "blocks.0.attn.proj.weight_quantizer.scale"}
    with torch.no_grad():
        net.head.bias[0] = float("nan")
    with pytest.raises(UsageError, match="fitness of the incumbent is nan"):
        search(net, batches(), targets, settings(passes=1))


def test_what_cannot_be_searched():
    net, targets = quantized()
    with pytest.raises(UsageError, match=r"search.targets=\['nope'\]: no block has such a scale; stored scales are those of attn.k, "):
        search(net, batches(), targets, settings(targets=["nope"]))
    with pytest.raises(UsageError, match="3 batches of images and 2 of logits"):
        search(net, batches(), targets[:2], settings())
    with pytest.raises(
        UsageError, match=r"search\.fitness='infonce': a batch of one image has no others; must be ptq\.batch of at least 2"
    ):
        search(net, [batch[:1] for batch in batches()], [target[:1] for target in targets], settings())
    with pytest.raises(UsageError, match="reference_selection=True: validation images"):
        search(net, batches(), targets, settings(reference_selection=True))
    statsq, targets = quantized(preset="ofq_noqkr", weight_quantizer="statsq")
    with pytest.raises(UsageError, match=r"search.targets=\['attn\*.\*.weight', 'attn\*.qk'\]: no block has such a scale"):
        search(statsq, batches(), targets, settings())
    flat = qat.convert(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), qat.recipe("lsq"), input_size=tiny.SIZE)
    with pytest.raises(UsageError, match="no blocks; they are looked for in modules called 'blocks'"):
        search(qat.initialize_scales(flat, batches()), batches(), targets, settings())


def test_scales_that_were_never_filled():
    net = tiny.converted("minmax")
    with pytest.raises(UsageError, match="not initialised"):
        search(net, batches(), [torch.zeros(len(b), 10) for b in batches()], settings())


@pytest.mark.parametrize(
    ("knob", "value", "allowed"),
    [
        ("method", "annealing", "evolution, random, adam, sgd"),
        ("fitness", "accuracy", "infonce, mse, kl, cosine"),
        ("cycles", 0, "an integer of at least 1"),
        ("passes", -1, "an integer of at least 0"),
        ("temperature", 0, "a number above 0"),
        ("radius", 0, "a number above 0"),
        ("relative", "yes", "true or false"),
        ("racing", 1.5, "an integer of at least 0"),
        ("targets", [], "a list of globs"),
    ],
)
def test_settings_that_cannot_work(knob, value, allowed):
    with pytest.raises(UsageError, match=rf"search\.{knob}=.*must be (one of )?{allowed}"):
        SearchSettings(**{knob: value})


def test_gradient_methods_need_three_cycles():
    with pytest.raises(UsageError, match=r"search\.cycles=2: must be at least 3 with search\.method=adam"):
        SearchSettings(method="adam", cycles=2)


def test_settings_are_plain_data():
    chosen = settings(targets=["attn.qk"])
    assert SearchSettings(**chosen.to_dict()) == chosen
