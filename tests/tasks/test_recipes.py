"""The published recipes. Oracles: the table of the paper's scripts, learning rates from that code (tests/goldens), and small runs."""

import logging
import math
import re

import pytest
import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

import qat
from qat.tasks import build, conf, fit
from tests import golden
from tests.conftest import compose, results

# Net and widths of a published row; with `_cga` its second stage.
ROWS = [f"{model}_w{bits}a{bits}" for model in ("deit_t", "deit_s", "swin_t") for bits in (2, 3, 4)]
SMALL = {
    "deit": ("++model.args.embed_dim=24", "++model.args.depth=1", "++model.args.num_heads=3"),
    "swin": (
        "++model.args.embed_dim=8",
        "++model.args.depths=[2,1,1,1]",
        "++model.args.num_heads=[1,1,2,2]",
    ),
}
# Rows that share a schedule, by the golden case that has it.
SCHEDULES = {
    "deit_w2": ["deit_t_w2a2", "deit_t_w3a3", "deit_t_w4a4", "deit_s_w2a2"],
    "deit_s_w3": ["deit_s_w3a3", "deit_s_w4a4"],
    "swin_w2": ["swin_t_w2a2"],
    "swin_w3": ["swin_t_w3a3", "swin_t_w4a4"],
}
GPUS = {"deit_w2": 4, "deit_s_w3": 8, "swin_w2": 8, "swin_w3": 8}
COLUMNS = (
    "data.batch_size",
    "optimizer.weight_decay",
    "data.mixup",
    "data.cutmix",
    "loss.label_smoothing",
    "data.repeats",
)
# Source: train_scripts and configs of nbasyl/OFQ 7ed37d1.
TABLE = {
    "deit_t_w2a2": (140, 0.05, 0, 0, 0.0, 1),
    "deit_t_w3a3": (140, 0.05, 0, 0, 0.0, 1),
    "deit_t_w4a4": (140, 0.05, 0, 0, 0.0, 1),
    "deit_s_w2a2": (140, 0.05, 0, 0, 0.0, 1),
    "deit_s_w3a3": (100, 0.0, 0.8, 1.0, 0.1, 3),
    "deit_s_w4a4": (100, 0.0, 0.8, 1.0, 0.1, 3),
    "swin_t_w2a2": (64, 0.05, 0, 0, 0.0, 1),
    "swin_t_w3a3": (64, 0.0, 0.8, 1.0, 0.1, 1),
    "swin_t_w4a4": (64, 0.0, 0.8, 1.0, 0.1, 1),
}


def chosen(row):
    model, widths = re.fullmatch(r"(\w+?)_(w\da\d(?:_cga)?)", row).groups()
    return f"experiment=ofq_{widths}", f"model={model}"


def recipe_of(row, *overrides):
    return compose("train", *chosen(row), "run_dir=a", *overrides)


class Processes:
    """As much of a trainer as the learning rate needs."""

    accumulate_grad_batches = 1

    def __init__(self, world_size):
        self.world_size = world_size


def rates(name, world_size):
    """Learning rate of each epoch, on the way that a run takes from its config."""
    cfg = recipe_of(name)
    optimizer = fit.build_optimizer_factory(cfg, Processes(world_size))(nn.Linear(2, 2))
    schedule, interval = fit.build_scheduler_factory(cfg)(optimizer, cfg.trainer.max_epochs, 1000)
    assert interval == "epoch"
    found = []
    for epoch in range(cfg.trainer.max_epochs):
        schedule.step(epoch)
        found.append(optimizer.param_groups[0]["lr"])
    return found


@pytest.mark.sample(2)
@pytest.mark.golden
@pytest.mark.parametrize(
    ("case", "row"),
    [
        (case, row)
        for case in golden.cases(golden.OFQ, r"lr_.*")
        for row in SCHEDULES[case.removeprefix("lr_")]
    ],
)
def test_learning_rates_of_both_stages(case, row):
    expected = golden.ofq(case, "lr_per_epoch").double().tolist()
    count = GPUS[case.removeprefix("lr_")]
    assert rates(row, count) + rates(f"{row}_cga", count) == pytest.approx(expected, rel=1e-6)


@pytest.mark.sample(6)
@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("stage", ["", "_cga"])
def test_deviates_from_reference_every_setting_of_a_row_arrives(row, stage):
    # There a blank ends the command of DeiT-S W4A4 before bits, QKR and distillation.
    cfg = recipe_of(row + stage)
    expected = dict(zip(COLUMNS, TABLE[row], strict=True)) | {
        "data.augment": "timm",
        "data.rand_augment": "rand-m9-mstd0.5-inc1",
        "data.random_erasing": 0.25,
        "optimizer.opt": "adamw",
        "optimizer.betas": [0.9, 0.999],
        "optimizer.eps": 1e-8,
        "seed": 42,
        "quant.name": "ofq",
        "quant.attention": "qkr",
        "quant.bits": int(row[-1]),
        "quant.act_bits": None,
        "trainer.precision": "32-true",
        "trainer.gradient_clip_val": None,
        "model.args.drop_path_rate": 0.0,
        "loss.teacher_head": "cls",
    }
    assert {name: OmegaConf.select(cfg, name) for name in expected} == expected
    assert (cfg.quant.map_scales == "column") == row.startswith("swin")
    assert list(cfg.loss.terms) == ["kd"]


def test_the_second_stage_anneals_from_its_first_step():
    cfg = recipe_of("deit_t_w2a2_cga")
    expected = {
        "trainer.max_epochs": 30,
        "callbacks.cga.boundary_range": 0.005,
        "callbacks.cga.start_epoch": 0,
        "model.pretrained": False,
        "teacher.pretrained": True,
    }
    assert {name: OmegaConf.select(cfg, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("typed", "pretrained"),
    [
        ("", True),
        ("ckpt=a", False),
        ("model.weights=a", False),
        ("trainer.fast_dev_run=true", False),
    ],
)
def test_pretrained_weights_unless_another_start_is_given(typed, pretrained):
    assert recipe_of("swin_t_w2a2", *typed.split()).model.pretrained is pretrained


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("model=vit_b", "no published settings; model must be one of deit_t, deit_s, swin_t"),
        ("model=deit_s quant.bits=8", "for model=deit_s at quant.bits=8; must be one of 2, 3, 4"),
    ],
)
def test_a_net_without_a_published_row_is_refused_by_name(settings, message):
    cfg = compose("train", "experiment=ofq_w2a2", *settings.split(), "run_dir=a")
    with pytest.raises(OmegaConfBaseException, match=message):
        OmegaConf.to_container(cfg, resolve=True)


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("family", "rate"),
    [
        ("deit", "global batch 140, adamw lr 0.000137,"),
        ("swin", "global batch 64, adamw lr 6.25e-05,"),
    ],
)
def test_a_dry_run_needs_neither_downloads_nor_a_teacher(tmp_path, family, rate, caplog):
    from qat.tasks.train import train

    dry = ("data=digits", "trainer.fast_dev_run=true", f"run_dir={tmp_path}", *SMALL[family])
    with caplog.at_level(logging.INFO):
        train(recipe_of(f"{family}_t_w2a2", *dry))
    assert results(tmp_path)["weights"] == "final"
    assert (
        "no teacher: this dry run (trainer.fast_dev_run) uses random weights as the teacher"
        in caplog.text
    )
    assert rate in caplog.text


@pytest.mark.long
@pytest.mark.parametrize("family", ["deit", "swin"])
def test_both_stages_of_a_row(tmp_path, family):
    from qat.tasks.train import train

    row = {"deit": "deit_s_w3a3", "swin": "swin_t_w3a3"}[family]
    short = "data=digits data.batch_size=16 trainer.max_epochs=1 trainer.limit_train_batches=2"
    short += " trainer.limit_val_batches=1 scheduler.warmup_epochs=0 scheduler.cooldown_epochs=0"
    small = [*short.split(), *SMALL[family]]
    torch.manual_seed(0)
    float_net = build.build_start(
        compose("train", *chosen(row), *small, "model.pretrained=false", "run_dir=a")
    ).net
    qat.save(float_net, tmp_path / "float.ckpt")
    train(
        recipe_of(row, *small, f"ckpt={tmp_path / 'float.ckpt'}", f"run_dir={tmp_path / 'first'}")
    )
    first = tmp_path / "first" / "checkpoints" / "last.ckpt"
    train(
        recipe_of(
            f"{row}_cga",
            *small,
            f"ckpt={first}",
            f"teacher.ckpt={tmp_path / 'float.ckpt'}",
            f"run_dir={tmp_path / 'second'}",
        )
    )
    before, after = (
        qat.load(first).state_dict(),
        qat.load(f"{tmp_path}/second/checkpoints/last.ckpt").state_dict(),
    )
    weight = next(name for name in before if name.endswith("mlp.fc1.weight"))
    moved = (before[weight] != after[weight]).float().mean().item()
    assert 0 < moved < 0.1, "most weights are frozen"
    bias = weight.replace("weight", "bias")
    assert not torch.equal(before[bias], after[bias])


@pytest.mark.parametrize(
    ("size", "wanted", "patch"),
    [(224, None, 4), (224, 4, 4), (32, 4, 4), (8, 4, 1), (28, 4, 2), (16, 4, 2), (4, 4, 1)],
)
def test_patch_of_a_swin(size, wanted, patch):
    assert conf.swin_patch(size, wanted) == patch


@pytest.mark.parametrize(
    ("size", "patch", "own", "window"),
    [(224, 4, 7, 7), (256, 4, 8, 8), (256, 4, 7, 4), (32, 4, 7, 4), (28, 2, 7, 7), (8, 1, 8, 4)],
)
def test_window_of_a_swin(size, patch, own, window):
    assert conf.swin_window(size, patch, own) == window


def test_cooldown_is_part_of_the_epochs(refused, tmp_path):
    cfg = compose(
        "train",
        "trainer.max_epochs=12",
        "scheduler.cooldown_epochs=2",
        "scheduler.interval=epoch",
        "run_dir=a",
    )
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    schedule, _ = fit.build_scheduler_factory(cfg)(optimizer, 12, 5)
    schedule.step(5)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(
        1e-5 + (0.1 - 1e-5) / 2 * (1 + math.cos(math.pi / 2))
    )
    schedule.step(10)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-5)
    bad = compose(
        "train",
        "trainer.max_epochs=3",
        "scheduler.warmup_epochs=1",
        "scheduler.cooldown_epochs=2",
        f"run_dir={tmp_path}",
    )
    assert (
        refused(bad) == "error: scheduler.cooldown_epochs=2.0: must be a number from 0 to below 2"
    )
