"""Order as a function of (seed, epoch), shared out over processes. Oracles: properties of sets, timm's sampler."""

import random

import numpy as np
import pytest
import torch
from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import DistributedSampler

from qat.data.sampler import SeededSampler, combine_seeds, isolated_rng, seed_step


def indices(sampler):
    return [index for _, index in sampler]


def shuffled(seed=0, epoch=0, **kwargs):
    sampler = SeededSampler(103, seed=seed, shuffle=True, **kwargs)
    sampler.set_epoch(epoch)
    return sampler


def test_every_image_once_in_an_order_of_its_own():
    assert sorted(order := indices(shuffled())) == list(range(103)) != order


def test_deviates_from_reference_order_is_a_function_of_seed_and_epoch():
    # There it depends on everything that drew from a global generator before.
    torch.manual_seed(1)
    first = indices(shuffled(seed=3, epoch=5))
    torch.manual_seed(2)
    assert indices(shuffled(seed=3, epoch=5)) == first
    assert indices(shuffled(seed=3, epoch=6)) != first
    assert indices(shuffled(seed=4, epoch=5)) != first
    assert indices(shuffled(seed=5, epoch=3)) != first


@pytest.mark.parametrize("world", [2, 4])
def test_shards_interleave_to_the_order_of_one_process(world):
    # A step sees the same images whatever the number of processes.
    samplers = [shuffled(epoch=2, rank=r, world_size=world) for r in range(world)]
    assert [i for step in zip(*map(indices, samplers), strict=True) for i in step] == indices(
        shuffled(epoch=2)
    )[: 103 - 103 % world]
    assert {len(sampler) for sampler in samplers} == {103 // world}


@pytest.mark.parametrize("world", [1, 2, 4])
def test_evaluation_shards_hold_every_image_exactly_once(world):
    samplers = [
        SeededSampler(103, seed=0, shuffle=False, rank=r, world_size=world) for r in range(world)
    ]
    assert sorted(sum((indices(s) for s in samplers), [])) == list(range(103))
    assert [len(s) for s in samplers] == [len(indices(s)) for s in samplers]
    assert isinstance(
        samplers[0], DistributedSampler
    )  # which Lightning's trainer does not share out again


def test_mixed_seeds_depend_on_every_number_and_its_place():
    seeds = [
        combine_seeds(0, 1),
        combine_seeds(1, 0),
        combine_seeds(0, 0),
        combine_seeds(1, 1),
        combine_seeds(0, 1, 2),
        combine_seeds(-1, 0),
    ]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def draws():
    return random.random(), np.random.rand(), torch.rand(()).item()


def test_isolated_draws_repeat_and_leave_the_generators_as_they_were():
    with isolated_rng(1, 2):
        first = draws()
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    expected = draws()
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    with isolated_rng(1, 2):
        assert draws() == first
    with isolated_rng(1, 3):
        assert all(a != b for a, b in zip(draws(), first, strict=True))
    assert draws() == expected


def test_without_repeats_the_order_is_what_it_always_was():
    sampler = shuffled(seed=3, epoch=5, rank=1, world_size=2, repeats=1)
    assert list(sampler)[:6] == [(5, 85), (5, 30), (5, 48), (5, 99), (5, 81), (5, 46)]


@pytest.mark.parametrize("repeats", [2, 3, 5])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_repeats_are_dealt_out_as_timm_deals_them(repeats, world):
    # Both shuffle in their own way, so what is compared is which image of the shuffled order stands where.
    def ranks(orders):
        first_seen = {}
        for step in zip(*orders, strict=True):
            for image in step:
                first_seen.setdefault(image, len(first_seen))
        return [[first_seen[image] for image in order] for order in orders]

    n = 103 - 103 % world
    data = range(n)
    timms = [
        list(RepeatAugSampler(data, world, r, num_repeats=repeats, selected_round=0))
        for r in range(world)
    ]
    samplers = [
        SeededSampler(n, seed=0, shuffle=True, rank=r, world_size=world, repeats=repeats)
        for r in range(world)
    ]
    ours = [[index for _, index, _ in sampler] for sampler in samplers]
    assert ranks(ours) == ranks(timms)
    assert (
        [len(sampler) for sampler in samplers] == [len(one) for one in ours] == [n // world] * world
    )


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_step_seeds_the_generator_of_its_device(monkeypatch, device):
    seeds = []
    monkeypatch.setattr(getattr(torch, device), "manual_seed", seeds.append)
    owner = torch.cuda if device == "cuda" else torch.backends.mps
    monkeypatch.setattr(owner, "is_available", lambda: True)
    seed_step(3, 5)
    assert seeds == [combine_seeds(3, 5)] == [torch.initial_seed()]
