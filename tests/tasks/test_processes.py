"""Runs with several processes. Oracle: the same run in one process, with the same global batch."""

import logging
from dataclasses import replace

import pytest
import torch
from lightning.pytorch import Callback

from qat.data import Digits
from qat.launch import ranks
from qat.tasks.evaluate import evaluate
from qat.tasks.train import train
from qat.utils.files import csv_rows
from tests.callbacks.fitting import added
from tests.conftest import compose, results
from tests.processes import in_processes
from tests.tiny import identical

NET = (
    "model.args.embed_dim=24",
    "model.args.depth=2",
    "scheduler.warmup_epochs=0",
    "logger=[]",
)
TEN_STEPS = (
    "optimizer.opt=sgd",
    "optimizer.lr=0.03",
    "trainer.max_epochs=1",
    "trainer.limit_train_batches=10",
    "trainer.limit_val_batches=0",
    "callbacks.best=null",
    "data.calibration_images=64",
)


READ = Digits.read


class Notes(Callback):
    """Writes what a process had in its first step and at its end."""

    def __init__(self, folder):
        self.folder, self.steps = folder, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        weights = {name: value.clone() for name, value in pl_module.net.state_dict().items()}
        self.steps.append({"images": batch[0].clone(), "net": weights})

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == 0:
            gradients = {
                name: value.grad.clone()
                for name, value in pl_module.net.named_parameters()
                if value.grad is not None
            }
            torch.save(gradients, self.folder / f"gradients-{trainer.global_rank}.pt")

    def on_train_end(self, trainer, pl_module):
        states = {type(callback).__name__: callback.state_dict() for callback in trainer.callbacks}
        kept = {
            name: state
            for name, state in states.items()
            if name in {"Oscillation", "IterativeFreezing"}
        }
        torch.save(
            {"net": pl_module.net.state_dict(), "states": kept, "steps": self.steps},
            self.folder / f"end-{trainer.global_rank}.pt",
        )


def run(folder, *overrides):
    folder.mkdir(exist_ok=True)
    with added(Notes(folder)):
        train(compose("train", f"run_dir={folder}", *NET, *overrides))
    return folder


def run_in(count, folder, *overrides):
    folder.mkdir(exist_ok=True)
    assert (
        in_processes(
            count, run, folder, f"trainer.devices={count}", "trainer.strategy=ddp", *overrides
        )
        == [""] * count
    )
    return folder


def note(folder, name, rank=0):
    return torch.load(folder / f"{name}-{rank}.pt", weights_only=True)


def known(noted):
    """What processes have to agree on: not the images that one of them watches for its activations."""
    return {
        name: leaf
        for name, leaf in leaves({"net": noted["net"], "states": noted["states"]}).items()
        if "/activations/" not in name
    }


def leaves(node, prefix=""):
    """Tensors of nested dicts and lists by their paths."""
    if isinstance(node, torch.Tensor):
        return {prefix: node}
    items = (
        node.items()
        if isinstance(node, dict)
        else enumerate(node)
        if isinstance(node, list | tuple)
        else ()
    )
    return {
        name: leaf
        for key, value in items
        for name, leaf in leaves(value, f"{prefix}/{key}").items()
    }


def farthest(found, expected):
    return max(
        float((found[name].float() - value.float()).abs().max()) for name, value in expected.items()
    )


# In none of these runs does a value lie on a tie: all that differs is the order in which float32 numbers are added.
@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("quant", "seed"), [("ofq_2bit", 0), ("lsq_2bit", 2), ("ofq_2bit", 1), ("ofq_noqkr_4bit", 3)]
)
def test_two_processes_equal_one(tmp_path, quant, seed):
    settings = (f"quant={quant}", f"seed={seed}", *TEN_STEPS)
    one = run(tmp_path / "one", *settings, "data.batch_size=120")
    two = run_in(2, tmp_path / "two", *settings, "data.batch_size=60")
    expected, found = note(one, "gradients"), note(two, "gradients")
    assert found.keys() == expected.keys()
    # What is added to every key moves no softmax: where none is clipped that offset's gradient is zero, and what is seen of it rounding.
    nothing = 1e-9 * max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        blind = (
            name.endswith("k_quantizer.offset_before")
            and max(gradient.abs().max(), found[name].abs().max()) <= nothing
        )
        assert blind or (found[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name
    first, second, alone = (
        note(two, "end")["net"],
        note(two, "end", 1)["net"],
        note(one, "end")["net"],
    )
    assert identical(first, second)
    assert farthest(first, alone) <= 1e-5
    assert (
        farthest(note(one, "end")["steps"][0]["net"], alone) > 1e-3
    )  # so far have the weights moved


@pytest.mark.long
def test_what_callbacks_know_is_the_same_in_all_processes(tmp_path):
    callbacks = (
        "callbacks=[default,cga,oscillation,ema]",
        "callbacks.cga.start_epoch=0",
        "callbacks.cga.epochs=1",
        "callbacks.cga.lr=0.05",
    )
    frozen = (
        "callbacks=[default,oscillation,freeze]",
        "callbacks.freeze.threshold=0.02",
        "callbacks.freeze.momentum=0.1",
    )
    sgd = ("optimizer.opt=sgd", "optimizer.lr=0.03", "trainer.max_epochs=1")
    for number, chosen in enumerate((callbacks, frozen)):
        one = run(tmp_path / f"one{number}", *chosen, *sgd, "data.batch_size=120")
        two = run_in(2, tmp_path / f"two{number}", *chosen, *sgd, "data.batch_size=60")
        first, second, alone = (
            known(note(folder, "end", rank)) for folder, rank in ((two, 0), (two, 1), (one, 0))
        )
        assert first.keys() == second.keys() == alone.keys()
        assert any("/states/" in name for name in first)
        assert identical(first, second)
        assert farthest(first, alone) <= 1e-5


def with_images(**counts):
    """`Digits.read` with fewer images in some splits."""

    def read(self):
        splits = READ(self)
        for name, count in counts.items():
            images, labels = splits[name].images[:count], splits[name].labels[:count]
            splits[name] = replace(splits[name], images=images, labels=labels)
        return splits

    return read


# Validation and test images whose number no number of processes divides.
odd = with_images(val=37, test=53)


@pytest.mark.long
@pytest.mark.parametrize("model", ["vit_tiny_demo", "resnet_tiny_demo"])
def test_each_image_is_validated_once(tmp_path, monkeypatch, model):
    monkeypatch.setattr(Digits, "read", odd)
    # 37 images in two processes are batches of 16, 3 and 16, 2; in three, one has a batch more than another: 13 images, 12, 12.
    args = (
        ()
        if model == "vit_tiny_demo"
        else (f"model={model}", "quant=fp", "callbacks=[default,ema]")
    )
    settings = [
        *args,
        "optimizer.opt=sgd",
        "optimizer.lr=0.1",
        "trainer.max_epochs=1",
        "trainer.limit_train_batches=2",
    ]
    one = _train(tmp_path / "one", *settings, "data.batch_size=24")
    for count, batch in ((2, 12), (3, 8)):
        folder = tmp_path / str(count)
        errors = in_processes(
            count,
            _train,
            folder,
            *settings,
            f"data.batch_size={batch}",
            f"trainer.devices={count}",
            "trainer.strategy=ddp",
        )
        assert errors == [""] * count
        found, expected = results(folder), results(one)
        if model == "vit_tiny_demo":
            assert {key: found[key] for key in ("top1", "top5", "val_top1")} == {
                key: expected[key] for key in ("top1", "top5", "val_top1")
            }
            assert found["loss"] == pytest.approx(expected["loss"], abs=1e-6)
        # A share of 37 images, not of 38 or 39.
        assert found["val_top1"] * 37 / 100 == pytest.approx(
            round(found["val_top1"] * 37 / 100), abs=1e-4
        )
        assert found["top1"] * 53 / 100 == pytest.approx(round(found["top1"] * 53 / 100), abs=1e-4)
        # All processes have validated the net that is in the file, whose batch norms have the mean of their statistics.
        again = folder / "again"
        evaluate(
            compose(
                "eval",
                f"run_dir={again}",
                f"ckpt={folder / 'checkpoints' / 'last.ckpt'}",
                "split=val",
            )
        )
        (loss,) = (row["val/loss"] for row in csv_rows(folder / "metrics.csv") if row["val/loss"])
        assert results(again)["loss"] == pytest.approx(float(loss), abs=1e-5)


def _train(folder, *overrides):
    folder.mkdir(exist_ok=True)
    if ranks.is_first():
        logging.basicConfig(filename=folder / "said.txt", level=logging.INFO, force=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Digits, "read", odd)
        train(compose("train", f"run_dir={folder}", "scheduler.warmup_epochs=0", *overrides))
    return folder


def run_and_kill(folder, *overrides):
    """Run up to the fourth step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Notes, "on_before_backward", kill_behind_four)
        with pytest.raises(KilledError):
            run(folder, *overrides)


class KilledError(Exception):
    """Stands for a kill."""


def kill_behind_four(self, trainer, pl_module, loss):
    if trainer.global_step == 4:
        raise KilledError


@pytest.mark.long
def test_a_run_goes_on_in_another_number_of_processes(tmp_path):
    settings = (*TEN_STEPS, "trainer.limit_train_batches=1.0", "checkpoint.every_n_steps=1")
    whole, part = run(tmp_path / "whole", *settings, "data.batch_size=120"), tmp_path / "part"
    run_and_kill(part, *settings, "data.batch_size=120")
    run_in(2, part, *settings, "data.batch_size=60", "resume=true")
    assert farthest(note(part, "end")["net"], note(whole, "end")["net"]) <= 1e-5
    run_and_kill(tmp_path / "odd", *settings, "data.batch_size=120")
    rest = ("data.batch_size=64", "resume=true", "trainer.devices=2", "trainer.strategy=ddp")
    errors = in_processes(2, run, tmp_path / "odd", *settings, *rest)
    message = "resume: data.batch_size=64 in 2 processes: batch size x processes must stay 120 until this epoch ends"
    assert all(message in error for error in errors)
