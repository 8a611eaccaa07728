"""Faults that processes share, step sizes that died, half precision. Oracle: where the test put the fault; a run without the guard."""

import copy
import re

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision
from torch.utils.data import DataLoader

import qat
from qat.callbacks import FaultGuard, IterativeFreezing, Oscillation, finite
from qat.callbacks.fault_cause import UNKNOWN
from qat.losses import LossTerm
from tests.callbacks.fitting import differing, fit, module, net
from tests.tiny import images, sites, vit

STEPS = 6


def data():
    """Six batches of four."""
    return [(images(4, seed), torch.arange(4)) for seed in range(STEPS)]


def run(learner, *callbacks, batches, **settings):
    """One epoch."""
    return fit(learner, *callbacks, data=DataLoader(batches, batch_size=None), max_epochs=1, **settings)


@pytest.fixture(params=["host", "device"])
def place(request, monkeypatch):
    """Looked at at once on the host, or late as on an accelerator."""
    if request.param == "device":
        monkeypatch.setattr(finite, "_is_free", lambda tensor: False)
    return request.param


def test_a_healthy_run_is_left_as_it_is(place):
    start, ends = net(), []
    for guards in ([FaultGuard()], []):
        learner = module(start)
        trainer = run(learner, *guards, Oscillation(), IterativeFreezing(threshold=0.1, final_threshold=0.1, momentum=0.2), batches=data())
        (optimizer,) = trainer.optimizers
        moments = {f"{i}.{key}": value for i, state in optimizer.state_dict()["state"].items() for key, value in state.items()}
        ends.append(learner.state_dict() | moments)
    assert differing(*ends) == []


class SickProcess(LossTerm):
    """A constant that is NaN in one process, in its second step: gradients are fine everywhere."""

    def __init__(self):
        super().__init__()
        self.steps = 0

    def forward(self, step):
        self.steps += 1
        return torch.tensor(torch.nan if dist.get_rank() == 1 and self.steps == 2 else 0.0)


def test_a_fault_of_one_process_ends_all_of_them():
    learner = module(net(), terms={"sick": SickProcess()})
    value = r"(nan|not finite in another process)"  # which of the two ends first is open
    with pytest.raises(Exception, match=rf"the loss of step 1 is {value}; first not finite: {re.escape(UNKNOWN)}; checkpoints are from"):
        fit(learner, FaultGuard(), strategy="ddp_fork", devices=2, max_epochs=2, limit_train_batches=2)


# --- step sizes


SITE = "blocks.1.mlp.fc2.input_quantizer"


def step_size(net, name=SITE):
    return next(p for n, p in sites(net)[name].quantizer.named_parameters() if n.endswith("scale"))


class Set(Callback):
    """Puts a value into step sizes once, behind the update that makes the step count 3."""

    def __init__(self, value, entry=slice(None)):
        self.value, self.entry = value, entry

    def on_train_batch_start(self, trainer, pl_module, *_):
        if trainer.global_step == 2:
            self.handle = trainer.optimizers[0].register_step_post_hook(lambda *_: self.change(pl_module))

    def change(self, pl_module):
        self.handle.remove()
        with torch.no_grad():
            step_size(pl_module.net)[self.entry] = self.value


@pytest.mark.parametrize(
    ("value", "step", "settings"),
    [
        *((value, 2, {}) for value in (1e9, -1e9, torch.nan, torch.inf)),
        *((value, 3, {"dead_steps": 1, "dead_scales": "fault"}) for value in (-1e-3, -1.0)),
    ],
)
def test_step_sizes_that_are_none_are_named(value, step, settings):
    start = net("lsq", steps="absolute")
    with pytest.raises(qat.UsageError) as error:
        run(module(start, lr=1e-9), FaultGuard(**settings), Set(value), batches=data())
    began = step_size(start)
    where = f"behind step {step} the step size of {SITE} is {value:g} (entry 0 of {len(began)}), it began at {began[0].item():g}"
    assert str(error.value).startswith(f"training stopped: {where}; checkpoints are from before")


@pytest.mark.parametrize("value", [-1e-3, -1.0])
def test_of_dead_step_sizes_a_run_warns_once(value, caplog):
    run(module(net("lsq", steps="absolute"), lr=1e-9), FaultGuard(dead_steps=1), Set(value), batches=data())
    lines = [record.message for record in caplog.records if "step size" in record.message]
    assert len(lines) == 1
    assert lines[0].startswith(f"behind step 3 the step size of {SITE} is {value:g} (entry 0 of ")
    assert "no longer a step for 1 steps; a lower optimizer.lr, or a start from trained weights, may help" in lines[0]


def test_elsewhere_they_are_seen_at_the_next_look(monkeypatch):
    monkeypatch.setattr(finite, "_is_free", lambda tensor: False)
    with pytest.raises(qat.UsageError, match=rf"behind step 4 the step size of {SITE} is 1.*e\+09 \(entry 0"):
        run(module(net("lsq", steps="absolute"), lr=1e-4), FaultGuard(every_n_steps=4), Set(1e9), batches=data())


def test_one_of_many_may_be_at_zero_for_a_while():
    # An optimizer brings it back; from `dead_steps` on it is taken for lost.
    run(module(net("lsq", steps="absolute"), lr=1e-9), FaultGuard(), Set(0.0, entry=3), batches=data())
    with pytest.raises(qat.UsageError, match=rf"behind step 4 the step size of {SITE} is 0 \(entry 3 of"):
        run(module(net("lsq", steps="absolute"), lr=1e-9), FaultGuard(dead_steps=2, dead_scales="fault"), Set(0.0, entry=3), batches=data())


def test_one_that_begins_at_zero_is_let_be():
    start = net("lsq", steps="absolute")
    with torch.no_grad():
        step_size(start)[3] = 0.0
    run(module(start, lr=1e-9), FaultGuard(dead_steps=1), batches=data())
    with pytest.raises(qat.UsageError, match=rf"the step size of {SITE} is 1e\+09 \(entry 3 of .*, it began at 0;"):
        run(module(start, lr=1e-9), FaultGuard(), Set(1e9, entry=3), batches=data())


# --- half precision


def overflowing(name, bfloat16=True):
    """A net with a layer whose output leaves the range of bfloat16 (that of float32), or of float16."""
    start = net("lsq", steps="absolute") if name == "quantized" else vit()
    with torch.no_grad():
        start.blocks[0].mlp.fc1.bias.fill_(3.4e38 if bfloat16 else 1e6)
        start.blocks[0].mlp.fc1.weight.mul_(1e38 if bfloat16 else 1.0)
    return start


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_an_overflow_in_bfloat16_is_named(precision):
    with pytest.raises(qat.UsageError) as error:
        run(module(overflowing("float")), FaultGuard(), batches=data(), precision=precision)
    assert "step 0" in str(error.value)
    assert "first not finite: the output of blocks.0.mlp.fc1 (Linear); no step was taken" in str(error.value)


def test_an_overflow_that_a_quantizer_hides_is_named():
    learner = module(net("lsq", steps="absolute"), lr=1e-9)
    act = learner.net.blocks[0].mlp.act
    act.register_forward_hook(lambda module, args, output: torch.where(output > output.mean(), torch.inf, output.detach()).detach())
    run(copy.deepcopy(learner), FaultGuard(every_n_steps=2), batches=data())  # neither loss nor gradients show it
    with pytest.raises(qat.UsageError, match=r"step 0 overflows; first not finite: the output of blocks\.0\.mlp\.act \(GELU\)"):
        run(learner, FaultGuard(every_n_steps=2), batches=data(), precision="bf16-mixed")


def test_what_a_gradient_scaler_skips_is_counted_and_no_fault(place):
    logged = []

    class Look(Callback):
        def on_train_batch_end(self, trainer, *_):
            logged.append(trainer.logged_metrics.get("faults/skipped_by_scaler"))

    def scaled(scale, *callbacks, **settings):
        scaler = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))
        run(module(vit()), FaultGuard(**settings), *callbacks, batches=data(), plugins=[scaler])

    scaled(2.0**20, Look())
    assert int(logged[-1]) in range(1, 6)
    line = r"gradients of step 3 overflow in precision 16-mixed, whatever their scale; 4 steps in a row were skipped by the gradient scaler"
    with pytest.raises(qat.UsageError, match=line):
        scaled(2.0**60, max_in_a_row=4)


# --- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_in_a_row": 0}, r"max_in_a_row=0: must be an integer of at least 1"),
        ({"max_scale_change": 1}, r"max_scale_change=1: must be a number above 1"),
        ({"dead_steps": 0}, r"dead_steps=0: must be an integer of at least 1"),
        ({"dead_scales": "stop"}, r"dead_scales='stop': must be one of warn, fault"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(qat.UsageError, match=rf"^callbacks\.finite\.{message}$"):
        FaultGuard(**settings)
