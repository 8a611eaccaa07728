"""Oscillation in real trainers. Oracles: the exact tracker on copies of the weights, codes by hand, a hook-free look at activations."""

import pytest
import torch
from lightning.pytorch import Callback

from qat import functional as F
from qat.callbacks import Oscillation
from qat.callbacks.oscillation import track_codes
from qat.utils.files import csv_rows
from tests.callbacks.fitting import fit, module, net
from tests.errors import usage_error
from tests.tiny import sites, vit


class Seen(Callback):
    """Codes of every forward pass and what was logged after its step."""

    def __init__(self):
        self.codes, self.logged = [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        tracked = {name: site for name, site in sites(pl_module.net).items() if site.is_weight}
        self.latents = {name: site.latent().detach().clone() for name, site in tracked.items()}
        self.codes.append({
            name: site.quantizer.codes(site.latent()).clone() for name, site in tracked.items()
        })

    def on_train_batch_end(self, trainer, *_):
        self.logged.append({
            k: v.item() for k, v in trainer.logged_metrics.items() if k.startswith("osc/")
        })


def exact(looks, name, momentum):
    state = None
    for codes in looks:
        state = F.oscillation_step(state, codes[name], momentum)
    return state


@pytest.mark.sample(1)
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("preset", ["ofq", "lsq"])
def test_frequencies_are_those_of_the_exact_tracker(preset, every):
    seen, callback = Seen(), Oscillation(momentum=0.05, every_n_steps=every)
    fit(module(net(preset), lr=0.03), callback, seen, max_epochs=4)
    looks = seen.codes[::every]
    total = 0
    for name, found in callback._states.items():
        expected = exact(looks, name, 0.05)
        assert torch.equal(found.codes.float(), expected.codes)
        assert torch.equal(found.direction.float(), expected.direction)
        assert torch.equal(found.frequency, expected.frequency)
        assert found.flips.item() == expected.flips.sum().item()
        total += expected.flips.sum().item()
    assert total > 100, "the run oscillates"


def test_tracked_are_weights_of_few_bits():
    callback = Oscillation()
    fit(module(net()), callback, max_epochs=1)
    blocks = [f"blocks.{i}" for i in (0, 1)]
    layers = ("attn.proj.weight", "attn.v.weight", "mlp.fc1.weight", "mlp.fc2.weight", "attn.qk")
    assert set(callback._states) == {f"{b}.{layer}_quantizer" for b in blocks for layer in layers}
    wider = Oscillation(max_bits=8)
    fit(module(net()), wider, max_epochs=1)
    assert set(wider._states) - set(callback._states) == {
        "patch_embed.proj.weight_quantizer",
        "head.weight_quantizer",
    }


def test_codes_of_eight_bits_without_a_sign_are_tracked():
    looks, state = torch.tensor([[126.0, 0], [127, 255], [128, 0], [127, 255], [255, 254]]), None
    for codes in looks:
        state = track_codes(state, codes, 0.1)
    expected = exact([{"": codes} for codes in looks], "", 0.1)
    assert torch.equal(state.frequency, expected.frequency)
    assert state.flips.item() == expected.flips.sum().item() == 5


def test_deviates_from_reference_oscillations_are_measured():
    # There the tracker is never made in a training run.
    seen, callback = Seen(), Oscillation(momentum=0.05, threshold=0.06)
    fit(module(net(), lr=0.03), callback, seen, max_epochs=3, log_every_n_steps=12)
    assert [bool(values) for values in seen.logged] == [False] * 11 + [True]
    logged = seen.logged[-1]
    states = {name: exact(seen.codes, name, 0.05) for name in callback._states}
    n = sum(state.codes.numel() for state in states.values())
    assert logged["osc/share"] == pytest.approx(
        sum((s.frequency > 0.06).sum().item() for s in states.values()) / n
    )
    assert logged["osc/frequency"] == pytest.approx(
        sum(s.frequency.sum().item() for s in states.values()) / n, rel=1e-2
    )
    assert logged["osc/flips"] == sum(s.flips.sum().item() for s in states.values()) > 0
    assert logged["osc/band"] == pytest.approx(
        sum(F.near_threshold(seen.latents[name], 2, 0.005).sum().item() for name in states) / n
    )
    assert 0 < logged["osc/share"] < 1


def test_the_table(tmp_path):
    callback, seen = Oscillation(dirpath=str(tmp_path), threshold=0.005), Seen()
    fit(module(net(), lr=0.03), callback, seen)
    *rows, total = csv_rows(tmp_path / "oscillation.csv")
    assert len(rows) == 10
    row = next(r for r in rows if r["layer"] == "blocks.1.mlp.fc2")
    state = exact(seen.codes, "blocks.1.mlp.fc2.weight_quantizer", 0.01)
    assert (row["role"], row["bits"], int(row["weights"])) == ("weight", "2", 128 * 32)
    assert int(row["oscillating"]) == (state.frequency > 0.005).sum().item()
    assert int(row["flips"]) == state.flips.sum().item() > 0
    assert float(row["mean_frequency"]) == pytest.approx(state.frequency.mean().item(), rel=1e-2)
    assert [int(total[key]) for key in ("weights", "flips")] == [
        sum(int(r[key]) for r in rows) for key in ("weights", "flips")
    ]


def test_counts_are_exact_beyond_24_bits(tmp_path):
    callback = Oscillation(dirpath=str(tmp_path))
    trainer = fit(module(net()), callback)
    name = next(iter(callback._states))
    flips = torch.tensor(2**24 + 1)
    callback._states = {name: callback._states[name]._replace(flips=flips)}
    callback.on_train_end(trainer, trainer.lightning_module)
    assert [row["flips"] for row in csv_rows(tmp_path / "oscillation.csv")] == ["16777217"] * 2


@pytest.mark.parametrize("start", ["fp", "8 bit"])
def test_nothing_to_track(start):
    learner = module(vit()) if start == "fp" else module(net(overrides={"blocks.*": {"bits": 8}}))
    with usage_error(
        r"callbacks\.oscillation\.max_bits=4: this model has no quantized weights of at most 4 bits",
    ):
        fit(learner, Oscillation())
