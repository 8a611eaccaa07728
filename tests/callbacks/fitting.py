"""Short runs of a small net for the tests of callbacks."""

import contextlib
import copy

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader, TensorDataset

from qat.lit import QATModule, build_optimizer
from qat.losses import CompositeLoss, CrossEntropy
from qat.tasks import fit as parts
from tests.tiny import images, quantized

QUIET = {
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "logger": False,
}


def batches(size=4, n=16, labels=10):
    return DataLoader(TensorDataset(images(n), torch.arange(n) % labels), batch_size=size)


def module(net, lr=0.01, weight_decay=0.1, **settings):
    """A module on a copy of a net; `terms` are further loss terms."""
    loss = CompositeLoss({"ce": CrossEntropy(), **settings.pop("terms", {})})
    optimizer = settings.pop(
        "optimizer", lambda n: build_optimizer(n, lr=lr, weight_decay=weight_decay)
    )
    return QATModule(
        copy.deepcopy(net).train(), loss, num_classes=10, optimizer=optimizer, **settings
    )


def fit(learner, *callbacks, data=None, **settings):
    """Train two epochs of four steps."""
    trainer = Trainer(**{
        "accelerator": "cpu",
        "max_epochs": 2,
        "callbacks": list(callbacks),
        **QUIET,
        **settings,
    })
    trainer.fit(learner, batches() if data is None else data)
    return trainer


@contextlib.contextmanager
def added(*callbacks):
    """Runs of commands that begin meanwhile have these callbacks after those of their config."""
    make = parts.build_callbacks
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "build_callbacks", lambda cfg: [*make(cfg), *callbacks])
        yield


def weights(net):
    """Copies of all parameters by name."""
    return {name: p.detach().clone() for name, p in net.named_parameters()}


class Steps(Callback):
    """Weights before and after every optimizer step, rates and gradients of it; put after the callback that is tested."""

    def __init__(self):
        self.before, self.after, self.gradients, self.rates = [], [], [], []

    def on_fit_start(self, trainer, pl_module):
        trainer.optimizers[0].register_step_pre_hook(
            lambda *_: self.rates.append([g["lr"] for g in trainer.optimizers[0].param_groups])
        )

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.before.append(weights(pl_module.net))
        self.gradients.append({
            n: p.grad.clone() for n, p in pl_module.net.named_parameters() if p.grad is not None
        })

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step > len(self.after):
            self.after.append(weights(pl_module.net))


def moved(steps, t, name):
    """Where a parameter differs after step t from before it."""
    return steps.before[t][name] != steps.after[t][name]


def differing(a, b):
    """Names of entries of two state dicts that differ."""
    return sorted(
        n for n in a.keys() | b.keys() if n not in a or n not in b or not torch.equal(a[n], b[n])
    )


def net(preset="ofq", **knobs):
    """A quantized net of two blocks."""
    return quantized(preset, bits=2, **knobs)
