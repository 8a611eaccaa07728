"""`report.html` of commands. Oracle: the files of the run, and runs with `report=false`."""

import errno
import shutil

import pytest

import qat
from qat.tasks import report
from qat.tasks.analyze import analyze
from qat.tasks.ptq import ptq
from qat.tasks.report import rebuild_report
from tests.commands import typed
from tests.conftest import TINY, compose, results, train
from tests.report.pages import read
from tests.tiny import quantized

SMALL = ("data.calibration_images=20", "ptq.batch=20")


def page(run):
    """The page of a run, which has to be well formed."""
    return read(run / "report.html")


def test_a_training_run_has_a_page(tmp_path):
    asked = (*TINY, "quant=ofq_3bit", "callbacks=[default,ema]", "seed=3", "run_dir=first")
    code, out = typed("train.py", *asked, cwd=tmp_path)
    assert code == 0, out
    assert "report.html" in out
    run = tmp_path / "first"
    found = page(run)
    command = "quant=ofq_3bit 'callbacks=[default,ema]' seed=3 run_dir=first"
    for text in (
        f"{results(run)['top1']:.2f} %",
        "test split",
        "W3 A3",
        "blocks.0.mlp.fc1",
        "python train.py ++model.args",
        command,
    ):
        assert text in found.text, text
    assert len(found.all("img")) >= 4
    assert (run / "report.html").stat().st_size < 600_000


@pytest.mark.long
def test_ptq_has_a_page(tmp_path, float_run):
    start = f"ckpt={float_run}/checkpoints/last.ckpt"
    ptq(compose("ptq", "report=true", start, *SMALL, f"run_dir={tmp_path}"))
    assert f"{results(tmp_path)['top1_fp']:.2f}".rstrip("0").rstrip(".") in page(tmp_path).text


@pytest.mark.long
def test_an_analysis_has_a_page(tmp_path, run_4bit):
    start = f"ckpt={run_4bit}/checkpoints/last.ckpt"
    analyze(compose("analyze", "report=true", start, "analysis=cost", f"run_dir={tmp_path}"))
    assert "Cost by kind of layer" in page(tmp_path).text
    assert not (tmp_path / "analysis").exists()


def test_a_page_that_fails_fails_no_run(tmp_path, monkeypatch, caplog):
    def broken(*args):
        raise RuntimeError("no ink\nat all")

    monkeypatch.setattr(report, "describe_layers", broken)
    train(tmp_path / "run", "quant=fp", "report=true")
    line = "report.html could not be written (RuntimeError: no ink at all); all other files were written"
    assert caplog.messages.count(line) == 1


@pytest.mark.sample(1)
@pytest.mark.parametrize("is_finished", [True, False])
def test_run_makes_the_page_anew_with_layers_of_the_checkpoint(tmp_path, run_4bit, is_finished):
    run = tmp_path / "run"
    shutil.copytree(run_4bit, run)
    if not is_finished:
        (run / "results.json").unlink()
    (run / "checkpoints/best-epoch000.ckpt").touch()
    if is_finished:  # the best of another run is not this run's
        (run / "checkpoints/best.ckpt").unlink()
        (run / "other/checkpoints").mkdir(parents=True)
        (run / "other/checkpoints/best.ckpt").touch()
    before = {path.name for path in run.iterdir()}
    rebuild_report(compose("analyze", f"run={run}", f"run_dir={tmp_path}/log"))
    assert {path.name for path in run.iterdir()} - before == {"report.html", "analysis"}
    assert "blocks.0.mlp.fc1" in page(run).text
    assert ("The run has not ended." in page(run).text) != is_finished


@pytest.mark.sample(1)
@pytest.mark.parametrize("preset", ["fp", "lsq"])
def test_a_model_saved_in_python_without_data_has_a_page(tmp_path, preset):
    run = tmp_path / "run"
    qat.save(quantized(preset), run / "best.ckpt")
    (run / "results.json").write_text("{}")
    rebuild_report(compose("analyze", f"run={run}", f"run_dir={tmp_path}/log"))
    assert (run / "analysis/cost.csv").exists()
    page(run)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("results.json", '{"top1": "x"}'),
        ("results.json", f'{{"seed": 1{"0" * 400}}}'),
        ("command.json", '{"overrides": 7}'),
        ("metrics.csv", "step\n1,2\n"),
        ("quantized.ckpt", "x"),
    ],
)
def test_a_damaged_file_in_a_directory_is_one_line(tmp_path, refused, file, text):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").touch()
    (run / file).write_text(text)
    line = refused(compose("analyze", f"run={run}", f"run_dir={tmp_path}/log"))
    assert "must contain intact files of a run" in line or file in line


def test_a_disk_that_cannot_be_written_is_not_a_damaged_file(tmp_path, refused, monkeypatch):
    def full(folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "config.yaml").touch()
    monkeypatch.setattr(report, "_write_page", full)
    line = refused(compose("analyze", f"run={tmp_path}", f"run_dir={tmp_path}/log"))
    assert line == "error: a file: cannot be read or written (No space left on device)"


def test_a_run_that_fails_in_training_has_a_page(tmp_path, refused):
    cfg = compose(
        "train",
        *TINY,
        "quant=fp",
        "report=true",
        "optimizer.lr=1e30",
        "trainer.limit_train_batches=6",
        f"run_dir={tmp_path}",
    )
    assert "training stopped" in refused(cfg)
    assert "The run failed: training stopped" in page(tmp_path).text
