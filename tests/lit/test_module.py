"""The training module in a real trainer. Oracles: one big batch, hand computation, the files that come out."""

import copy
import types

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from qat.lit import QATModule, Teacher, build_optimizer, cosine_schedule
from qat.lit.module import steps_per_epoch
from qat.lit.strategies import AtomicCheckpointIO
from qat.losses import CompositeLoss, CrossEntropy, Distillation
from tests.callbacks.fitting import QUIET, Steps, batches
from tests.errors import usage_error
from tests.tiny import DISTILLED, images, logits, quantized, vit

CLASSES = torch.arange(16) % 10


def trainer(**settings):
    return Trainer(**{
        "accelerator": "cpu",
        "max_epochs": 1,
        **QUIET,
        "plugins": [AtomicCheckpointIO()],
        **settings,
    })


def module(net, terms=None, **kwargs):
    loss = CompositeLoss({"ce": CrossEntropy()} if terms is None else terms)
    kwargs.setdefault("optimizer", lambda n: build_optimizer(n, lr=0.01, weight_decay=0.0))
    return QATModule(net.train(), loss, num_classes=10, **kwargs)


@pytest.mark.parametrize("batch", [1, 2], ids=["one batch left", "two left"])
def test_the_last_step_of_an_epoch_counts_its_own_batches(batch):
    """Four batches to a step, and five or six in the epoch. Oracle: a step on one batch of the images that are left."""
    net, left = quantized("lsq"), 2 * batch
    many, one = Steps(), Steps()
    still = {"optimizer": lambda n: build_optimizer(n, lr=1e-30, weight_decay=0.0)}
    trainer(callbacks=[many], accumulate_grad_batches=4).fit(
        module(copy.deepcopy(net), **still), batches(2, 8 + left)
    )
    rest = TensorDataset(images(8 + left)[8:], CLASSES[8 : 8 + left])
    trainer(callbacks=[one]).fit(
        module(copy.deepcopy(net), **still), DataLoader(rest, batch_size=left)
    )
    assert len(many.gradients) == 2
    assert_close(many.gradients[1], one.gradients[0], rtol=1e-4, atol=1e-6)


class Unfreeze(Callback):
    """Freezes the blocks before the optimizer is built; later they train, with a group of their own or without."""

    def __init__(self, *, group):
        self.group = group

    def setup(self, trainer, pl_module, stage):
        pl_module.net.blocks.requires_grad_(requires_grad=False)

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            pl_module.net.blocks.requires_grad_(requires_grad=True)
            if self.group:
                trainer.optimizers[0].add_param_group({
                    "params": list(pl_module.net.blocks.parameters())
                })


@pytest.mark.parametrize("group", [True, False])
def test_weights_that_are_unfrozen_during_the_run_are_refused(group):
    def run(epochs):
        trainer(max_epochs=epochs, callbacks=[Unfreeze(group=group)]).fit(module(vit()), batches(8))

    run(1)
    with usage_error("^callbacks: weights were unfrozen during the run"):
        run(2)


@pytest.mark.parametrize("preset", ["ofq", "ofq_noqkr", "lsq"])
def test_deviates_from_reference_scale_gradient_counts_the_global_batch(preset):
    # There the gradient of a scale grows by sqrt(parts) when a batch is split.
    net, whole, halves = quantized(preset), Steps(), Steps()
    trainer(callbacks=[whole]).fit(module(copy.deepcopy(net)), batches(16))
    trainer(callbacks=[halves], accumulate_grad_batches=2).fit(module(net), batches(8))
    assert len(whole.gradients) == len(halves.gradients) == 1
    found, expected = halves.gradients[0], whole.gradients[0]
    assert found.keys() == expected.keys()
    scales = [name for name in expected if name.endswith(".change")]
    assert len(scales) > 10
    for name in scales:
        error = (found[name] - expected[name]).norm() / expected[name].norm()
        assert error < 1e-5, name


@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_rates_follow_the_schedule(interval):
    seen = Steps()

    def schedule(optimizer, epochs, steps):
        assert (epochs, steps) == (3, 2)
        periods, warmup = (6, 2) if interval == "step" else (3, 1)
        return cosine_schedule(
            optimizer,
            periods=periods,
            warmup=warmup,
            min_lr=0.0,
            warmup_lr=0.002,
            interval=interval,
        ), interval

    trainer(max_epochs=3, callbacks=[seen]).fit(module(vit(), scheduler=schedule), batches(8))
    # 0.01/2 * (1 + cos(pi t/T)); the warm-up goes from 0.002 to 0.01.
    by_step = [0.002, 0.006, 0.0075, 0.005, 0.0025, 0.01 / 2 * (1 - 3**0.5 / 2)]
    by_epoch = [0.002, 0.002, 0.0075, 0.0075, 0.0025, 0.0025]
    assert [rates[0] for rates in seen.rates] == pytest.approx(
        by_step if interval == "step" else by_epoch
    )
    with usage_error("max_epochs=-1"):
        trainer(max_epochs=None, max_steps=2).fit(module(vit(), scheduler=schedule), batches(8))


@pytest.mark.parametrize("settings", [{}, {"max_steps": 3}])
def test_the_schedule_ends_with_the_epochs(settings):
    steps_of_an_epoch = []

    def schedule(optimizer, epochs, steps):
        steps_of_an_epoch.append(steps)
        return cosine_schedule(optimizer, periods=epochs * steps, interval="step"), "step"

    trainer(max_epochs=2, **settings).fit(module(vit(), scheduler=schedule), batches())
    assert steps_of_an_epoch == [4]


def test_the_loss_of_an_epoch_is_a_mean_over_images():
    """The last batch is smaller than the others; at this rate every batch sees the same weights."""
    learner = module(
        vit(),
        {"ce": CrossEntropy(weight=0.5)},
        optimizer=lambda n: build_optimizer(n, lr=1e-30, weight_decay=0.0),
    )
    run = trainer()
    run.fit(learner, batches(6))
    expected = torch.nn.functional.cross_entropy(learner.net(images(16)), CLASSES).detach()
    assert_close(run.callback_metrics["train/loss_ce"], expected)
    assert_close(run.callback_metrics["train/loss"], 0.5 * expected)


def test_accuracies_are_percentages_of_all_images():
    net = quantized("ofq", bits=2)
    answers = logits(net, images(16))
    run = trainer()
    tested = module(net)
    (found,) = run.test(tested, batches(5), verbose=False)
    assert torch.equal(tested.correct, answers.argmax(-1) == CLASSES)
    assert set(found) == {"test/top1", "test/top5", "test/loss"}
    top5 = (answers.topk(5).indices == CLASSES[:, None]).any(-1)
    assert found["test/top1"] == pytest.approx(
        100 * (answers.argmax(-1) == CLASSES).float().mean().item()
    )
    assert found["test/top5"] == pytest.approx(100 * top5.float().mean().item())
    assert found["test/loss"] == pytest.approx(
        -answers.log_softmax(-1)[torch.arange(16), CLASSES].mean().item(), rel=1e-5
    )


def test_deviates_from_reference_teacher_is_frozen(tmp_path):
    # There the teacher stays in train mode, with gradients.
    teacher_net, net = vit(DISTILLED).train(), quantized("ofq", name=DISTILLED)
    before = copy.deepcopy(teacher_net.state_dict())
    learner = module(net, {"kd": Distillation()}, teacher=Teacher(teacher_net))
    run = trainer()
    run.fit(learner, batches(8))
    run.save_checkpoint(tmp_path / "a.ckpt")
    of_teacher = {p.data_ptr() for p in teacher_net.parameters()}
    assert not any(p.data_ptr() in of_teacher for p in learner.parameters())
    assert not any(
        p.data_ptr() in of_teacher for g in run.optimizers[0].param_groups for p in g["params"]
    )
    assert not teacher_net.training
    assert all(p.grad is None for p in teacher_net.parameters())
    for name, tensor in teacher_net.state_dict().items():
        assert torch.equal(tensor, before[name])
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == {f"net.{name}" for name in net.state_dict()}


def test_both_heads_learn_from_a_teacher():
    net = quantized("ofq", name=DISTILLED)
    teacher, seen = vit(DISTILLED), Steps()
    trainer(callbacks=[seen]).fit(
        module(copy.deepcopy(net), {"kd": Distillation()}, teacher=Teacher(teacher)), batches(16)
    )
    net.set_distilled_training(True)
    cls, dist = net.train()(images(16))
    target = teacher.head(teacher.forward_features(images(16))[:, 0]).softmax(-1)
    loss = (
        -cls.log_softmax(-1)[torch.arange(16), CLASSES].mean()
        - (target * dist.log_softmax(-1)).sum(-1).mean()
    )
    heads = {f"{head}.bias": net.get_parameter(f"{head}.bias") for head in ("head", "head_dist")}
    for name, expected in zip(heads, torch.autograd.grad(loss, heads.values()), strict=True):
        assert_close(seen.gradients[0][name], expected)


def test_the_steps_of_an_epoch_whose_loader_has_no_length():
    training = types.SimpleNamespace(
        datamodule=types.SimpleNamespace(train_dataloader=lambda: iter(())),
        limit_train_batches=5,
        accumulate_grad_batches=2,
        val_check_interval=1.0,
        check_val_every_n_epoch=1,
    )
    assert steps_per_epoch(training) == 3
    training.limit_train_batches = 1.0
    with usage_error("^the train loader has no length"):
        steps_per_epoch(training)
