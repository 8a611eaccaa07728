"""Training runs. Oracles: their files, and models rebuilt from them."""

import os
import re
import signal
from pathlib import Path

import pytest
import timm
import torch
from lightning.pytorch import Callback
from torch.testing import assert_close

import qat
from qat.cli import job
from qat.data.image_data import EncodedImageData
from qat.model.checkpoint import read_checkpoint
from qat.model.start import from_scratch
from qat.tasks import build
from qat.tasks.teacher import build_teacher
from tests.conftest import column, evaluate, results, tiny, train
from tests.tasks.test_resume import last, metrics
from tests.tiny import identical

# What scripts outside this repository rely on.
KEYS = [
    "command",
    "model",
    "quant",
    "data",
    "seed",
    "split",
    "weights",
    "top1",
    "top5",
    "loss",
    "val_top1",
    "top1_fp",
    "n_params",
    "size_bytes",
    "bitops",
    "wall_seconds",
    "git_commit",
    "versions",
]


# Two steps at this rate move zeros alone, by less than the tolerance.
STILL, STANDSTILL = ("optimizer.lr=1e-30", "scheduler.min_lr=0"), 1e-29


def state(run_dir, name="last.ckpt"):
    return read_checkpoint(run_dir / "checkpoints" / name).state


def plain_weights(path, classes=10):
    """A timm state dict of the tiny net."""
    torch.manual_seed(5)
    cfg = tiny("a")
    net = timm.create_model(cfg.model.name, **{**build.model_args(cfg), "num_classes": classes})
    torch.save(net.state_dict(), path)
    return net.eval()


@pytest.fixture(scope="module")
def run_2bit(tmp_path_factory):
    return train(tmp_path_factory.mktemp("two") / "run", "trainer.max_epochs=2", "seed=3")


def test_outputs(run_2bit):
    names = {str(p.relative_to(run_2bit)) for p in run_2bit.rglob("*") if p.is_file()}
    assert names >= {
        "config.yaml",
        "conversion.txt",
        "metrics.csv",
        "results.json",
    }
    assert {n for n in names if n.endswith(".ckpt")} == {
        f"checkpoints/{name}.ckpt" for name in ("best", "last", "last.prev")
    }


def test_results(run_2bit):
    found = results(run_2bit)
    assert set(KEYS) <= set(found)
    expected = {
        "command": "train",
        "model": "vit_tiny_patch16_224",
        "quant": "ofq_2bit",
        "data": "digits",
        "seed": 3,
        "split": "test",
        "weights": "best.ckpt",
        "top1_fp": None,
    }
    assert expected.items() <= found.items()
    assert found["val_top1"] == pytest.approx(max(column(run_2bit, "val/top1")))
    assert 0 <= found["top1"] <= found["top5"] <= 100
    assert found["n_params"] == sum(
        p.numel() for p in qat.load(f"{run_2bit}/checkpoints/last.ckpt").parameters()
    )
    assert set(found["versions"]) >= {"python", "torch", "timm", "lightning"}


def test_evaluation_of_the_file_alone_repeats_the_result(run_2bit, tmp_path):
    trained = results(run_2bit)
    found = evaluate(tmp_path / "eval", f"ckpt={run_2bit}/checkpoints/best.ckpt")
    for key in [
        "model",
        "quant",
        "data",
        "split",
        "top1",
        "top5",
        "loss",
        "n_params",
        "size_bytes",
        "bitops",
    ]:
        assert found[key] == trained[key], key
    assert found["command"] == "eval"


def test_a_run_is_a_function_of_its_seed(tmp_path, run_2bit):
    again = train(tmp_path / "again", "trainer.max_epochs=2", "seed=3", "data.num_workers=1")
    other = train(tmp_path / "other", "trainer.max_epochs=2", "seed=4")
    first, second, third = state(run_2bit), state(again), state(other)
    assert identical(first, second)
    assert not torch.equal(first["head.weight"], third["head.weight"])


def test_without_logger_or_callbacks(tmp_path):
    run = train(tmp_path / "run", "~logger", "~callbacks")
    assert results(run)["weights"] == "final"
    assert not (run / "metrics.csv").exists()


# --- the run directory


SOMEBODYS = (
    "results.json",
    "metrics.csv",
    "config.yaml",
    "conversion.txt",
    "report.html",
    "checkpoints/mine.ckpt",
    "quantized.ckpt",
)


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", SOMEBODYS)
def test_files_of_somebody_are_not_replaced(tmp_path, refused, name):
    run = tmp_path / "run"
    (run / name).parent.mkdir(parents=True)
    (run / name).write_text('{"top1": 77}')
    for mistake in (
        [],
        ["seed=-1"],
    ):  # neither by a run nor by the error of one that is refused, which would make it look like a failed run
        message = refused(tiny(run, *mistake))
        assert (
            mistake
            or f"contains {(run / name).name} already; choose another run_dir or set overwrite=true"
            in message
        )
        assert [path for path in run.rglob("*") if path.is_file()] == [run / name]
        assert (run / name).read_text() == '{"top1": 77}'


def press_ctrl_c(*_, **__):
    os.kill(os.getpid(), signal.SIGINT)


def fail(*_, **__):
    raise qat.UsageError("the first step fails")


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("end", "code", "error", "again"),
    [
        (fail, 1, "the first step fails", ()),
        (fail, 1, "the first step fails", ("resume=auto",)),
        (press_ctrl_c, 130, "stopped by Ctrl-C", ()),
    ],
)
def test_a_run_that_ended_before_it_saved_anything_may_be_repeated(
    tmp_path, refused, monkeypatch, end, code, error, again
):
    run = tmp_path / "run"
    refused(tiny(run, "quant.bits=9"))
    assert "quant.bits=9" in results(run)["error"]
    with monkeypatch.context() as patch:
        patch.setattr("lightning.pytorch.Trainer.fit", end)
        with pytest.raises(SystemExit) as stop:
            job.run_task(tiny(run))
    assert stop.value.code == code
    assert results(run)["error"] == error
    assert (run / "config.yaml").exists()
    train(run, *again)
    assert "error" not in results(run)


def test_overwrite_removes_what_a_run_makes_and_follows_no_link(tmp_path):
    run = train(tmp_path / "run")
    mine = ("mine.ckpt", "checkpoints/mine.ckpt", "analysis/mine.csv", "notes.csv")
    for name in mine:
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text("mine")
    elsewhere = tmp_path / "elsewhere.ckpt"
    (run / "checkpoints" / "best.ckpt").rename(elsewhere)
    (run / "checkpoints" / "best.ckpt").symlink_to(elsewhere)
    before = elsewhere.read_bytes()
    train(run, "overwrite=true", "seed=1", "callbacks.last=null")
    assert elsewhere.read_bytes() == before
    assert not (run / "checkpoints" / "best.ckpt").is_symlink()
    assert {path.name for path in run.rglob("*.ckpt")} == {"best.ckpt", "mine.ckpt"}
    for name in mine:
        assert (run / name).read_text() == "mine"


@pytest.mark.long
def test_stopping_early_and_the_best_checkpoints_are_choices(tmp_path):
    chosen = (
        "trainer.max_epochs=9",
        "callbacks=[default,early_stop,best_k]",
        "callbacks.best_k.save_top_k=2",
        "callbacks.early_stop.min_delta=100",
        "callbacks.early_stop.patience=2",
    )
    run = train(tmp_path / "run", *chosen)
    kept = sorted(path.name for path in (run / "checkpoints").glob("best-epoch*"))
    assert len(kept) == 2
    assert all(re.fullmatch(r"best-epoch00\d-top1-\d+\.\d\d\.ckpt", name) for name in kept)
    before = last(run)
    assert before["epoch"] == 2
    (record,) = (
        entry for entry in before["callbacks"].values() if len(entry.get("best_k_models", ())) == 2
    )
    assert sorted(Path(path).name for path in record["best_k_models"]) == kept
    rows = metrics(run)
    train(run, *chosen, "resume=true")
    assert last(run)["global_step"] == before["global_step"]
    assert metrics(run) == rows
    train(run, *chosen, "callbacks.early_stop.patience=3", "resume=true")
    assert last(run)["epoch"] == 3
    train(run, "overwrite=true")
    assert not list((run / "checkpoints").glob("best-epoch*"))


def test_without_patience_the_first_validation_that_is_no_better_ends_the_run(tmp_path):
    chosen = (
        "trainer.max_epochs=4",
        "callbacks=[default,early_stop]",
        "callbacks.early_stop.min_delta=100",
        "callbacks.early_stop.patience=0",
    )
    run = train(tmp_path / "run", *chosen)
    assert last(run)["epoch"] == 1
    train(run, *chosen, "resume=true")
    assert last(run)["epoch"] == 1


# --- where weights come from


def test_from_4_to_2_bits_only_stem_and_head_scales_are_copied(tmp_path, run_4bit, caplog):
    caplog.set_level("INFO")
    train(tmp_path / "run", f"ckpt={run_4bit}/checkpoints/last.ckpt")
    (note,) = [line for line in caplog.text.splitlines() if line.strip().startswith("start ")]
    copied, _, missing = note.partition(" quantizers copied, of ")
    assert copied.endswith("scales of 4")
    assert "blocks.0.attn.probs_quantizer" in missing
    assert "patch_embed" not in missing
    assert "head" not in missing


def test_between_equal_recipes_all_scales_are_copied(run_4bit):
    cfg = tiny("a", "quant=ofq_4bit", f"ckpt={run_4bit}/checkpoints/last.ckpt")
    start = build.build_start(cfg)
    data = build.build_data(cfg)
    notes = build.quantize(start, build.build_recipe(cfg), data, init="full", processes=1)
    assert notes == ["scales of all 11 quantizers copied"]
    assert_close(dict(start.net.state_dict()), state(run_4bit), rtol=0, atol=0)


def test_other_classes_get_a_new_head(float_run):
    start = f"ckpt={float_run}/checkpoints/last.ckpt"
    cfg = tiny("a", start, "data.num_classes=7", "model.reset_head=true")
    assert build.build_start(cfg).net.num_classes == 7


@pytest.mark.sample(1)
@pytest.mark.parametrize("setting", ["model.weights", "ckpt"])
def test_a_plain_state_dict_is_taken_as_it_is(tmp_path, setting):
    net = plain_weights(tmp_path / "w.pt")
    run = train(tmp_path / "run", f"{setting}={tmp_path}/w.pt", "quant=fp", *STILL)
    assert_close(state(run), dict(net.state_dict()), rtol=0, atol=STANDSTILL)


# --- distillation


class Watch(Callback):
    """What the loss and the teacher are at the end."""

    seen: dict = {}

    def on_train_end(self, trainer, pl_module):
        Watch.seen = {"teacher": pl_module.teacher, "net": pl_module.net}


def test_the_teacher_is_the_float_start_and_its_accuracy_is_kept(tmp_path, float_run, caplog):
    caplog.set_level("INFO")
    run = train(
        tmp_path / "run",
        "loss=kd",
        f"ckpt={float_run}/checkpoints/last.ckpt",
        "+callbacks.watch._target_=tests.tasks.test_train.Watch",
    )
    teacher = Watch.seen["teacher"].net.state_dict()
    assert all(torch.equal(teacher[name], tensor) for name, tensor in state(float_run).items())
    accuracy = evaluate(tmp_path / "eval", f"ckpt={float_run}/checkpoints/last.ckpt")["top1"]
    assert results(run)["top1_fp"] == pytest.approx(accuracy)
    assert f"teacher: test top-1 {accuracy:.2f} %" in caplog.text
    assert set(state(run)) == set(Watch.seen["net"].state_dict())
    assert len(column(run, "train/loss_kd")) == 1


@pytest.mark.sample(1)
@pytest.mark.parametrize("setting", ["ckpt", "teacher.ckpt"])
def test_a_teacher_of_other_normalization_is_as_good_as_alone(tmp_path, caplog, float_run, setting):
    file = float_run / "checkpoints" / "best.ckpt"
    run = train(
        tmp_path / "run", "loss=kd", f"{setting}={file}", "data.mean=[0.9]", "data.std=[0.02]"
    )
    assert results(run)["top1_fp"] == pytest.approx(
        results(float_run)["top1"], abs=0.3
    )  # an image at a boundary
    line = f"ckpt='{file}': trained on images of mean [0.3051] and std [0.3759]; data.mean and data.std set mean [0.9] and std [0.02]"
    assert [text for text in caplog.messages if "trained on images" in text] == (
        [line] if setting == "ckpt" else []
    )


@pytest.mark.parametrize(
    ("typed", "own"),
    [
        ("teacher.pretrained=true", 0.5),  # timm's word for its weights, whatever the data have
        ("teacher.ckpt={}", 0.3051),  # weights of unknown images
        (
            "teacher.ckpt={} data._target_=tests.tasks.test_train.Photos data.mean=null data.std=null data.model=resnet18",
            0.5,
        ),
    ],
)
def test_what_a_teacher_was_trained_with(tmp_path, monkeypatch, typed, own):
    plain_weights(tmp_path / "w.pt")
    monkeypatch.setattr(
        "qat.tasks.teacher.from_timm", lambda name, args, **_: from_scratch(name, args)
    )
    cfg = tiny(tmp_path / "run", "loss=kd", *typed.format(tmp_path / "w.pt").split())
    data = build.build_data(cfg)
    net = build_teacher(cfg, build.build_loss(cfg), data).net
    (mean,), (std,) = data.settings.mean, data.settings.std
    images = torch.full((1, 1, 8, 8), (0.7 - mean) / std)
    (found,) = [hook(net, (images,)) for hook in net._forward_pre_hooks.values()] or [(images,)]
    assert_close(found[0], torch.full_like(images, (0.7 - own) / {0.5: 0.5, 0.3051: 0.3759}[own]))


def test_a_convolutional_teacher(tmp_path):
    """It has no `img_size`."""
    net = timm.create_model("resnet10t", in_chans=1, num_classes=10)
    torch.save(net.state_dict(), tmp_path / "w.pt")
    given = ("teacher.model=resnet10t", f"teacher.ckpt={tmp_path}/w.pt")
    cfg = tiny(tmp_path / "run", "loss=kd", *given)
    teacher = build_teacher(cfg, build.build_loss(cfg), build.build_data(cfg))
    assert_close(teacher.net(torch.ones(1, 1, 32, 32)), net.eval()(torch.ones(1, 1, 32, 32)))


class Photos(EncodedImageData):
    """What images a net is for; none are read."""

    def encoded(self):
        return {}


@pytest.mark.long
@pytest.mark.parametrize("head", ["cls", "mean"])
def test_a_class_head_alone_is_evaluated_beside_the_net(tmp_path, caplog, head):
    caplog.set_level("INFO")
    run = train(tmp_path / "fp", "model=deit_t_distilled", "quant=fp")
    net = qat.load(f"{run}/checkpoints/last.ckpt")
    with (
        torch.no_grad()
    ):  # the class head always says 8, the rarest digit; the mean of both 3, the most frequent one
        for linear, digit, sure in ((net.head, 8, 50.0), (net.head_dist, 3, 100.0)):
            linear.bias[digit] = sure
    qat.save(net, tmp_path / "net.ckpt")
    distilled = train(
        tmp_path / "run",
        "model=deit_t_distilled",
        "loss=kd",
        f"ckpt={tmp_path}/net.ckpt",
        f"loss.teacher_head={head}",
    )
    own = evaluate(tmp_path / "eval", f"ckpt={tmp_path}/net.ckpt")["top1"]
    assert results(distilled)["top1_fp"] == pytest.approx(own)
    assert (f"class head only; {own:.2f} % with both heads" in caplog.text) == (head == "cls")


@pytest.mark.parametrize("setting", ["teacher.ckpt", "model.weights"])
def test_a_teacher_with_a_new_head_is_refused(tmp_path, refused, setting):
    # Its logits would be random.
    plain_weights(tmp_path / "w.pt", classes=5)
    message = refused(tiny(tmp_path / "run", "loss=kd", f"{setting}={tmp_path}/w.pt"))
    assert f"{setting}='{tmp_path}/w.pt'" in message
    assert "5 classes, the data 10" in message
