"""A complete training run from Python. Oracles: the run of `train.py` with the same settings, and what `eval.py` makes of the file."""

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint

import qat
from qat.data import Digits
from qat.lit import QATModule
from qat.losses import CrossEntropy, Distillation
from qat.model.checkpoint import read_checkpoint
from tests.callbacks.fitting import QUIET
from tests.conftest import evaluate, train
from tests.tiny import vit

# As in `tests.conftest.TINY`.
BRIEF = {**QUIET, "accelerator": "cpu", "max_epochs": 1, "limit_train_batches": 2}


@pytest.fixture(scope="module")
def start(float_run):
    return float_run / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="module")
def data(start):
    """The digits of the command."""
    settings = dict(qat.load(start).qat_data)
    assert settings.pop("_target_") == "qat.data.Digits"
    return Digits(**settings)


def student(start, data, recipe="seq_2bit"):
    net = qat.load_float(start)
    qat.convert(net, qat.recipe(recipe), input_size=data.input_size)
    return qat.initialize_scales(net, data.calibration_batches())


def fit(module, data, **settings):
    trainer = Trainer(**{**BRIEF, **settings})
    trainer.fit(module, data)
    return trainer


@pytest.mark.sample(1)
@pytest.mark.parametrize("loss", ["kd", "ce"])
def test_learns_what_the_command_learns(tmp_path, start, data, loss):
    run = train(tmp_path, "quant=seq_2bit", f"loss={loss}", f"ckpt={start}")
    expected = read_checkpoint(run / "checkpoints" / "last.ckpt").state
    teacher = qat.load(start) if loss == "kd" else None
    module = QATModule.for_data(student(start, data), data, teacher=teacher)
    fit(module, data)
    assert list(module.loss.terms) == [loss]
    found = module.net.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_commands_read_the_file(tmp_path, start, data):
    best = ModelCheckpoint(tmp_path, "best", monitor="val/top1", mode="max")
    module = QATModule.for_data(student(start, data), data)
    trainer = fit(module, data, callbacks=[best], enable_checkpointing=True)
    (expected,) = trainer.test(module, data, ckpt_path="best", verbose=False)
    found = evaluate(tmp_path / "eval", f"ckpt={tmp_path}/best.ckpt")
    assert (found["data"], found["split"], found["recipe"]["bits"]) == ("digits", "test", 2)
    assert found["top1"] == pytest.approx(expected["test/top1"], abs=1e-3)
    assert qat.load(tmp_path / "best.ckpt").qat_classes == list("0123456789")


def test_settings_reach_the_optimizer(data):
    terms = {"hard": CrossEntropy(label_smoothing=0.1)}
    module = QATModule.for_data(
        vit(), data, loss=terms, warmup_epochs=0.5, opt="sgd", lr=0.25, momentum=0.5
    )
    trainer = fit(module, data)
    (optimizer,) = trainer.optimizers
    assert type(optimizer).__name__ == "SGD"
    assert optimizer.defaults["momentum"] == 0.5
    (config,) = trainer.lr_scheduler_configs
    assert (config.scheduler.warmup_t, config.interval) == (1, "step")
    assert list(module.loss.terms) == ["hard"]


def test_a_low_learning_rate_does_not_rise(data):
    module = QATModule.for_data(vit(), data, lr=1e-6)
    trainer = fit(module, data)
    assert trainer.optimizers[0].param_groups[0]["lr"] <= 1e-6


def test_an_average_is_tested_without_the_callback_that_made_it(tmp_path, data):
    last = ModelCheckpoint(tmp_path, "last")
    module = QATModule.for_data(vit(), data)
    callbacks = [EMAWeightAveraging(decay=0.5), last]
    fit(module, data, callbacks=callbacks, enable_checkpointing=True)
    average = read_checkpoint(last.best_model_path).state["head.weight"]
    other = QATModule.for_data(vit(), data)
    assert not torch.equal(other.net.head.weight, average)
    Trainer(**BRIEF).test(other, data, ckpt_path=last.best_model_path, verbose=False)
    assert torch.equal(other.net.head.weight, average)


@pytest.mark.parametrize(
    ("classes", "settings", "message"),
    [
        (7, {}, r"^data\.num_classes=10: must be 7"),
        (10, {"loss": {"kd": Distillation()}}, "teacher=None: must be a model"),
        (10, {"warmup_epochs": 1}, r"^scheduler\.warmup_epochs=1"),
        (10, {"speed": 3}, r"optimizer\.speed=3"),
    ],
)
def test_mistakes_are_found_before_the_first_step(data, classes, settings, message):
    with pytest.raises(qat.UsageError, match=message):
        fit(QATModule.for_data(vit(num_classes=classes), data, **settings), data)
