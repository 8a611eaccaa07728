"""The search as a whole: what it may change, what it promises of the fitness, what it refuses; kills; other families."""

import csv
import dataclasses

import pytest
import torch
from torch import nn

import qat
from qat.model.sites import find_blocks
from qat.ptq.scale_vectors import scale_vectors
from qat.ptq.search import Evaluator, SearchSettings, logits_of, search
from qat.ptq.state import Progress
from tests import tiny
from tests.errors import usage_error
from tests.nets import FAMILIES
from tests.ptq.searching import batches, changed, quantized, state, whole_fitness

CHOSEN = {
    f"blocks.{b}.attn.{layer}.weight_quantizer.scale" for b in range(2) for layer in ("qkv", "proj")
}


def settings(**knobs):
    return SearchSettings(**{
        "passes": 2,
        "micro_batch": 3,
        "radius": 0.05,
        "relative": True,
        **knobs,
    })


def run(net, logits, folder=None, *, resume=False, validate=None, **knobs):
    return search(
        net, batches(), logits, settings(**knobs), run_dir=folder, resume=resume, validate=validate
    )


def lines(folder):
    with (folder / "search.csv").open() as file:
        return [{k: v for k, v in line.items() if k != "seconds"} for line in csv.DictReader(file)]


@pytest.mark.parametrize("fitness", ["infonce", "mse", "kl", "cosine"])
def test_deviates_from_reference_every_fitness_falls_and_only_the_chosen_scales_change(
    fitness, tmp_path
):
    net, targets = quantized()
    before, modes = state(net), [m.training for m in net.modules()]
    result = run(net, targets, tmp_path, fitness=fitness)
    found = lines(tmp_path)
    assert [(line["pass"], line["block"]) for line in found[1::3]] == [
        (p, f"blocks.{b}") for p in "01" for b in (1, 0)
    ]
    assert [line["cycle"] for line in found] == ["incumbent", *(["0", "1", "2"] * 4)]
    accepted = [float(line["fitness"]) for line in found if line["accepted"] == "1"]
    assert accepted == sorted(accepted, reverse=True)
    assert len(accepted) == result.accepted + 1 > 1
    assert result.fitness == accepted[-1] < result.fitness_before == accepted[0]
    assert set() < changed(before, net) <= CHOSEN
    assert result.fitness == whole_fitness(net, batches(), targets, settings(fitness=fitness))
    assert [m.training for m in net.modules()] == modes
    assert not any("forward" in module.__dict__ for module in net.modules())


def integer_norms():
    """Made for the step of the quantizer after it."""
    net = tiny.convert(tiny.vit(), qat.PtqRecipe(bits=4, layernorm="integer"))
    qat.ptq.calibrate(net, batches())
    return net.eval()


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("build", "knobs"),
    [
        *(
            (lambda: quantized()[0], {"micro_batch": m, "cache_gib": c})
            for m in (3, 100)
            for c in (4.0, 0.0)
        ),
        (integer_norms, {}),
        (integer_norms, {"targets": ["attn.qkv.input", "attn.qkv.weight"]}),
        (lambda: quantized(preset="ofq", weight_quantizer="lsq")[0], {"targets": ["attn.qk"]}),
    ],
)
def test_a_fitness_is_that_of_whole_forwards_bit_for_bit(build, knobs):
    net, targets = build(), quantized()[1]
    evaluator, seen = Evaluator(net, batches(), targets, settings(**knobs)), set()
    for block in reversed(evaluator.vectors):
        vector = evaluator.vectors[block]
        evaluator.fitness(block)
        scales = vector.read()
        noise = torch.rand(len(scales), generator=torch.Generator().manual_seed(0))
        vector.write(scales * (1 + 0.1 * noise))
        seen.add(evaluator.fitness(block))
        assert evaluator.fitness(block) == whole_fitness(net, batches(), targets, settings(**knobs))
        evaluator.runner.clear_cache()
    assert len(seen) == 2


def test_deviates_from_reference_the_incumbent_is_measured_once(monkeypatch):
    net, targets = quantized()
    forwards, fitness = [], Evaluator.fitness
    monkeypatch.setattr(Evaluator, "fitness", lambda *args: forwards.append(1) or fitness(*args))
    assert run(net, targets, passes=3).evaluations == len(forwards) - 1 == 3 * 2 * 3


def test_deviates_from_reference_draws_depend_on_the_seed_alone():
    found = []
    for seed in (0, 0, 1):
        net, targets = quantized()
        torch.manual_seed(len(found))
        run(net, targets, seed=seed)
        found.append((state(net), net))
    assert changed(found[0][0], found[1][1]) == set()
    assert changed(found[0][0], found[2][1]) != set()


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("preset", "knobs", "targets", "expected"),
    [
        (
            "minmax",
            {},
            ["mlp.fc1.input", "attn.probs"],
            {"mlp.fc1.input_quantizer", "attn.probs_quantizer"},
        ),
        (
            "ofq",
            {"weight_quantizer": "lsq"},
            SearchSettings().targets,
            {f"attn.{s}_quantizer" for s in ("qk", "v.weight", "proj.weight")},
        ),
        ("ofq", {"weight_quantizer": "lsq"}, ["attn.v"], {"attn.v_quantizer.quantizer"}),
    ],
)
def test_targets(preset, knobs, targets, expected):
    net, logits = quantized(preset=preset, **knobs)
    before = state(net)
    run(net, logits, targets=targets, passes=1, cycles=12, radius=0.02)
    assert {name.rpartition(".")[0].split(".", 2)[2] for name in changed(before, net)} == expected


def test_deviates_from_reference_equal_losses_are_no_error_and_change_nothing():
    net, _ = quantized()
    before = state(net)
    result = run(net, [torch.zeros(n, 10) for n in (8, 8, 5)], passes=1)
    assert (result.accepted, result.evaluations, result.fitness) == (0, 6, result.fitness_before)
    assert changed(before, net) == set()


def test_reference_selection_keeps_the_best_on_validation_images_and_says_so():
    net, targets = quantized()
    seen, accuracies = [], iter([50.0, 40.0, 45.0, 40.0])
    result = run(
        net,
        targets,
        reference_selection=True,
        cycles=10,
        validate=lambda: seen.append(state(net)) or next(accuracies),
    )
    assert result.selected_on == "validation"
    # During the first pass the latest stays, whatever its accuracy; 45 is more than 40.
    assert (len(seen), changed(seen[2], net)) == (4, set())
    assert changed(seen[0], net) != set()


def test_deviates_from_reference_no_validation_image_is_looked_at():
    net, targets = quantized()
    assert (
        run(
            net, targets, passes=1, validate=lambda: pytest.fail("validation images were looked at")
        ).selected_on
        == "calibration"
    )


def test_deviates_from_reference_each_scale_has_a_floor_and_the_noise_of_its_bits():
    # There a scale may become zero, and the bits of `proj` decide for all of a block.
    net, _ = quantized()
    vector = scale_vectors(net, SearchSettings().targets)["blocks.0"]
    wide = vector.quantizers[0]
    wide.spec = dataclasses.replace(wide.spec, bits=8)
    assert (
        vector.radius(None).tolist()
        == [1e-4] * wide.num_stored_scales + [1e-3] * vector.quantizers[1].num_stored_scales
    )
    vector.write(torch.zeros(len(vector.read())))
    assert (vector.read() >= torch.finfo(torch.float32).eps).all()


def test_a_fitness_that_is_not_finite_names_block_and_candidate():
    net, targets = quantized()
    before = state(net)

    def overflow(module, args, output):
        touched = not torch.equal(
            module.weight_quantizer.scale, before["blocks.0.attn.qkv.weight_quantizer.scale"]
        )
        return output * float("nan") if touched else output

    handle = net.blocks[0].attn.qkv.register_forward_hook(overflow)
    with usage_error(r"NaN or infinite for candidate 0 of blocks\.0 in pass 0; use a smaller"):
        run(net, targets, passes=1)
    handle.remove()
    assert not {name for name in changed(before, net) if name.startswith("blocks.0")}
    with torch.no_grad():
        net.head.bias[0] = float("nan")
    with usage_error("logits became NaN or infinite for the unchanged model; check"):
        run(net, targets, passes=1)


def flat():
    net = tiny.convert(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), "lsq")
    return qat.initialize_scales(net, batches())


@pytest.mark.parametrize(
    ("build", "knobs", "message"),
    [
        (
            quantized,
            {"targets": ["nope"]},
            r"search.targets=\['nope'\]: must match a scale of a block; stored scales are those of attn.k, ",
        ),
        (
            quantized,
            {"reference_selection": True},
            "reference_selection=true: must be false without validation images",
        ),
        (
            lambda: quantized(preset="ofq_noqkr", weight_quantizer="statsq"),
            {},
            r"'attn\*.qk'\]: must match a scale of a block",
        ),
        (
            lambda: (flat(), quantized()[1]),
            {},
            "search: must be null for this model, which has no blocks",
        ),
        (lambda: (tiny.converted("minmax"), quantized()[1]), {}, "not initialized"),
    ],
)
def test_what_cannot_be_searched(build, knobs, message):
    with usage_error(message):
        run(*build(), **knobs)


@pytest.mark.parametrize(
    ("knob", "value", "allowed"),
    [
        ("fitness", "accuracy", "infonce, mse, kl, cosine"),
        ("temperature", 0, "a number above 0"),
        ("radius", 0, "a number above 0"),
        ("targets", [], "a list of globs"),
        ("passes", 0, "an integer of at least 1"),
        ("relative", "no", "true or false"),
        ("reference_selection", "no", "true or false"),
    ],
)
def test_settings_that_cannot_work(knob, value, allowed):
    with usage_error(rf"search\.{knob}=.*must be (one of )?{allowed}"):
        SearchSettings(**{knob: value})


class Killed(BaseException):
    pass


def killed_after(monkeypatch, visits, *, before_state=False):
    """Die when that many visits are done: before the state is written, or after."""
    save = Progress.save

    def saving(self, done):
        if done["visits"] == visits and before_state:
            raise Killed
        save(self, done)
        if done["visits"] == visits:
            raise Killed

    monkeypatch.setattr(Progress, "save", saving)


@pytest.mark.parametrize(("visits", "before_state"), [(1, False), (3, True)])
def test_the_same_scales_after_a_kill(visits, before_state, tmp_path, monkeypatch):
    _, targets = quantized()

    def searched(folder, done=0, *, resume=False):
        """A net and what a search with the accuracies behind the first `done` visits returns."""
        left = iter([1.0, 2.0, 9.0, 3.0][done:])
        net, _ = quantized()
        return net, run(
            net,
            targets,
            tmp_path / folder,
            resume=resume,
            reference_selection=True,
            validate=lambda: next(left),
        )

    whole, expected = searched("whole")
    killed_after(monkeypatch, visits, before_state=before_state)
    with pytest.raises(Killed):
        searched("killed")
    monkeypatch.undo()
    net, found = searched("killed", visits - before_state, resume=True)
    assert changed(state(whole), net) == set()
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")
    for name in ("fitness", "accepted", "evaluations"):
        assert getattr(found, name) == getattr(expected, name)
    # What is finished is not run again.
    monkeypatch.setattr("qat.ptq.search.evolve", lambda *_: pytest.fail("is run again"))
    assert searched("killed", 4, resume=True)[1] == found


def test_resume_demands_the_same_search(tmp_path):
    net, targets = quantized()
    run(net, targets, tmp_path)
    for knobs, images, message in (
        (
            {"cycles": 5},
            batches(),
            r"^search\.cycles=5: must be 3, as in the run to resume \(.*search\.ckpt\)",
        ),
        ({}, [b + 1 for b in batches()], "belongs to another model or other calibration images"),
    ):
        with usage_error(message):
            search(
                quantized()[0], images, targets, settings(**knobs), run_dir=tmp_path, resume=True
            )
    whole = (tmp_path / "search.ckpt").read_bytes()
    for damaged in (whole[:-1], whole[:10], b""):
        (tmp_path / "search.ckpt").write_bytes(damaged)
        with usage_error(r"^resume: .*search\.ckpt cannot be read; delete it to start over$"):
            run(quantized()[0], targets, tmp_path, resume=True)
    run(quantized()[0], targets, tmp_path)  # without resume it starts anew
    assert len(lines(tmp_path)) == 13


# Blocks; LeViT has three, and two attentions that make the map smaller.
SEARCHED = {
    "deit_distilled": 2,
    "deit3": 2,
    "beit": 2,
    "swin": 4,
    "levit": 5,
    "cait": 2,
    "pvt_v2": 4,
}


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", SEARCHED)
def test_scales_of_every_attention_change_for_the_better(name, caplog):
    family = FAMILIES[name]
    net, images = family.build(), [family.images(8, seed) for seed in range(2)]
    logits = [logits_of(net, batch, 8) for batch in images]
    qat.convert(net, qat.PtqRecipe(bits=4, act_bits=8), input_size=family.input_size)
    qat.ptq.calibrate(net, images)
    before, chosen = state(net), settings(passes=1, cycles=4, micro_batch=4)
    result = search(net, images, logits, chosen)
    assert result.evaluations == 4 * SEARCHED[name] == 4 * len(find_blocks(net))
    assert result.fitness < result.fitness_before
    assert result.fitness == whole_fitness(net.eval(), images, logits, chosen)
    names = changed(before, net)
    assert names
    assert all(name.endswith("weight_quantizer.scale") and ".attn" in name for name in names)
    assert "cannot run" not in caplog.text
