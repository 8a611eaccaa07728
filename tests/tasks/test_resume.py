"""Resumed runs. Oracle: the same run without interruption."""

import resource
import shutil

import pytest
import torch
from lightning.pytorch import Callback

import qat
from qat.lit.strategies import AtomicCheckpointIO
from qat.tasks import build
from qat.tasks.resume import find_resume
from qat.utils.files import csv_rows
from tests.callbacks.fitting import added, differing
from tests.conftest import compose, contents, results, train
from tests.data.files import write_folder
from tests.errors import usage_error

# Nine steps an epoch, two epochs. Order, repeated augmentation, shifted crops, mixup, cutmix, dropout and drop path draw random
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
    "trainer.max_epochs=2",
    "checkpoint.every_n_steps=2",
)


class Killed(BaseException):
    """What no handler of a run catches."""


class Kill(Callback):
    """Stops a run before a step, or of a batch."""

    def __init__(self, step, batch=0):
        self.step, self.batch = step, batch

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == self.step and batch_idx >= self.batch:
            raise Killed


def run(run_dir, *overrides):
    from qat.tasks.train import train

    train(compose("train", *SETTINGS, f"run_dir={run_dir}", *overrides))
    return run_dir


def killed_at(step, run_dir, *overrides, batch=0):
    """Run until just before a step, or a batch for it."""
    with added(Kill(step, batch)), pytest.raises(Killed):
        run(run_dir, *overrides)
    return run_dir


def last(run_dir):
    return torch.load(f"{run_dir}/checkpoints/last.ckpt", weights_only=True)


def metrics(run_dir):
    """Rows of `metrics.csv` without empty cells."""
    rows = csv_rows(run_dir / "metrics.csv")
    return [{name: value for name, value in row.items() if value} for row in rows]


def assert_same_checkpoint(run_dir, full, *averages):
    """Compare weights, averages and moments of two runs; return the checkpoint of the second."""
    ours, theirs = last(run_dir), last(full)
    assert (ours["global_step"], ours["epoch"]) == (theirs["global_step"], theirs["epoch"])
    for key in ("state_dict", *averages):
        assert differing(ours[key], theirs[key]) == []
    moments = [checkpoint["optimizer_states"][0]["state"] for checkpoint in (ours, theirs)]
    assert moments[1]
    for index, state in moments[1].items():
        assert differing(moments[0][index], state) == []
    return theirs


def assert_same_results(run_dir, full):
    kept = ("top1", "top5", "loss", "val_top1", "weights")
    assert [results(run_dir)[k] for k in kept] == [results(full)[k] for k in kept]


def assert_same_run(run_dir, full):
    theirs = assert_same_checkpoint(run_dir, full, "current_model_state", "averaging_state")
    assert theirs["global_step"] == 18
    assert differing(theirs["state_dict"], theirs["current_model_state"])
    assert_same_results(run_dir, full)


# Before the first save; between two saves; right after one; at an epoch's first step; at the last step of all.
@pytest.mark.sample(1)
@pytest.mark.parametrize("step", [5, 1, 9, 12, 17])
def test_resumed_equals_uninterrupted(step, tmp_path, full):
    run_dir = killed_at(step, tmp_path / "run")
    run(run_dir, "resume=auto")
    assert_same_run(run_dir, full)
    assert metrics(run_dir) == metrics(full)


def test_a_kill_right_after_a_save_loses_no_row(tmp_path, monkeypatch):
    rows = []

    def save(self, checkpoint, path, storage_options=None):
        rows.append((checkpoint["global_step"], csv_rows(tmp_path / "run" / "metrics.csv")))

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", save)
    run(
        tmp_path / "run",
        "callbacks.best=null",
        "trainer.log_every_n_steps=1",
        "trainer.max_epochs=1",
    )
    assert [step for step, _ in rows] == [2, 4, 6, 8, 9]
    for step, there in rows:
        written = [row["train/loss_step"] for row in there if row["train/loss_step"]]
        assert len(written) == step
    whole = csv_rows(tmp_path / "run" / "metrics.csv")
    assert [row for row in whole if row["train/loss"]] == [
        row | {name: "" for name in whole[0].keys() - row} for row in there if row["train/loss"]
    ]


@pytest.mark.long
def test_time_before_the_interruption_counts(tmp_path):
    run_dir = killed_at(5, tmp_path / "run")
    content = last(run_dir)
    before = content["callbacks"]["LastCheckpoint"]
    assert 0 < before["seconds"] < 600
    before["seconds"] = 3600.0
    torch.save(content, run_dir / "checkpoints" / "last.ckpt")
    run(run_dir, "resume=true")
    assert 3600 < results(run_dir)["wall_seconds"] < 4200
    assert last(run_dir)["callbacks"]["LastCheckpoint"]["seconds"] > 3600


@pytest.mark.long
def test_killed_twice_with_loader_processes(tmp_path, full):
    run_dir = killed_at(5, tmp_path / "run", "data.num_workers=2")
    killed_at(13, run_dir, "resume=true", "data.num_workers=2")
    run(run_dir, "resume=true", "data.num_workers=1")
    assert_same_run(run_dir, full)


@pytest.mark.long
def test_accumulated_batches_and_validations_in_the_middle(tmp_path):
    """Nothing is saved between batches that are accumulated, also not by a run that was resumed there; no validation is left out."""
    settings = (
        "trainer.accumulate_grad_batches=2",
        "+trainer.val_check_interval=4",
        "trainer.log_every_n_steps=1",
    )
    settings += (
        "trainer.max_epochs=1",
        "checkpoint.every_n_steps=1",
        "trainer.limit_train_batches=8",
    )
    whole = run(tmp_path / "whole", *settings)
    run_dir = killed_at(2, tmp_path / "run", *settings)
    assert last(run_dir)["global_step"] == 2
    for _ in range(2):
        killed_at(2, run_dir, "resume=true", *settings, batch=5)
    run(run_dir, "resume=true", *settings)
    ours, theirs = last(run_dir)["current_model_state"], last(whole)["current_model_state"]
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    assert metrics(run_dir) == metrics(whole)
    assert sum("val/top1" in row for row in metrics(whole)) == 2


def test_a_finished_run_is_evaluated_again(tmp_path, full):
    before = (full / "checkpoints" / "last.ckpt").read_bytes()
    (full / "results.json").rename(tmp_path / "results.json")
    run(full, "resume=true")
    assert results(full)["top1"] == results(tmp_path)["top1"]
    assert (full / "checkpoints" / "last.ckpt").read_bytes() == before


@pytest.mark.long
def test_a_run_of_before_a_knob_was_there_goes_on(tmp_path, full):
    run_dir = killed_at(5, tmp_path / "run")
    path = run_dir / "checkpoints" / "last.ckpt"
    content = torch.load(path, weights_only=True)
    assert content["qat"]["recipe"].pop("step_init") == "lsq"
    torch.save(content, path)
    with usage_error(r"has another recipe \(quant: step_init\)"):
        run(run_dir, "resume=true", "quant.step_init=mse")
    run(run_dir, "resume=true", "quant.offset_init=minimum")
    assert_same_run(run_dir, full)


def write(path, content):
    path.write_bytes(content)


DAMAGES = {
    "a bit": lambda path, whole: write(
        path, whole[:2000] + bytes([whole[2000] ^ 1]) + whole[2001:]
    ),
    "half": lambda path, whole: write(path, whole[: len(whole) // 2]),
    "empty": lambda path, whole: write(path, b""),
    "gone": lambda path, whole: path.unlink(),
}


def resumed(run_dir):
    """The checkpoint from which a run would resume."""
    cfg = compose("train", *SETTINGS, f"run_dir={run_dir}", "resume=auto")
    return find_resume(cfg, build.build_recipe(cfg), build.model_args(cfg))


@pytest.mark.sample(1)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_last_that_is_damaged_or_gone(damage, tmp_path, full, caplog):
    folder = shutil.copytree(full / "checkpoints", tmp_path / "checkpoints")
    path, before = folder / "last.ckpt", folder / "last.prev.ckpt"
    DAMAGES[damage](path, path.read_bytes())
    assert resumed(tmp_path).path == before
    (warning,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert "last.ckpt" in warning
    assert warning.endswith("resuming from last.prev.ckpt")
    DAMAGES[damage](before, before.read_bytes())
    if damage == "gone":
        assert resumed(tmp_path) is None
        return
    with usage_error(r"resume='.*last.prev.ckpt': [^\n]+$"):
        resumed(tmp_path)


@pytest.mark.long
def test_no_room_for_the_checkpoint(tmp_path, full, refused):
    run_dir = killed_at(5, tmp_path / "run")
    before = contents(run_dir / "checkpoints")
    path = run_dir / "checkpoints" / "last.ckpt"
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size // 2, limit[1]))
    try:
        line = refused(compose("train", *SETTINGS, f"run_dir={run_dir}", "resume=auto"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    fault = f"{path} cannot be written (File too large); the previous checkpoint is intact"
    assert line == f"error: {fault}"
    assert contents(run_dir / "checkpoints") == before
    run(run_dir, "resume=auto")
    assert_same_run(run_dir, full)


SPOILED = {
    "no loops": lambda content: content.pop("loops"),
    "no optimizer": lambda content: content.pop("optimizer_states"),
    "fewer groups": lambda content: content["optimizer_states"][0]["param_groups"].pop(),
}


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", SPOILED)
def test_a_run_does_not_go_on_from_a_file_that_lacks_something(name, tmp_path, full):
    run_dir = shutil.copytree(full, tmp_path / "run")
    content = last(run_dir)
    SPOILED[name](content)
    torch.save(content, run_dir / "checkpoints" / "last.ckpt")
    (run_dir / "checkpoints" / "last.prev.ckpt").unlink()
    with usage_error("^resume"):
        run(run_dir, "resume=true", "trainer.max_epochs=4")


IN_STEPS = "; the learning rate follows the original schedule"


def said(run_dir, caplog, *overrides):
    """The lines about settings of a run that would go on."""
    caplog.clear()
    cfg = compose("train", *SETTINGS, f"run_dir={run_dir}", "resume=true", *overrides)
    find_resume(cfg, build.build_recipe(cfg), build.model_args(cfg))
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    ("typed", "lines"),
    [
        ("trainer.precision=bf16-mixed", ["trainer.precision was '32-true', is 'bf16-mixed'"]),
        (
            "trainer.gradient_clip_val=0.5 seed=3",
            [
                "seed was 0, is 3",
                "data.seed was 0, is 3",
                "trainer.gradient_clip_val was None, is 0.5",
            ],
        ),
        ("trainer.max_epochs=4", ["trainer.max_epochs was 2, is 4" + IN_STEPS]),
        ("trainer.limit_train_batches=3", ["trainer.limit_train_batches was 1.0, is 3" + IN_STEPS]),
        ("teacher.ckpt=other.ckpt", ["teacher.ckpt was None, is 'other.ckpt'"]),
        ("callbacks.ema.decay=0.9", ["callbacks.ema.decay was 0.8, is 0.9"]),
        ("+callbacks.stop={patience:3}", ["callbacks.stop.patience was 'not set', is 3"]),
        (
            "compile=true memory=recompute",
            ["compile was 'auto', is True", "memory was 'save', is 'recompute'"],
        ),
        ("data.num_workers=2 data.memory_mb=0 report=false checkpoint.every_n_steps=1", []),
        ("logger=[] callbacks.progress=null data.root=/elsewhere trainer.log_every_n_steps=1", []),
    ],
)
def test_every_setting_that_changes_is_named(typed, lines, full, caplog):
    assert said(full, caplog, *typed.split()) == [f"resume: {line}" for line in lines]


@pytest.mark.long
@pytest.mark.parametrize("setting", ["teacher.ckpt", "ckpt"])
def test_a_teacher_of_other_weights_is_refused(tmp_path, float_run, setting):
    """The file keeps its name; with its old weights, also under another name, the run continues."""
    own, other = tmp_path / "own.ckpt", tmp_path / "moved.ckpt"
    shutil.copy(float_run / "checkpoints" / "best.ckpt", own)
    shutil.copy(own, other)
    first = (tmp_path / "run", "quant=fp", "loss=kd")
    train(*first, f"{setting}={own}")
    net = qat.load(own)
    torch.nn.init.zeros_(net.head.weight)
    qat.save(net, own)
    with usage_error(r"^resume: .*last\.ckpt was trained with another teacher"):
        train(*first, f"{setting}={own}", "resume=true")
    train(*first, f"{setting}={other}", "resume=true")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A run on a folder of images, and the folder."""
    root = tmp_path_factory.mktemp("photos")
    folder = write_folder(root / "data", classes=("cat", "dog"))
    return photo_run(root / "run", folder), folder


def photo_run(run_dir, folder, *overrides):
    sizes = ("data.image_size=8", "data.patch_size=4", "data.batch_size=4", "data.num_classes=2")
    small = (*sizes, "data.calibration_images=8", "data.num_workers=0")
    return train(run_dir, "data=imagefolder", f"data.root={folder}", *small, *overrides)


def rename_a_class(folder):
    for split in ("train", "val"):
        (folder / split / "dog").rename(folder / split / "ant")


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            rename_a_class,
            r"^data: class 0 is 'ant'; must be 'cat', as in .*last\.ckpt; use ckpt=PATH in another run_dir to start a new run$",
        ),
        (
            lambda folder: shutil.copy(folder / "train/cat/000.png", folder / "train/cat/999.png"),
            r"^data: the images of train are not those",
        ),
        (
            lambda folder: (folder / "val/dog/003.JPEG").unlink(),
            r"^data: the images of val are not those .*; set allow_changed_data=true to resume",
        ),
        (
            lambda folder: (folder / "val/dog/003.JPEG").rename(folder / "val/dog/004.JPEG"),
            r"^data: the images of val are not those",
        ),
    ],
    ids=["renamed class", "added", "removed", "another"],
)
def test_other_images_are_noticed(change, line, photos, tmp_path, caplog):
    run_dir, folder = (shutil.copytree(path, tmp_path / path.name) for path in photos)
    photo_run(
        run_dir, folder, "resume=true", "data.memory_mb=0"
    )  # elsewhere, and read in another way: the same images
    change(folder)
    with usage_error(line):
        photo_run(run_dir, folder, "resume=true")
    if "class" in line:
        return
    caplog.clear()
    photo_run(run_dir, folder, "resume=true", "allow_changed_data=true")
    assert "resume: data: the images of" in caplog.text


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            "optimizer.lr=0.1",
            r"optimizer\.lr=0\.1 \(the run had 0\.001\): a resumed run keeps its ",
        ),
        ("optimizer=sgd", r"optimizer\.opt='sgd' \(the run had 'adamw'\)"),
        (
            "trainer.max_epochs=1",
            r"trainer\.max_epochs=1: .*last\.ckpt was already trained for 2 ep",
        ),
        (
            "quant=lsq_4bit",
            r"resume: .*last\.ckpt has another recipe \(quant: .*weight_quantizer.*\)",
        ),
        ("model.args.depth=2", r"resume: .* contains .*'depth': 1.*not model .* with .*'depth': 2"),
    ],
)
def test_what_a_run_cannot_take_any_more_is_refused(change, line, full):
    before = (full / "config.yaml").read_bytes()
    with usage_error(f"^{line}"):
        run(full, "resume=true", change)
    assert (full / "config.yaml").read_bytes() == before


@pytest.mark.long
def test_another_loss_in_the_middle_of_an_epoch(tmp_path):
    short = ("trainer.max_epochs=1", "trainer.limit_train_batches=4")
    run_dir = killed_at(3, tmp_path / "run", *short)
    run(
        run_dir,
        *short,
        "resume=true",
        "~loss.terms.ce",
        "+loss.terms.again={_target_:qat.losses.CrossEntropy}",
    )
    assert last(run_dir)["global_step"] == 4


@pytest.mark.long
def test_auto_starts_behind_a_best_alone(tmp_path, full):
    run_dir = killed_at(5, tmp_path / "run")
    folder = run_dir / "checkpoints"
    for path in folder.glob("last*"):
        path.unlink()
    shutil.copy(full / "checkpoints" / "best.ckpt", folder / "best.ckpt")
    with usage_error(
        r"contains best.ckpt already; choose another run_dir or set overwrite=true",
    ):
        run(run_dir, "resume=false")
    run(run_dir, "resume=auto")
    assert_same_run(run_dir, full)
    for path in folder.glob("last*"):
        path.unlink()
    with usage_error(r"contains best.ckpt already"):  # the run has ended
        run(run_dir, "resume=auto")


def test_a_dry_run_leaves_a_run_alone(full):
    before = contents(full)
    with usage_error(r"trainer\.fast_dev_run: .*would change .*last.ckpt.*; a dry run "):
        run(full, "resume=auto", "overwrite=true", "trainer.fast_dev_run=true")
    assert contents(full) == before
