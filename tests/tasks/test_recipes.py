"""The published recipes. Oracles: the table of the paper's scripts, learning rates from that code (tests/goldens), and small runs."""

import logging
import math
import re
import subprocess
import sys

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

import qat
from qat.tasks import build, fit, resolvers
from tests import golden
from tests.conftest import ROOT, compose, results

NAMES = {
    "deit_t": "deit_tiny_distilled_patch16_224",
    "deit_s": "deit_small_distilled_patch16_224",
    "swin_t": "swin_tiny_patch4_window7_224",
}
ROWS = [(f"ofq_w{bits}a{bits}", model) for model in NAMES for bits in (2, 3, 4)]
SMALL = {
    "deit": ("++model.args.embed_dim=24", "++model.args.depth=1", "++model.args.num_heads=3"),
    "swin": ("++model.args.embed_dim=8", "++model.args.depths=[2,1,1,1]", "++model.args.num_heads=[1,1,2,2]"),
}
# Rows that share a schedule, by the golden case that has it.
SCHEDULES = {
    "deit_w2": [*((f"ofq_w{bits}a{bits}", "deit_t") for bits in (2, 3, 4)), ("ofq_w2a2", "deit_s")],
    "deit_s_w3": [("ofq_w3a3", "deit_s"), ("ofq_w4a4", "deit_s")],
    "swin_w2": [("ofq_w2a2", "swin_t")],
    "swin_w3": [("ofq_w3a3", "swin_t"), ("ofq_w4a4", "swin_t")],
}
GPUS = {"deit_w2": 4, "deit_s_w3": 8, "swin_w2": 8, "swin_w3": 8}
# Source: train_scripts and configs of nbasyl/OFQ 7ed37d1: GPUs x batch, weight decay, mixup, cutmix, smoothing, repeated augmentation.
TABLE = {
    ("ofq_w2a2", "deit_t"): (140, 0.05, 0, 0, 0.0, 1),
    ("ofq_w3a3", "deit_t"): (140, 0.05, 0, 0, 0.0, 1),
    ("ofq_w4a4", "deit_t"): (140, 0.05, 0, 0, 0.0, 1),
    ("ofq_w2a2", "deit_s"): (140, 0.05, 0, 0, 0.0, 1),
    ("ofq_w3a3", "deit_s"): (100, 0.0, 0.8, 1.0, 0.1, 3),
    ("ofq_w4a4", "deit_s"): (100, 0.0, 0.8, 1.0, 0.1, 3),
    ("ofq_w2a2", "swin_t"): (64, 0.05, 0, 0, 0.0, 1),
    ("ofq_w3a3", "swin_t"): (64, 0.0, 0.8, 1.0, 0.1, 1),
    ("ofq_w4a4", "swin_t"): (64, 0.0, 0.8, 1.0, 0.1, 1),
}


def recipe_of(name, model, *overrides):
    return compose("train", f"experiment={name}", f"model={model}", "run_dir=a", *overrides)


class Processes:
    """As much of a trainer as the learning rate needs."""

    accumulate_grad_batches = 1

    def __init__(self, world_size):
        self.world_size = world_size


def rates(name, model, world_size):
    """Learning rate of each epoch, on the way that a run takes from its config."""
    cfg = recipe_of(name, model)
    optimizer = fit.build_optimizer_factory(cfg, Processes(world_size))(nn.Linear(2, 2))
    schedule, interval = fit.build_scheduler_factory(cfg)(optimizer, cfg.trainer.max_epochs, 1000)
    assert interval == "epoch"
    found = []
    for epoch in range(cfg.trainer.max_epochs):
        schedule.step(epoch)
        found.append(optimizer.param_groups[0]["lr"])
    return found


@pytest.mark.golden
@pytest.mark.parametrize("case", golden.cases("ofq_goldens.npz", r"lr_.*"))
def test_learning_rates_of_both_stages(case):
    expected = golden.tensor("ofq_goldens.npz", f"{case}/lr_per_epoch").double().tolist()
    kind = case.removeprefix("lr_")
    for row, model in SCHEDULES[kind]:
        assert rates(row, model, GPUS[kind]) + rates(f"{row}_cga", model, GPUS[kind]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("row", "model"), ROWS)
@pytest.mark.parametrize("stage", ["", "_cga"])
def test_settings_are_the_published_ones(row, model, stage):
    cfg = recipe_of(row + stage, model)
    found = (cfg.data.batch_size, cfg.optimizer.weight_decay, cfg.data.mixup, cfg.data.cutmix, cfg.loss.label_smoothing, cfg.data.repeats)
    assert found == TABLE[row, model]
    assert cfg.model.name == NAMES[model]
    assert (cfg.data.augment, cfg.data.rand_augment, cfg.data.random_erasing) == ("timm", "rand-m9-mstd0.5-inc1", 0.25)
    assert (cfg.optimizer.opt, list(cfg.optimizer.betas), cfg.optimizer.eps, cfg.seed) == ("adamw", [0.9, 0.999], 1e-8, 42)
    assert (cfg.quant.name, f"w{cfg.quant.bits}a{cfg.quant.act_bits}") == ("ofq", row[-4:])
    assert (cfg.quant.map_scales == "column") == (model == "swin_t")
    assert (cfg.trainer.precision, cfg.trainer.gradient_clip_val, cfg.model.args.drop_path_rate) == ("32-true", None, 0.0)
    assert list(cfg.loss.terms) == ["kd"]
    assert cfg.loss.teacher_head == "cls"


def test_the_second_stage_anneals_from_its_first_step():
    cfg = recipe_of("ofq_w2a2_cga", "deit_t")
    assert (cfg.trainer.max_epochs, cfg.callbacks.cga.boundary_range, cfg.callbacks.cga.start_epoch) == (30, 0.005, 0)
    assert (cfg.ckpt_optimizer, cfg.model.pretrained, cfg.teacher.pretrained) == (True, False, True)


@pytest.mark.parametrize(
    ("overrides", "pretrained"),
    [([], True), (["ckpt=a"], False), (["model.weights=a"], False), (["trainer.fast_dev_run=true"], False)],
)
def test_pretrained_weights_unless_another_start_is_given(overrides, pretrained):
    assert recipe_of("ofq_w2a2", "swin_t", *overrides).model.pretrained is pretrained


@pytest.mark.parametrize(("row", "model"), ROWS)
@pytest.mark.parametrize("stage", ["", "_cga"])
def test_the_command_in_the_header_composes(row, model, stage):
    header = (ROOT / "conf" / "experiment" / f"{row}{stage}.yaml").read_text()
    line = header.partition("#   python train.py ")[2].partition("\n")[0]
    first = header if not stage else (ROOT / "conf" / "experiment" / f"{row}.yaml").read_text()
    devices, batch = map(int, re.search(rf"# GPUs x batch:.* {model} (\d+) x (\d+)", first).groups())
    cfg = compose("train", "run_dir=a", *line.replace("MODEL", model).replace("GPUS", str(devices)).split())
    assert OmegaConf.missing_keys(cfg) == set()
    assert cfg.data.batch_size == batch
    assert cfg.optimizer.lr_base_batch == (None if stage else devices * batch)
    assert (cfg.ckpt is not None) == bool(stage)


@pytest.mark.parametrize("model", ["vit_tiny_demo", "deit_b"])
def test_a_model_without_a_row_is_one_line(model):
    done = subprocess.run(
        [sys.executable, "train.py", "experiment=ofq_w3a3_cga", f"model={model}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.strip() == f"error: model={model}: must be one of deit_s, deit_t, swin_t, which have a published row of these bits"


@pytest.mark.parametrize("family", ["deit", "swin"])
def test_a_dry_run_needs_neither_downloads_nor_a_teacher(tmp_path, family, caplog):
    from qat.tasks.train import train

    with caplog.at_level(logging.INFO):
        train(recipe_of("ofq_w2a2", f"{family}_t", "data=digits", "trainer.fast_dev_run=true", f"run_dir={tmp_path}", *SMALL[family]))
    assert results(tmp_path)["weights"] == "final"
    assert "no teacher: random weights stand in for it, which only a dry run (trainer.fast_dev_run) may do" in caplog.text
    batch = 140 if family == "deit" else 64
    base, lr = (560, "0.000547") if family == "deit" else (512, "0.0005")
    assert f"global batch {batch}, adamw lr {float(lr) * batch / base:.3g} ({lr} x {batch}/{base})" in caplog.text


def test_without_a_dry_run_there_has_to_be_a_teacher(tmp_path, refused):
    cfg = recipe_of(
        "ofq_w2a2", "deit_t", "data=digits", "model.pretrained=false", f"run_dir={tmp_path}", *SMALL["deit"], "trainer.max_epochs=20"
    )
    assert "no teacher; give teacher.ckpt=FILE" in refused("train", cfg)


@pytest.mark.parametrize("family", ["deit", pytest.param("swin", marks=pytest.mark.long)])
def test_both_stages_of_a_row(tmp_path, family):
    from qat.tasks.train import train

    row, model = "ofq_w3a3", "deit_s" if family == "deit" else "swin_t"
    small = [
        *("data=digits", "data.batch_size=16", "trainer.max_epochs=1", "trainer.limit_train_batches=2", "trainer.limit_val_batches=1"),
        *("scheduler.warmup_epochs=0", "scheduler.cooldown_epochs=0", *SMALL[family]),
    ]
    float_net = build.build_start(recipe_of(row, model, *small, "model.pretrained=false")).net
    qat.save(float_net, tmp_path / "float.ckpt")
    train(recipe_of(row, model, *small, f"ckpt={tmp_path / 'float.ckpt'}", f"run_dir={tmp_path / 'first'}"))
    first = tmp_path / "first" / "checkpoints" / "last.ckpt"
    train(
        recipe_of(f"{row}_cga", model, *small, f"ckpt={first}", f"teacher.ckpt={tmp_path / 'float.ckpt'}", f"run_dir={tmp_path / 'second'}")
    )
    before, after = qat.load(first).state_dict(), qat.load(tmp_path / "second" / "checkpoints" / "last.ckpt").state_dict()
    weight = next(name for name in before if name.endswith("mlp.fc1.weight"))
    moved = (before[weight] != after[weight]).float().mean().item()
    assert 0 < moved < 0.1, "most weights are frozen"
    bias = weight.replace("weight", "bias")
    assert not torch.equal(before[bias], after[bias])


@pytest.mark.parametrize(
    ("size", "wanted", "patch"), [(224, None, 4), (224, 4, 4), (32, 4, 4), (8, 4, 1), (28, 4, 2), (16, 4, 2), (4, 4, 1)]
)
def test_patch_of_a_swin(size, wanted, patch):
    assert resolvers.swin_patch(size, wanted) == patch


@pytest.mark.parametrize(
    ("size", "patch", "own", "window"), [(224, 4, 7, 7), (256, 4, 8, 8), (256, 4, 7, 4), (32, 4, 7, 4), (28, 2, 7, 7), (8, 1, 8, 4)]
)
def test_window_of_a_swin(size, patch, own, window):
    assert resolvers.swin_window(size, patch, own) == window


def test_cooldown_is_part_of_the_epochs(refused, tmp_path):
    cfg = compose("train", "trainer.max_epochs=12", "scheduler.cooldown_epochs=2", "scheduler.interval=epoch", "run_dir=a")
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    schedule, _ = fit.build_scheduler_factory(cfg)(optimizer, 12, 5)
    schedule.step(5)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-5 + (0.1 - 1e-5) / 2 * (1 + math.cos(math.pi / 2)))
    schedule.step(10)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-5)
    bad = compose("train", "trainer.max_epochs=3", "scheduler.warmup_epochs=1", "scheduler.cooldown_epochs=2", f"run_dir={tmp_path}")
    assert refused("train", bad) == "error: scheduler.cooldown_epochs=2: must be a number from 0 to below 2"
