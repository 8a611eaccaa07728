"""A training step never waits for the device: the host needs no result of an operation.

A CPU waits for nobody, so the operations are looked for by name, while Lightning's own step runs; a number that is copied to the device has
no operation, so the functions that do it are looked for.
"""

import contextlib

import pytest
import torch
from lightning.pytorch import Callback
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import qat.kernels
from qat.callbacks import (
    CGA,
    EMAWeightAveraging,
    FiniteCheck,
    IterativeFreezing,
    Oscillation,
    finite,
)
from qat.lit import Teacher
from qat.losses import CrossEntropy, Distillation, Kure
from qat.nn.attention import set_execution
from tests.callbacks.fitting import fit, module, net
from tests.tiny import DISTILLED, vit

WAITING = {
    "_local_scalar_dense",
    "item",
    "is_nonzero",
    "nonzero",
    "equal",
    "masked_select",
    "_unique2",
    "unique_dim",
    "argwhere",
    "_to_cpu",
}


class NoWaiting(TorchDispatchMode):
    """Refuses operations that wait, but for numbers that an optimizer keeps on the host."""

    def __init__(self, optimizer):
        super().__init__()
        self.optimizer = optimizer

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._opname in WAITING and not any(
            args[0] is state.get("step") for state in self.optimizer.state.values()
        ):
            raise AssertionError(f"{func} waits for the device")
        if func._opname == "index" and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        ):
            raise AssertionError("an index of truth values has to be counted")
        return func(*args, **(kwargs or {}))


class NoCopies(TorchFunctionMode):
    """Refuses numbers that are put on the device: the copy waits for what runs there."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if (
            func in {torch.tensor, torch.as_tensor}
            and kwargs.get("device") is not None
            and not isinstance(args[0], torch.Tensor)
        ):
            raise AssertionError(f"{func.__name__}({args[0]}, device=...) waits for the device")
        return func(*args, **kwargs)


class Watched(Callback):
    """Every step but the first."""

    def __init__(self):
        self.mode, self.n = None, 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step:
            self.mode = contextlib.ExitStack()
            self.mode.enter_context(NoWaiting(trainer.optimizers[0]))
            self.mode.enter_context(NoCopies())

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.n += self.leave()

    def on_exception(self, trainer, pl_module, exception):
        self.leave()

    def leave(self):
        mode, self.mode = self.mode, None
        if mode is not None:
            mode.close()
        return mode is not None


@pytest.mark.parametrize(
    ("preset", "memory", "kernels"),
    [("ofq", "save", "auto"), ("ofq_noqkr", "recompute", "auto"), ("ofq", "save", "off")],
)
def test_no_step_waits(preset, memory, kernels, tmp_path, monkeypatch):
    monkeypatch.setattr(finite, "_reads_without_waiting", lambda module: False)  # as on a GPU
    student = set_execution(net(preset, name=DISTILLED), memory=memory)
    watched = Watched()
    qat.kernels.use(kernels)
    try:
        learner = module(student, terms={"kd": Distillation()}, teacher=Teacher(vit(DISTILLED)))
        fit(
            learner,
            watched,
            CGA(boundary_range=0.01),
            Oscillation(dirpath=str(tmp_path)),
            FiniteCheck(),
            EMAWeightAveraging(),
            gradient_clip_val=1.0,
            accumulate_grad_batches=2,
        )
    finally:
        qat.kernels.use("auto")
    assert watched.n == 6


def test_no_step_waits_that_regularizes_or_freezes():
    watched = Watched()
    learner = module(net(), terms={"kure": Kure()})
    fit(learner, IterativeFreezing(), watched, log_every_n_steps=1)
    assert watched.n == 7


class Reading(CrossEntropy):
    def forward(self, context):
        loss = super().forward(context)
        return loss * (1 if loss.detach() > 0 else 2)


class Copying(CrossEntropy):
    def forward(self, context):
        loss = super().forward(context)
        return loss * torch.tensor(2.0, device=loss.device)


@pytest.mark.parametrize("term", [Reading, Copying])
def test_one_that_waits_is_found(term):
    with pytest.raises(AssertionError, match="waits for the device"):
        fit(module(net(), terms={"ce": term()}), Watched())
