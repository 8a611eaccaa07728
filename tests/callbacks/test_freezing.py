"""Iterative freezing in real trainers. Oracles: `freezing_step` on the codes that were used, bit equality of what is held."""

from contextlib import nullcontext

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from qat import functional as F
from qat.callbacks import IterativeFreezing
from tests.callbacks.fitting import QUIET, Steps, batches, differing, fit, module, net
from tests.errors import usage_error
from tests.tiny import identical, sites

LAYERS = [
    f"blocks.{i}.{layer}" for i in (0, 1) for layer in ("attn.proj", "attn.v", "mlp.fc1", "mlp.fc2")
]
# A low threshold in a run with large steps: freezes hundreds of weights within a few steps.
EAGER = {"threshold": 0.15, "final_threshold": 0.05, "momentum": 0.1}


def codes_of(net):
    return {
        name: site.quantizer.codes(site.latent()).clone()
        for name, site in sites(net).items()
        if site.role == "weight"
    }


class Codes(Callback):
    """Codes that every forward pass uses."""

    def __init__(self):
        self.used = []

    def on_train_batch_start(self, trainer, pl_module, *_):
        self.used.append(codes_of(pl_module.net))


def run(preset="ofq", lr=0.03, callback=None, **settings):
    codes, steps = Codes(), Steps()
    callback = IterativeFreezing(**EAGER) if callback is None else callback
    learner = module(net(preset), lr=lr)
    trainer = fit(learner, callback, codes, steps, **{"max_epochs": 4, **settings})
    return trainer, learner, callback, codes, steps


def replay(callback, used, name):
    """The tracker of the pure functions over the codes that the passes used; which entries were frozen at each of them."""
    state = frozen = None
    history = []
    for t, looks in enumerate(used):
        codes = F.replace_frozen(frozen, looks[name])
        state = F.oscillation_step(state, codes, callback.momentum)
        frozen = F.freezing_step(
            frozen, codes, state.frequency, callback.threshold_at(t), callback.momentum
        )
        history.append((frozen.frozen.clone(), frozen.codes.clone()))
    return history


of_both_quantizers = pytest.mark.parametrize("preset", ["ofq", "lsq"])


@pytest.mark.sample(1)
@of_both_quantizers
def test_frozen_codes_follow_the_functions_and_are_in_force_from_the_next_forward(preset):
    _, learner, callback, codes, _ = run(preset)
    followers = [*codes.used[1:], codes_of(learner.net)]
    checked = 0
    for name, state in callback._freezing_states.items():
        history = replay(callback, codes.used, name)
        for (mask, values), after in zip(history, followers, strict=True):
            assert torch.equal(after[name][mask].float(), values[mask])
            checked += mask.sum().item()
        assert torch.equal(state.frozen, mask)
        assert torch.equal(state.codes[mask].float(), values[mask])
    assert checked > 500


def test_a_second_run_begins_without_frozen_weights():
    callback = run(max_epochs=2)[2]
    assert callback._freezing_states
    again = run(max_epochs=2, lr=0.02, callback=callback)[1]
    alone = run(max_epochs=2, lr=0.02)[1]
    assert identical(again.net.state_dict(), alone.net.state_dict())


@pytest.mark.sample(1)
@of_both_quantizers
def test_deviates_from_reference_frozen_weights_get_no_gradient_and_stay_in_the_middle_of_their_cell(
    preset,
):
    _, learner, callback, codes, steps = run(preset)
    for name, site in sites(learner.net).items():
        if name not in callback._freezing_states:
            continue
        weight_name = name.removesuffix("_quantizer")
        for t, (mask, _) in enumerate(replay(callback, codes.used, name)):
            assert not steps.gradients[t][weight_name][mask].any()
        state = callback._freezing_states[name]
        away = (
            site.quantizer.grid(site.latent()).to_code_coordinates(site.latent()) - state.codes
        ).abs()[state.frozen]
        assert (
            away <= 0.3
        ).all()  # the quarter of a cell at which it is put back, and what the scale moved by that


def test_the_folded_matrix_and_wide_weights_are_left_alone():
    _, _, callback, _, _ = run()
    assert {name.removesuffix(".weight_quantizer") for name in callback._oscillation_states} == set(
        LAYERS
    )


def test_the_threshold_falls_along_a_cosine():
    callback = IterativeFreezing(threshold=0.3, final_threshold=0.1)
    run(callback=callback)
    assert [callback.threshold_at(step) for step in (0, 8, 16)] == pytest.approx([0.3, 0.2, 0.1])


def test_resumed_equals_uninterrupted(tmp_path):
    # The second half from a checkpoint between two epochs.
    start = net()

    class Save(Callback):
        def on_train_epoch_end(self, trainer, *_):
            if trainer.current_epoch == 1:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    whole, half = module(start, lr=0.03), module(start, lr=0.03)
    first, second = IterativeFreezing(**EAGER), IterativeFreezing(**EAGER)
    fit(whole, first, Save(), max_epochs=4)
    resumed = Trainer(accelerator="cpu", max_epochs=4, callbacks=[second, Save()], **QUIET)
    resumed.fit(half, batches(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert differing(whole.net.state_dict(), half.net.state_dict()) == []
    for name, state in first._freezing_states.items():
        assert identical(state, second._freezing_states[name])
        assert identical(first._oscillation_states[name], second._oscillation_states[name])


def test_nothing_to_freeze():
    learner = module(net(overrides={"blocks.*": {"bits": 8}}))
    with usage_error(r"^callbacks\.freeze: "):
        fit(learner, IterativeFreezing())


@pytest.mark.parametrize("fails", [False, True])
def test_the_hook_is_gone_afterwards(fails):
    counts = []

    class Look(Callback):
        def on_train_batch_end(self, trainer, *_):
            self.hooks = trainer.optimizers[0]._optimizer_step_post_hooks
            counts.append(len(self.hooks))
            if fails:
                raise ValueError

    look = Look()
    with pytest.raises(ValueError, match="^$") if fails else nullcontext():
        fit(module(net()), IterativeFreezing(), look, max_epochs=1)
    assert counts[0] == 1
    assert not look.hooks
