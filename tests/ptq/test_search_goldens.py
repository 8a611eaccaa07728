"""The search with the draws of the reference injected: its recorded chains. Oracle: tests/goldens."""

import functools
import math
import random

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from qat.functional.evolution import Draw
from qat.ptq.search import SearchSettings, evolve, search
from tests import golden
from tests.ptq.test_goldens import PTQ, batches, calibrated

SEED, TEMPERATURE = 0, 3.0


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
    target, start, radius = values(f"{case}/target").double(), values(f"{case}/s0").double(), settings.radius
    draws, seen = reference_draws(), []

    def evaluate(cycle, scales):
        seen.append(scales)
        return loss(scales)

    def loss(scales):
        return float(1e6 * (scales - target).square().sum())

    best, lowest = evolve(start, loss(start), evaluate, lambda cycle: draws((0, 0, cycle), torch.full_like(start, radius)), settings)
    assert torch.equal(torch.stack(seen), scales[1:])
    assert_close(torch.tensor([loss(s) for s in (start, *seen)], dtype=torch.float64), losses.flatten(), rtol=1e-9, atol=0)
    assert torch.equal(best, values(f"{case}/best_scales").flatten())
    assert lowest == pytest.approx(golden.number(PTQ, f"{case}/best_loss"), rel=1e-9)


@golden.parametrize(PTQ, r"vit/[^/]+/evo")
def test_chain_of_a_tiny_vit(case, monkeypatch):
    tag = case.rpartition("/")[0]
    recorded = golden.below(PTQ, case)
    net, visits = calibrated(tag), []

    def watched(start, fitness, evaluate, drawn, settings):
        """One visit as the reference saves it: all it evaluated, the incumbent first."""
        row = {"init": start, "losses": [fitness], "scales": [start]}

        def recording(cycle, scales):
            row["losses"].append(evaluate(cycle, scales))
            row["scales"].append(scales)
            return row["losses"][-1]

        best, lowest = evolve(start, fitness, recording, drawn, settings)
        visits.append({**row, "best_loss": lowest, "best_scales": best})
        return best, lowest

    monkeypatch.setattr("qat.ptq.search.evolve", watched)
    settings = SearchSettings(passes=len(recorded["losses"]) // len(net.blocks), cycles=recorded["losses"].shape[1] - 1, micro_batch=8)
    targets, draws = list(golden.tensor(PTQ, f"{tag}/o_fp_used")), reference_draws()
    monkeypatch.setattr("qat.ptq.search.draw", lambda seed, place, n, radius, **_: draws(place, radius))
    search(net, batches(), targets, settings)
    for name in ("losses", "best_loss"):
        assert_close(torch.tensor([v[name] for v in visits]).double(), recorded[name].double(), rtol=0, atol=1e-4)
    assert_close(torch.stack([v["init"] for v in visits]), recorded["init"], rtol=1e-5, atol=0)
    assert_close(torch.stack([torch.stack(v["scales"]) for v in visits]), recorded["scales"], rtol=1e-5, atol=1e-9)
    assert_close(torch.stack([v["best_scales"] for v in visits]), recorded["best_scales"], rtol=1e-5, atol=1e-9)
    assert all(math.isfinite(v["best_loss"]) for v in visits)
    with torch.no_grad():
        logits = torch.stack([net(batch) for batch in batches()])
    assert_close(logits, golden.tensor(PTQ, f"{tag}/out_q_final_in_place"), rtol=1e-4, atol=1e-4)
