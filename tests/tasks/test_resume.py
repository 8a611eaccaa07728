"""A run that was stopped goes on as if nothing had happened. Oracle: the same run, uninterrupted."""

import csv
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from lightning.pytorch import Callback

import qat
from qat.tasks import fit
from tests.conftest import ROOT, compose, results

# Nine steps an epoch, three epochs. Order, repeated augmentation, shifted crops, mixup, cutmix, dropout and drop path draw random
# numbers in loader and step; the averaged weights are state of a callback.
SETTINGS = (
    "model.args.embed_dim=24",
    "model.args.depth=1",
    "+model.args.drop_path_rate=0.2",
    "+model.args.proj_drop_rate=0.2",
    "data.batch_size=128",
    "data.repeats=2",
    "data.mixup=0.8",
    "data.cutmix=1.0",
    "callbacks=[default,ema]",
    "callbacks.ema.decay=0.8",
    "trainer.max_epochs=3",
    "checkpoint.every_n_steps=2",
)


class Killed(BaseException):
    """What no handler of a run catches."""


class Kill(Callback):
    """Stops a run in front of a step."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.step:
            raise Killed


def run(run_dir, *overrides):
    from qat.tasks.train import train

    train(compose("train", *SETTINGS, f"run_dir={run_dir}", *overrides))
    return run_dir


def killed_at(step, run_dir, monkeypatch, *overrides):
    """Run until just before a step."""
    make = fit.build_callbacks
    with monkeypatch.context() as patch:
        patch.setattr(fit, "build_callbacks", lambda cfg: [*make(cfg), Kill(step)])
        with pytest.raises(Killed):
            run(run_dir, *overrides)
    return run_dir


def last(run_dir):
    return torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)


def metrics(run_dir):
    """Rows of `metrics.csv` without what the throughput monitor measures of the present process."""
    measured = ("train/time", "train/batches", "train/samples", "train/device")
    with (run_dir / "metrics.csv").open(newline="") as file:
        rows = [{k: v for k, v in row.items() if v and not k.startswith(measured)} for row in csv.DictReader(file)]
    return [row for row in rows if set(row) - {"epoch", "step"}]


def assert_same_run(run_dir, full):
    ours, theirs = last(run_dir), last(full)
    assert ours["global_step"] == theirs["global_step"] == 27
    for key in ("state_dict", "current_model_state", "averaging_state"):
        assert [n for n in theirs[key] if not torch.equal(ours[key][n], theirs[key][n])] == []
    assert any(not torch.equal(theirs["state_dict"][n], value) for n, value in theirs["current_model_state"].items())
    moments = [checkpoint["optimizer_states"][0]["state"] for checkpoint in (ours, theirs)]
    for index, state in moments[1].items():
        assert all(torch.equal(moments[0][index][key], state[key]) for key in ("step", "exp_avg", "exp_avg_sq"))
    kept = ("top1", "top5", "loss", "val_top1", "weights")
    assert [results(run_dir)[k] for k in kept] == [results(full)[k] for k in kept]


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """The uninterrupted run."""
    return run(tmp_path_factory.mktemp("full") / "run")


# In front of the first save; between two saves; right behind one; at an epoch's first step; at the last step of all.
@pytest.mark.parametrize("step", [1, 5, 9, 12, 26])
def test_resumed_equals_uninterrupted(step, tmp_path, monkeypatch, full):
    run_dir = killed_at(step, tmp_path / "run", monkeypatch)
    run(run_dir, "resume=auto")
    assert_same_run(run_dir, full)
    assert metrics(run_dir) == metrics(full)


@pytest.mark.slow
def test_killed_twice_with_loader_processes(tmp_path, monkeypatch, full):
    run_dir = killed_at(5, tmp_path / "run", monkeypatch, "data.num_workers=2")
    killed_at(13, run_dir, monkeypatch, "resume=true", "data.num_workers=2")
    run(run_dir, "resume=true", "data.num_workers=1")
    assert_same_run(run_dir, full)


def test_resuming_says_where(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    run_dir = killed_at(5, tmp_path / "run", monkeypatch)
    killed_at(6, run_dir, monkeypatch, "resume=true")
    assert f"resumed at step 4 from {run_dir}/checkpoints/last.ckpt" in caplog.text


def test_a_finished_run_is_evaluated_again(tmp_path, full, monkeypatch):
    before = (full / "checkpoints" / "last.ckpt").read_bytes()
    (full / "results.json").rename(tmp_path / "results.json")
    run(full, "resume=true")
    assert results(full)["top1"] == results(tmp_path)["top1"]
    assert (full / "checkpoints" / "last.ckpt").read_bytes() == before


def test_a_damaged_last_gives_way_to_the_one_before(tmp_path, monkeypatch, caplog, full):
    run_dir = killed_at(5, tmp_path / "run", monkeypatch)
    path = run_dir / "checkpoints" / "last.ckpt"
    path.write_bytes(path.read_bytes()[:-1000])
    run(run_dir, "resume=auto")
    assert "going on from last.prev.ckpt" in caplog.text
    assert_same_run(run_dir, full)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["quant=lsq_4bit"], r"resume: .*last.ckpt has another recipe \(quant: .*weight_quantizer.*\); use ckpt=PATH to start from it"),
        (["quant=fp"], r"resume: .*last.ckpt has another recipe"),
        (["model.args.depth=2"], r"resume: .*last.ckpt holds .*'depth': 1.*not model vit_tiny_patch16_224 with .*'depth': 2"),
        (["resume=maybe"], r"resume='maybe': allowed are false, true, auto"),
    ],
)
def test_another_run_is_not_continued(overrides, message, full):
    with pytest.raises(qat.UsageError, match=message):
        run(full, *(["resume=true", *overrides]))


def test_nothing_to_resume(tmp_path):
    with pytest.raises(qat.UsageError, match=r"resume=true: run_dir='.*' has no checkpoints/last.ckpt; resume=auto starts"):
        run(tmp_path / "run", "resume=true")


@pytest.mark.slow
def test_killed_by_the_system(tmp_path, full):
    run_dir = tmp_path / "run"
    command = [sys.executable, str(ROOT / "train.py"), *SETTINGS, f"run_dir={run_dir}", "resume=auto"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (run_dir / "checkpoints" / "last.prev.ckpt").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL, "it ended before it was killed"
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resumed at step" in done.stdout
    assert_same_run(run_dir, full)
