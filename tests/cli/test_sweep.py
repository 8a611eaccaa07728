"""Sweeps from the first job to the table. Oracle: what the jobs leave in their directories, exit codes, the lines at the end."""

import re

import pytest
from lightning.pytorch import Callback
from omegaconf import OmegaConf

from qat.report.sweep import overrides_of
from tests.commands import typed
from tests.conftest import ROOT, TINY, compose, results
from tests.system.test_launchers import with_hydra

FEW = ("trainer.limit_val_batches=1", "trainer.limit_test_batches=1")
QUICK = (*TINY, *FEW, "report=false")
END = "+callbacks.end._target_=tests.cli.test_sweep.Ends"


class Ends(Callback):
    """Ends the process in the middle of a job."""

    def __init__(self, seed, victim):
        self.hit = seed == victim

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if self.hit and trainer.global_step == 3:
            exit(3)


def jobs(folder, count, read=results):
    """What is read in the directories of the jobs."""
    return [read(folder / str(number)) for number in range(count)]


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """Three jobs of two epochs: the second was ended in its second epoch, so the third never began."""
    cwd = tmp_path_factory.mktemp("swept")
    end = (END, "+callbacks.end.seed=${seed}", "+callbacks.end.victim=2")
    given = ("-m", *QUICK, "trainer.max_epochs=2", "quant.bits=2", "seed=1,2,3", "run_dir=sweep")
    code, out = typed("train.py", *given, *end, cwd=cwd)
    return cwd, given, code, out


@pytest.mark.long
def test_a_sweep_that_was_ended_says_how_far_it_came(swept):
    cwd, _, code, out = swept
    assert code == 3
    assert "2 jobs: 1 done, 1 not finished" in out
    assert "job 1 (seed=2): no results.json: killed, or still running" in out
    assert (cwd / "sweep" / "sweep.csv").exists()
    assert not (cwd / "sweep" / "2").exists()


@pytest.mark.long
def test_the_same_command_goes_on(swept):
    cwd, given, _, _ = swept
    first = (cwd / "sweep" / "0" / "checkpoints" / "last.ckpt").read_bytes()
    code, out = typed("train.py", *given, "resume=auto", cwd=cwd)
    assert code == 0, out
    assert "3 jobs: 3 done" in out
    assert "resumed at training step 4" in out, "the one that was done is not trained again"
    assert "resumed at training step 2" in out
    assert (cwd / "sweep" / "0" / "checkpoints" / "last.ckpt").read_bytes() == first
    found = jobs(cwd / "sweep", 3)
    assert [one["seed"] for one in found] == [1, 2, 3]
    mean = sum(one["top1"] for one in found) / 3
    assert f"{mean:.2f} ± " in out


def test_analyze_gathers_it_again(swept):
    cwd, *_ = swept
    (cwd / "sweep" / "sweep.csv").unlink()
    code, out = typed("analyze.py", "sweep=sweep", "run_dir=out", cwd=cwd)
    assert code == 0, out
    assert "jobs: " in out
    assert {"sweep.csv", "report.html"} <= {path.name for path in (cwd / "sweep").iterdir()}


@pytest.mark.parametrize(
    ("typed_in", "line"),
    [
        ("sweep=/nowhere", "sweep='/nowhere': must be a folder with runs below it"),
        ("sweep=a ckpt=b", "sweep='a': only gathers results; leave ckpt, run and analysis out"),
        ("sweep=a analysis=cost", "sweep='a': only gathers results"),
    ],
)
def test_what_cannot_be_gathered_is_one_line(tmp_path, refused, typed_in, line):
    assert re.search(line, refused(compose("analyze", f"run_dir={tmp_path}", *typed_in.split())))


@pytest.mark.long
def test_where_results_are_there_already_all_jobs_are_refused_and_stay(tmp_path):
    given = ("-m", *QUICK, "seed=1", "run_dir=sweep")
    assert typed("train.py", *given, cwd=tmp_path)[0] == 0
    code, out = typed("train.py", *given, "optimizer.lr=0.5", cwd=tmp_path)
    assert code == 1
    assert "1 job: 1 done" in out
    assert "job 0 (seed=1): run_dir='" in out
    assert (
        "contains best.ckpt already"
        in (tmp_path / "sweep" / "0" / ".hydra" / "error.txt").read_text()
    )
    assert "error" not in results(tmp_path / "sweep" / "0")


@pytest.mark.long
def test_a_study_survives_a_failed_trial_and_goes_on_behind_its_trials(tmp_path):
    # A batch of -4 images is impossible; the seed draws it for some trials.
    space = ("data.batch_size=choice(-4,64)", "hydra.sweeper.sampler.seed=2")
    given = ("hparams_search=optuna_lr", *QUICK, *space, "run_dir=study", "resume=auto")
    code, out = typed("train.py", *given, "hydra.sweeper.n_trials=4", cwd=tmp_path)
    assert code == 1
    assert "Traceback" not in out
    first = jobs(tmp_path / "study", 4)
    failed = [number for number, one in enumerate(first) if one.get("error")]
    assert 0 < len(failed) < 4
    assert all(first[number]["error"].startswith("data.batch_size=-4: ") for number in failed)
    assert f"4 jobs: {4 - len(failed)} done, {len(failed)} failed" in out
    assert f"Best value: {max(one['val_top1'] for one in first if not one.get('error'))}" in out
    # One of them is killed: it is tried again where it was.
    killed = next(number for number in range(4) if number not in failed)
    (tmp_path / "study" / str(killed) / "results.json").unlink()
    before = jobs(tmp_path / "study", 4, overrides_of)
    code, out = typed("train.py", *given, "hydra.sweeper.n_trials=5", cwd=tmp_path)
    assert "5 jobs: " in out
    names = sorted(path.name for path in (tmp_path / "study").iterdir() if path.name.isdigit())
    assert names == list("01234")
    after = jobs(tmp_path / "study", 5, overrides_of)
    assert [one["optimizer.lr"] for one in after[:4]] == [one["optimizer.lr"] for one in before]
    assert len({one["optimizer.lr"] for one in after}) == 5
    assert results(tmp_path / "study" / str(killed))["val_top1"] == first[killed]["val_top1"]
    assert out.count("resumed at training step") == 4 - len(failed)


@pytest.mark.parametrize(
    "search", sorted(path.stem for path in (ROOT / "conf" / "hparams_search").glob("*.yaml"))
)
def test_searches_are_repeatable_and_name_settings_that_exist(search):
    cfg = with_hydra(f"hparams_search={search}", "run_dir=a")
    assert cfg.hydra.mode.name == "MULTIRUN"
    sweeper = cfg.hydra.sweeper
    assert sweeper.sampler.seed is not None
    assert sweeper.direction == "maximize"
    for name in sweeper.params:
        parent, _, key = name.rpartition(".")
        assert key in OmegaConf.select(cfg, parent), name


@pytest.mark.long
def test_in_a_sweep_a_mistake_stops_its_job_alone(tmp_path):
    """Of the settings, and of the run: its loss turns into NaN."""
    spoil = (
        "+callbacks.spoil._target_=tests.callbacks.test_finite.SpoiledNet",
        "+callbacks.spoil.step=1,99",
    )
    code, out = typed(
        "train.py", "-m", *TINY, "quant.bits=9,2", *spoil, "run_dir=sweep", cwd=tmp_path
    )
    assert code == 1
    found = jobs(tmp_path / "sweep", 4)
    assert [one.get("error", "")[:20] for one in found] == ["quant.bits=9: must be"[:20]] * 2 + [
        "training stopped: the loss"[:20],
        "",
    ]
    assert [one["top1"] is None for one in found] == [True, True, True, False]
    assert out.count("error: quant.bits=9") == 2
    assert "4 jobs: 1 done, 3 failed" in out
    assert "Traceback" not in out
