"""Evaluations: equal to plain forwards bit for bit, races, gradients, and processes that share the batches."""

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.testing import assert_close

from qat.functional.infonce import FITNESSES, logit_fitness
from qat.model.blocks import find_blocks
from qat.ptq.block_cache import trace, verified
from qat.ptq.distributed import Ranks
from qat.ptq.fitness import Evaluator, Race, logits_of, plain_fitness, row_losses
from qat.ptq.search import SearchOptions, search
from qat.ptq.search_settings import SearchSettings
from qat.ptq.vector import scale_vectors
from tests.ptq.searching import batches, changed, quantized, state


def evaluator(net, targets, *, inner=False, **knobs):
    settings = SearchSettings(**{"micro_batch": 3, **knobs})
    traced = trace(net, find_blocks(net), batches()[0][:1])
    vectors = scale_vectors(net, settings.targets, traced.order)
    if inner:
        sites = {name: [site.name for site in vector.sites] for name, vector in vectors.items()}
        traced = verified(net, traced, batches()[0][:2], traced.entering(sites))
    return Evaluator(net, batches(), targets, settings, traced, Ranks()), settings, vectors


@pytest.mark.parametrize("cache_gib", [4.0, 0.0])
@pytest.mark.parametrize("micro_batch", [3, 100])
@pytest.mark.parametrize("inner", [False, True])
def test_fitness_is_that_of_plain_forwards_bit_for_bit(inner, micro_batch, cache_gib):
    """The plain forwards run on the very net before its evaluator is active, and with scales that were drawn."""
    net, targets = quantized()
    made, settings, vectors = evaluator(net, targets, inner=inner, micro_batch=micro_batch, cache_gib=cache_gib)
    start = {name: vector.read() for name, vector in vectors.items()}
    for block in reversed(vectors):
        candidates = [
            start[block] * (1 + 0.1 * torch.rand(len(start[block]), generator=torch.Generator().manual_seed(i))) for i in range(2)
        ]
        plain = []
        for candidate in candidates:
            vectors[block].write(candidate)
            plain.append(plain_fitness(net, batches(), targets, settings))
        with made.active():
            for candidate, expected in zip(candidates, plain, strict=True):
                vectors[block].write(candidate)
                made.changed(vectors[block])
                assert made.fitness(block).fitness == expected
        assert len(set(plain)) == 2


def test_only_the_changed_weights_are_quantized_again_and_once(monkeypatch):
    net, targets = quantized()
    made, _, vectors = evaluator(net, targets)
    asked = []
    for name, module in net.named_modules():
        if name.endswith("weight_quantizer"):
            original = module.forward
            monkeypatch.setattr(module, "forward", lambda w, name=name, original=original: (asked.append(name), original(w))[1])
    with made.active():
        made.fitness("blocks.1")
        assert len(asked) == len(set(asked)) == 10
        asked.clear()
        made.changed(vectors["blocks.1"])
        made.fitness("blocks.1")
        assert asked == ["blocks.1.attn.qkv.weight_quantizer", "blocks.1.attn.proj.weight_quantizer"]


@pytest.mark.parametrize("kind", FITNESSES)
def test_a_fitness_is_the_mean_of_its_rows(kind):
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(9, 10, generator=generator), torch.randn(9, 10, generator=generator)
    rows = row_losses(kind, 0.7)
    found = torch.cat([rows(q[i : i + 4], k, i) for i in range(0, 9, 4)])
    assert_close(found.mean(), logit_fitness(kind, 0.7)(q, k), rtol=1e-6, atol=1e-7)


def test_a_race_is_lost_when_clearly_worse():
    """For even n the mean difference is 1 with variance n / (n - 1); two standard errors are 2 sqrt((1 - n / 40) / (n - 1)).

    That is below 1 from n = 4.5 on. Of 5 images the mean is 0.8, below 2 sqrt(1.2 (1 / 5 - 1 / 40)).
    """
    incumbent = torch.zeros(40, dtype=torch.float64)
    rows = torch.tensor([0.0, 2.0] * 20, dtype=torch.float64)

    def race(after=2, total=40):
        return Race(incumbent, after, total, Ranks())

    started = race()
    assert [n for n in range(1, 41) if started.lost(rows[:n])] == list(range(6, 40))
    assert started.images == 40
    # Of endlessly many images, 2 / sqrt(n - 1) is below 1 from n = 5 on; of 5 images 2 sqrt(1.2 / 5) is above their mean 0.8.
    assert [n for n in range(1, 41) if race(total=10**9).lost(rows[:n])] == list(range(6, 41))
    assert not race(after=30).lost(rows[:29])
    assert race(after=30).lost(rows[:30])
    assert not race().lost(-rows[:39])
    assert not race().lost(incumbent[:39])


def test_racing_gives_up_what_would_have_been_turned_away_and_says_so():
    knobs = {"passes": 2, "cycles": 5, "micro_batch": 3, "radius": 0.3, "relative": True}
    whole, targets = quantized()
    plain = search(whole, batches(), targets, SearchSettings(**knobs))
    raced = quantized()[0]
    result = search(raced, batches(), targets, SearchSettings(racing=6, **knobs))
    assert plain.given_up == 0
    assert result.given_up > 0
    assert result.images < plain.images == 20 * 21
    assert result.evaluations == plain.evaluations
    assert (result.accepted, result.fitness) == (plain.accepted, plain.fitness)
    assert changed(state(whole), raced) == set()


@pytest.mark.parametrize("kind", FITNESSES)
def test_gradient_of_the_scales(kind):
    """Against autograd over one whole forward of each batch. What is known of the fitness on the way is the same to the last bit."""
    net, targets = quantized()
    made, _, vectors = evaluator(net, targets, fitness=kind)
    vector = vectors["blocks.1"]
    with torch.no_grad(), made.active():
        looked, found = made.gradient("blocks.1", vector)
        assert (looked.fitness, looked.images) == (made.fitness("blocks.1").fitness, 21)
    for scale in vector.scales:
        scale.requires_grad_()
    loss = logit_fitness(kind)
    total = sum(loss(net(images), target) for images, target in zip(batches(), targets, strict=True)) / len(targets)
    expected = torch.cat(torch.autograd.grad(total, vector.scales)).double()
    assert expected.abs().max() > 0
    assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_gradient_of_relative_steps_is_that_of_absolute_ones():
    found = []
    for steps in ("relative", "absolute"):
        net, targets = quantized(preset="lsq", bits=3, weight_quantizer="lsq", steps=steps)
        made, _, vectors = evaluator(net, targets, fitness="mse")
        vector = vectors["blocks.1"]
        with torch.no_grad(), made.active():
            vector.write(vector.read())
            found.append(made.gradient("blocks.1", vector)[1])
    assert found[1].abs().max() > 0
    assert_close(*found, rtol=1e-4, atol=1e-6 * float(found[1].abs().max()))


def test_a_gradient_moves_relative_steps():
    net, targets = quantized(preset="lsq", bits=3, weight_quantizer="lsq")
    knobs = {"method": "adam", "passes": 2, "cycles": 5, "relative": True, "radius": 0.05, "fitness": "mse"}
    assert search(net, batches(), targets, SearchSettings(**knobs)).accepted > 0


def test_logits_in_micro_batches():
    net, _ = quantized()
    assert logits_of(net, batches()[0], 3).shape == (8, 10)
    assert_close(logits_of(net, batches()[0], 3), logits_of(net, batches()[0], 8))


KNOBS = {"passes": 2, "micro_batch": 3, "radius": 0.2, "relative": True}


SEARCHES = {"plain": {}, "racing": {"racing": 6}, "adam": {"method": "adam"}}


def _process(rank, folder, port):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for name, knobs in SEARCHES.items():
        net, targets = quantized()
        options = SearchOptions(group=dist.group.WORLD)
        result = search(net, batches(), targets, SearchSettings(**KNOBS, **knobs), run_dir=folder / name, options=options)
        torch.save((state(net), result.to_dict()), folder / f"{name}{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.long
def test_two_processes_search_as_one(tmp_path):
    """Three batches over two processes. A fitness is the mean of the same numbers in the same order, so it is equal to the last bit."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_process, args=(tmp_path, port), nprocs=2)
    for name, knobs in SEARCHES.items():
        alone, targets = quantized()
        expected = search(alone, batches(), targets, SearchSettings(**KNOBS, **knobs), run_dir=tmp_path / "alone" / name)
        for rank in range(2):
            found, result = torch.load(tmp_path / f"{name}{rank}.pt", weights_only=True)
            # The gradients of the two processes are summed in another order.
            tolerance = 1e-5 if name == "adam" else 0
            assert_close(found, state(alone), rtol=tolerance, atol=0)
            assert (result["accepted"], result["evaluations"]) == (expected.accepted, expected.evaluations)
            assert result["fitness"] == pytest.approx(expected.fitness, rel=tolerance / 10)
        accepted = [_column(folder / name / "search.csv", 4) for folder in (tmp_path, tmp_path / "alone")]
        assert accepted[0] == accepted[1]
        assert "1" in accepted[0][2:]


def _column(file, number):
    return [line.split(",")[number] for line in file.read_text().splitlines()]
