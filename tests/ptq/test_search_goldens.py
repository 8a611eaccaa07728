"""The search with the draws of the reference injected: its recorded chains. Oracle: tests/goldens."""

import functools
import math
import random

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from qat.functional.evolution import Draw
from qat.ptq.drivers import Visit, evolution
from qat.ptq.fitness import Evaluation
from qat.ptq.search import SearchOptions, search
from qat.ptq.search_settings import SearchSettings
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


class Synthetic:
    """In the place of the evaluator and of the vector: 1e6 sum (s - target)^2."""

    n_images = 1

    def __init__(self, target):
        self.target, self.seen, self.losses = target.double(), [], []

    def write(self, values):
        self.seen.append(values)

    def radius(self, fixed):
        return torch.full((len(self.target),), fixed, dtype=torch.float64)

    def changed(self, vector):
        pass

    def loss(self, values):
        return float(1e6 * (values - self.target).square().sum())

    def fitness(self, block, incumbent):
        self.losses.append(self.loss(self.seen[-1]))
        return Evaluation(self.losses[-1], 1, torch.empty(0))


@golden.parametrize(PTQ, r"evo/[^/]+")
def test_synthetic_chain(case):
    values = functools.partial(golden.tensor, PTQ)
    scales, losses = values(f"{case}/eval_scales"), values(f"{case}/eval_losses")
    bits, cycles = (int(part[1:]) for part in case.split("_")[1:])
    settings = SearchSettings(cycles=cycles, radius=1e-4 if bits == 8 else 1e-3)
    fake, start = Synthetic(values(f"{case}/target")), values(f"{case}/s0").double()
    visit = Visit("block", (0, 0), cycles, fake, fake, start, fake.loss(start), torch.empty(0), {})
    evolution(visit, settings, reference_draws())
    assert torch.equal(torch.stack(fake.seen), scales[1:])
    assert_close(torch.tensor([fake.loss(start), *fake.losses], dtype=torch.float64), losses.flatten(), rtol=1e-9, atol=0)
    assert torch.equal(visit.best, values(f"{case}/best_scales").flatten())
    assert visit.fitness == pytest.approx(golden.number(PTQ, f"{case}/best_loss"), rel=1e-9)


@golden.parametrize(PTQ, r"vit/[^/]+/evo")
def test_chain_of_a_tiny_vit(case, monkeypatch):
    tag = case.rpartition("/")[0]
    recorded = golden.below(PTQ, case)
    net, visits = calibrated(tag), []

    def watched(visit, settings, draws):
        """One visit as the reference saves it: all it evaluated, the incumbent first."""
        row = {"init": visit.best, "losses": [visit.fitness], "scales": [visit.best]}
        evaluate = visit.evaluate

        def recording(scales, cycle):
            row["losses"].append(evaluate(scales, cycle))
            row["scales"].append(scales)
            return row["losses"][-1]

        visit.evaluate = recording
        evolution(visit, settings, draws)
        visits.append({**row, "best_loss": visit.fitness, "best_scales": visit.best})

    monkeypatch.setattr("qat.ptq.search.DRIVERS", {"evolution": watched})
    settings = SearchSettings(passes=len(recorded["losses"]) // len(net.blocks), cycles=recorded["losses"].shape[1] - 1, micro_batch=8)
    targets = list(golden.tensor(PTQ, f"{tag}/o_fp_used"))
    search(net, batches(), targets, settings, options=SearchOptions(draws=reference_draws()))
    for name in ("losses", "best_loss"):
        assert_close(torch.tensor([v[name] for v in visits]).double(), recorded[name].double(), rtol=0, atol=1e-4)
    assert_close(torch.stack([v["init"] for v in visits]), recorded["init"], rtol=1e-5, atol=0)
    assert_close(torch.stack([torch.stack(v["scales"]) for v in visits]), recorded["scales"], rtol=1e-5, atol=1e-9)
    assert_close(torch.stack([v["best_scales"] for v in visits]), recorded["best_scales"], rtol=1e-5, atol=1e-9)
    assert all(math.isfinite(v["best_loss"]) for v in visits)
    with torch.no_grad():
        logits = torch.stack([net(batch) for batch in batches()])
    assert_close(logits, golden.tensor(PTQ, f"{tag}/out_q_final_in_place"), rtol=1e-4, atol=1e-4)
