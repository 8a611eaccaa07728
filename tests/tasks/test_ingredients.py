"""Parts of training recipes for vision transformers, switched on by the config. Oracles: hand computation over the steps of the same run."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, LightningModule

from qat.callbacks import EMAWeightAveraging
from qat.tasks import fit
from tests.callbacks.fitting import added, weights
from tests.conftest import column, compose, evaluate, results, train
from tests.errors import usage_error

SGD = (
    "optimizer=sgd",
    "optimizer.opt=momentum",
    "optimizer.momentum=0",
    "optimizer.weight_decay=0",
    "scheduler.min_lr=0",
    "data.augment=none",
    "quant=fp",
)


class Steps(Callback):
    """Weights after every step, and what each step was given."""

    def __init__(self):
        self.weights, self.batches = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append([part.clone() for part in batch])

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.weights.append(weights(pl_module.net))


def watched(run_dir, *overrides):
    """Train, and return what `Steps` saw."""
    steps = Steps()
    with added(steps):
        train(run_dir, *overrides)
    return steps


def test_averaged_weights(tmp_path):
    averaged = ("callbacks=[default,ema]", "callbacks.ema.decay=0.5")
    steps = watched(tmp_path, *averaged, "trainer.limit_train_batches=4")
    average = steps.weights[0]
    for step in steps.weights[1:]:
        average = {name: 0.5 * average[name] + 0.5 * value for name, value in step.items()}
    file = torch.load(f"{tmp_path}/checkpoints/last.ckpt", weights_only=True)
    for name, value in average.items():
        torch.testing.assert_close(file["state_dict"][f"net.{name}"], value, rtol=0, atol=1e-6)
        assert torch.equal(file["current_model_state"][f"net.{name}"], steps.weights[-1][name])
    moved = max((average[n] - steps.weights[-1][n]).abs().max() for n in average)
    assert moved > 1e-5


def test_an_average_is_where_the_weights_are_trained():
    """Lightning makes it before the module is moved there."""
    module, average = LightningModule(), EMAWeightAveraging()
    module.layer = torch.nn.Linear(2, 2)
    average.setup(
        SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("meta"))), module, "fit"
    )
    assert {tensor.device.type for tensor in average._average_model.parameters()} == {"meta"}


def test_averages_end_with_the_training_and_are_not_dropped_on_resume(tmp_path):
    noisy = (
        "callbacks.best.monitor=val/loss",
        "callbacks.best.mode=min",
        "trainer.max_epochs=3",
        "optimizer.lr=1",
    )
    train(tmp_path / "run", "callbacks=[default,ema]", "callbacks.ema.decay=0", *noisy)
    found = evaluate(tmp_path / "best", f"ckpt={tmp_path}/run/checkpoints/best.ckpt", "split=val")
    assert results(tmp_path / "run")["val_top1"] == pytest.approx(found["top1"])
    with usage_error(
        r"resume: the run averages its weights; resume with callbacks=\[default,ema\]",
    ):
        train(tmp_path / "run", "resume=true", *noisy[:2], "trainer.max_epochs=4", "optimizer.lr=1")


def test_accumulated_batches_are_one_large_one(tmp_path):
    small = watched(
        tmp_path / "small",
        *SGD,
        "data.batch_size=32",
        "trainer.accumulate_grad_batches=4",
        "trainer.limit_train_batches=8",
    )
    large = watched(tmp_path / "large", *SGD, "data.batch_size=128")
    for name, value in large.weights[-1].items():
        torch.testing.assert_close(small.weights[-1][name], value, rtol=1e-5, atol=1e-6)
    assert len(small.weights) == 8
    assert any(
        (small.weights[2][n] != small.weights[3][n]).any() for n in small.weights[0]
    )  # a step after four batches
    assert all(
        torch.equal(small.weights[0][n], small.weights[2][n]) for n in small.weights[0]
    )  # and none before


def test_settings_reach_the_trainer():
    settings = ("trainer.gradient_clip_val=0.5", "trainer.precision=bf16-mixed")
    trainer = fit.build_trainer(compose("train", "run_dir=a", *settings), [], [])
    assert (trainer.gradient_clip_val, trainer.precision) == (0.5, "bf16-mixed")


def test_mixup_reaches_the_step(tmp_path):
    settings = ("data.augment=none", "trainer.limit_train_batches=4")
    steps = watched(tmp_path / "mixed", *settings, "data.mixup=0.8", "data.cutmix=1.0")
    plain = watched(tmp_path / "plain", *settings)
    for (mixed, target), (images, ids) in zip(steps.batches, plain.batches, strict=True):
        assert target.shape == (len(ids), 10)
        assert target.sum(1) == pytest.approx(torch.ones(len(ids)))
        one_hot = torch.nn.functional.one_hot(ids, 10)
        other = int((ids != ids.flip(0)).nonzero()[0])
        share = target[other, ids[other]]
        torch.testing.assert_close(
            target, share * one_hot + (1 - share) * one_hot.flip(0), atol=1e-6, rtol=0
        )
        assert not torch.equal(mixed, images)


def test_the_rate_follows_the_batch(tmp_path, caplog):
    caplog.set_level("INFO")
    scaling = (
        "optimizer.lr_base_batch=32",
        "data.batch_size=16",
        "trainer.accumulate_grad_batches=4",
        "trainer.limit_train_batches=4",
    )
    rates = ("optimizer.lr=0.001", "scheduler.min_lr=0.01", "trainer.log_every_n_steps=1")
    run_dir = train(tmp_path, *rates, *scaling)
    assert "global batch 64, adamw lr 0.002," in caplog.text
    assert "scheduler.min_lr=0.01: is above the learning rate 0.002 (optimizer.lr)" in caplog.text
    assert column(run_dir, "lr-AdamW/decay")[0] == pytest.approx(0.002)
