"""The search with the draws of the reference injected: its recorded chains. Oracle: tests/goldens."""

import functools
import math
import random

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from qat.functional.evolution import Draw
from qat.functional.infonce import TEMPERATURE, logit_fitness
from qat.ptq.search import SearchSettings, evolve, search
from tests import golden
from tests.ptq.test_goldens import PTQ, assert_logits, batches, calibrated
from tests.ptq.ties import Ties

SEED = 0
LOSS = 1e-4  # largest difference where no code differs


def reference_draws(population=15, tournament=10):
    """Python's and numpy's global generators, in the order in which the reference asks them."""
    choices, noise = random.Random(SEED), np.random.RandomState(SEED)

    def draw(place, radius):
        members = torch.tensor(choices.choices(range(population), k=tournament))
        r = float(radius[0])
        return Draw(members, torch.from_numpy(noise.uniform(-r, r, len(radius))))

    return draw


@golden.parametrize(PTQ, r"evo/[^/]+")
def test_synthetic_chain(case):
    values = functools.partial(golden.tensor, PTQ)
    scales, losses = values(f"{case}/eval_scales"), values(f"{case}/eval_losses")
    bits, cycles = (int(part[1:]) for part in case.split("_")[1:])
    settings = SearchSettings(cycles=cycles, radius=1e-4 if bits == 8 else 1e-3)
    target, start, radius = (
        values(f"{case}/target").double(),
        values(f"{case}/s0").double(),
        settings.radius,
    )
    draws, seen = reference_draws(), []

    def evaluate(cycle, scales):
        seen.append(scales)
        return loss(scales)

    def loss(scales):
        return float(1e6 * (scales - target).square().sum())

    best, lowest = evolve(
        start,
        loss(start),
        evaluate,
        lambda cycle: draws((0, 0, cycle), torch.full_like(start, radius)),
        settings,
    )
    assert torch.equal(torch.stack(seen), scales[1:])
    assert_close(
        torch.tensor([loss(s) for s in (start, *seen)], dtype=torch.float64),
        losses.flatten(),
        rtol=1e-9,
        atol=0,
    )
    assert torch.equal(best, values(f"{case}/best_scales").flatten())
    assert lowest == pytest.approx(golden.number(PTQ, f"{case}/best_loss"), rel=1e-9)


@golden.parametrize(PTQ, r"vit/[^/]+/evo")
def test_chain_of_a_tiny_vit(case, monkeypatch):
    tag = case.rpartition("/")[0]
    recorded = golden.below(PTQ, case)
    net, visits = calibrated(tag), []
    targets, draws = list(golden.tensor(PTQ, f"{tag}/o_fp_used")), reference_draws()
    ties, loss_of = Ties(net), logit_fitness("infonce", TEMPERATURE)

    def whole_net():
        losses = [
            loss_of(net(batch), target) for batch, target in zip(batches(), targets, strict=True)
        ]
        return float(torch.stack(losses).double().mean())

    def assert_loss(loss, expected):
        """Equal, but for what codes on a threshold change: flipping them must give the expected loss."""
        if abs(loss - expected) > LOSS:
            assert abs(whole_net() - loss) <= LOSS
            assert ties.explain(whole_net, lambda other: abs(other - expected), LOSS) is not None

    def watched(start, fitness, evaluate, drawn, settings):
        """One visit that goes on with the recorded losses, so that a code on a threshold changes no candidate after it."""
        expected = recorded["losses"][len(visits)].double().tolist()
        scales_of_visit = [start]
        if not visits:
            assert_loss(fitness, expected[0])

        def recording(cycle, scales):
            scales_of_visit.append(scales)
            assert_loss(evaluate(cycle, scales), expected[cycle + 1])
            return expected[cycle + 1]

        best, lowest = evolve(start, expected[0], recording, drawn, settings)
        visits.append({
            "init": start,
            "scales": scales_of_visit,
            "best_loss": lowest,
            "best_scales": best,
        })
        return best, lowest

    monkeypatch.setattr("qat.ptq.search.evolve", watched)
    settings = SearchSettings(
        passes=len(recorded["losses"]) // len(net.blocks),
        cycles=recorded["losses"].shape[1] - 1,
        micro_batch=8,
    )
    monkeypatch.setattr(
        "qat.ptq.search.draw", lambda seed, place, n, radius, **_: draws(place, radius)
    )
    search(net, batches(), targets, settings)
    assert_close(
        torch.tensor([v["best_loss"] for v in visits]).double(),
        recorded["best_loss"].double(),
        rtol=0,
        atol=LOSS,
    )
    assert_close(torch.stack([v["init"] for v in visits]), recorded["init"], rtol=1e-5, atol=0)
    assert_close(
        torch.stack([torch.stack(v["scales"]) for v in visits]),
        recorded["scales"],
        rtol=1e-5,
        atol=1e-9,
    )
    assert_close(
        torch.stack([v["best_scales"] for v in visits]),
        recorded["best_scales"],
        rtol=1e-5,
        atol=1e-9,
    )
    assert all(math.isfinite(v["best_loss"]) for v in visits)
    assert_logits(net, golden.tensor(PTQ, f"{tag}/out_q_final_in_place"))
