"""`report.html` of commands. Oracle: the files of the run beside it; `report=false`, which leaves a run without it."""

import itertools
import json
import os
import shlex
import shutil
import subprocess
import sys

import pytest

from qat.report.run_files import Origin
from qat.tasks import report
from qat.tasks.report import origin_of, remake
from tests.commands import typed
from tests.conftest import TINY, compose, results, train
from tests.report.pages import Reader

SMALL = ("data.calibration_images=20", "ptq.batch=20")


def page(run):
    """The page of a run, which has to be well formed."""
    found = Reader((run / "report.html").read_text())
    assert found.wrong == []
    return found


@pytest.fixture(scope="module")
def by_command(tmp_path_factory):
    """A 2-bit run by the command, with settings that are not the defaults."""
    folder = tmp_path_factory.mktemp("report")
    asked = (*TINY, "quant=ofq_3bit", "callbacks=[default,ema]", "optimizer.lr=2e-3", "seed=3", "run_dir=first")
    code, out = typed("train.py", *asked, cwd=folder)
    assert code == 0, out
    assert "report.html" in out
    return folder / "first"


def test_a_training_run_has_a_page(by_command):
    found = page(by_command)
    top1 = results(by_command)["top1"]
    for text in (f"{top1:.2f} % top-1 on the test split", "W3 A3", "blocks.0.mlp.fc1", "Weights before rounding", "Bytes as stored"):
        assert text in found.text, text
    assert len(found.all("img")) >= 4
    assert (by_command / "report.html").stat().st_size < 500_000
    assert (by_command / "analysis" / "weights.json").is_file()


def test_it_has_the_command_and_what_it_changed(by_command):
    origin = origin_of(by_command)
    assert origin.command.startswith("python train.py ++model.args.embed_dim=24 ")
    assert origin.command.endswith("quant=ofq_3bit 'callbacks=[default,ema]' optimizer.lr=2e-3 seed=3 run_dir=first")
    assert origin.compared == "conf/train.yaml quant=ofq_3bit callbacks=[default,ema]"
    found = {one["setting"]: (one["here"], one["default"]) for one in origin.differences}
    # Three bits and averaging are those of the files that were chosen; run_dir is every run's own.
    expected = {"seed": ("3", "0"), "optimizer.lr": ("0.002", "0.001"), "model.args.embed_dim": ("24", "96")}
    assert expected.items() <= found.items()
    assert all(here != default for here, default in found.values())
    assert {"quant", "callbacks", "run_dir"}.isdisjoint(found)


def test_data_of_a_checkpoint_are_compared_with_those_that_are_taken_without(tmp_path):
    (tmp_path / "config.yaml").write_text("command: ptq\ndata: {calibration_images: 20, image_size: 8}\nckpt: a.ckpt\n")
    typed = ["ckpt=a.ckpt", "data.calibration_images=20", "ptq=minmax_w8a8", "run_dir=b"]
    (tmp_path / report.COMMAND).write_text(json.dumps({"command": "ptq.py", "overrides": typed}))
    origin = origin_of(tmp_path)
    assert origin.compared == "conf/ptq.yaml ptq=minmax_w8a8"
    assert list(origin.differences) == [
        {"setting": "ckpt", "here": "a.ckpt", "default": "(none)"},
        {"setting": "data.calibration_images", "here": "20", "default": "1000"},
    ]


def test_the_command_to_repeat_works(by_command):
    argv = shlex.split(origin_of(by_command).repeat.removeprefix("python ").replace("NEW_FOLDER", "second"))
    code, out = typed(*argv, "report=false", cwd=by_command.parent)
    assert code == 0, out
    assert results(by_command.parent / "second")["top1"] == results(by_command)["top1"]


def test_quantization_after_training_has_a_page(tmp_path, float_run):
    from qat.tasks.ptq import ptq

    ptq(compose("ptq", "report=true", f"ckpt={float_run}/checkpoints/last.ckpt", *SMALL, f"run_dir={tmp_path}"))
    found = page(tmp_path)
    assert "Post-training quantization" in found.text
    assert f"{results(tmp_path)['top1_fp']:.2f} % in float" in found.text


def test_an_analysis_has_a_page(tmp_path, run_4bit):
    from qat.tasks.analyze import analyze

    analyze(compose("analyze", "report=true", f"ckpt={run_4bit}/checkpoints/last.ckpt", "analysis=cost", f"run_dir={tmp_path}"))
    found = page(tmp_path)
    assert "Bit operations of one image" in found.text
    assert not (tmp_path / "analysis").exists()


def test_a_run_starts_without_what_makes_a_page():
    code = "import sys, qat.tasks.train, qat.tasks.ptq; print([m for m in sys.modules if m.startswith(('qat.report', 'qat.analysis'))])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("off", ["report=false", "trainer.fast_dev_run=true"])
def test_no_page(tmp_path, off):
    train(tmp_path / "run", "quant=fp", "report=true", off)
    assert results(tmp_path / "run")["top1"] is not None
    assert not (tmp_path / "run" / "report.html").exists()
    assert not (tmp_path / "run" / "analysis").exists()


def test_a_page_that_fails_fails_no_run(tmp_path, monkeypatch, caplog):
    def broken(*args):
        raise RuntimeError("no ink\nat all")

    monkeypatch.setattr(report, "describe_layers", broken)
    train(tmp_path / "run", "quant=fp", "report=true")
    assert results(tmp_path / "run")["top1"] is not None
    (record,) = [r for r in caplog.records if "report.html" in r.getMessage()]
    assert record.getMessage() == "report.html was not made, everything else was: RuntimeError: no ink at all"
    assert record.levelname == "WARNING"


def test_run_makes_the_page_anew(tmp_path, run_4bit):
    from qat.tasks.analyze import analyze

    run = tmp_path / "run"
    shutil.copytree(run_4bit, run)
    assert not (run / "report.html").exists()
    before = {path.name for path in run.iterdir()}
    analyze(compose("analyze", f"run={run}", f"run_dir={tmp_path}/log"))
    assert {path.name for path in run.iterdir()} - before == {"report.html", "analysis"}
    # Its layers come from the checkpoint.
    assert "blocks.0.mlp.fc1" in page(run).text


def test_of_a_run_that_was_killed(tmp_path, run_4bit):
    run = tmp_path / "run"
    shutil.copytree(run_4bit, run)
    (run / "results.json").unlink()
    (run / "analysis").mkdir()
    (run / "analysis" / "weights.json").write_text("{}")  # what it looks at itself is there, if empty
    remake(compose("analyze", f"run={run}", f"run_dir={tmp_path}/log"))
    assert "The run has not ended." in page(run).text


@pytest.mark.parametrize(
    ("written", "is_finished", "read"),
    [
        (["best.ckpt", "last.ckpt"], False, ["last.ckpt"]),
        (["last.ckpt", "best.ckpt"], False, ["best.ckpt"]),
        (["best.ckpt", "last.ckpt"], True, ["best.ckpt"]),
        (["best.ckpt", "weights.json", "last.ckpt"], False, ["last.ckpt"]),
        (["best.ckpt", "weights.json", "last.ckpt"], True, []),
        (["best.ckpt", "last.ckpt", "weights.json"], False, []),
        ([], False, []),
    ],
)
def test_layers_come_from_the_latest_checkpoint_until_a_run_has_finished(tmp_path, monkeypatch, written, is_finished, read):
    found = []

    def noting(path, fmt):
        found.append(path.name)
        raise ValueError("no net in it")

    monkeypatch.setattr(report, "read_checkpoint", noting)
    (tmp_path / "config.yaml").write_text("command: train\n")
    if is_finished:
        (tmp_path / "results.json").write_text('{"command": "train", "top1": 50.0}')
    for second, name in enumerate(written):
        path = tmp_path / ("checkpoints" if name.endswith("ckpt") else "analysis") / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}")
        os.utime(path, (second, second))
    remake(compose("analyze", f"run={tmp_path}", f"run_dir={tmp_path}/log"))
    assert found == read


def test_a_run_that_fails_in_training_has_a_page(tmp_path, refused):
    cfg = compose("train", *TINY, "quant=fp", "report=true", "optimizer.lr=1e30", "trainer.limit_train_batches=6", f"run_dir={tmp_path}")
    line = refused("train", cfg)
    assert "training stopped" in line
    found = page(tmp_path)
    assert "The run failed: training stopped" in found.text
    assert "a lower optimizer.lr" in found.text


def test_a_resumed_run_shows_all_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "describe_layers", lambda *args: None)
    run = train(tmp_path / "run", "quant=fp")
    train(run, "quant=fp", "resume=true", "trainer.max_epochs=3", "report=true")
    # Two steps an epoch.
    assert "at step 1 to" in page(run).text
    assert "at step 5" in page(run).text


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "analysis is not set: must be one of cost,"),
        (["run=/nowhere"], "run='/nowhere': neither config.yaml nor results.json is there"),
        (["run=/nowhere", "analysis=cost"], "run='/nowhere': makes a report anew and analyses nothing"),
    ],
)
def test_mistakes(overrides, message, tmp_path, refused):
    assert message in refused("analyze", compose("analyze", *overrides, f"run_dir={tmp_path}"))


def test_nothing_that_a_foreign_directory_says_is_resolved(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "hunter2")
    (tmp_path / "config.yaml").write_text("command: train\nseed: ${oc.env:SECRET}\n")
    chosen = ["+q=${oc.env:SECRET}", "quant=ofq_3bit"]
    (tmp_path / report.COMMAND).write_text(json.dumps({"command": "train.py", "overrides": chosen, "chosen": chosen}))
    remake(compose("analyze", f"run={tmp_path}", f"run_dir={tmp_path}/log"))
    assert "hunter2" not in (tmp_path / "report.html").read_text()
    assert origin_of(tmp_path).differences == []
    (tmp_path / report.COMMAND).write_text(json.dumps({"command": "train.py", "overrides": ["../conf/quant=fp", "seed=1"]}))
    assert origin_of(tmp_path).compared == "conf/train.yaml"
    assert origin_of(tmp_path).differences == [{"setting": "seed", "here": "${oc.env:SECRET}", "default": "0"}]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[1, 2]",
        "\x00\x01",
        "a: [",
        "a: " + "[" * 500 + "]" * 500,
        "a: &a [1]\n" + "".join(f"{y}: &{y} [{', '.join(['*' + x] * 9)}]\n" for x, y in itertools.pairwise("abcdefghijk")),
    ],
    ids=["empty", "list", "binary", "cut", "deep", "aliases"],
)
def test_a_damaged_config_is_left_out(tmp_path, content, caplog):
    (tmp_path / "config.yaml").write_text(content)
    (tmp_path / report.COMMAND).write_text("{" if content else json.dumps([1]))
    (tmp_path / "results.json").write_text('{"command": "train", "top1": 50.0}')
    remake(compose("analyze", f"run={tmp_path}", f"run_dir={tmp_path}/log"))
    assert origin_of(tmp_path) == Origin()
    assert "50.00 %" in page(tmp_path).text
    assert all("\n" not in record.getMessage() for record in caplog.records if record.levelname == "WARNING")


def test_differences_of_a_config_of_an_unknown_command(tmp_path):
    (tmp_path / "config.yaml").write_text("command: fly\n")
    assert origin_of(tmp_path).differences == []
    (tmp_path / report.COMMAND).write_text(json.dumps({"command": "fly.py", "overrides": ["a=b c"], "chosen": []}))
    assert origin_of(tmp_path).command == "python fly.py 'a=b c'"
    (tmp_path / "config.yaml").write_text("command: train\n")
    (tmp_path / report.COMMAND).write_text(json.dumps({"command": "train.py", "overrides": [], "chosen": ["quant=of_my_own"]}))
    assert origin_of(tmp_path).differences == []
