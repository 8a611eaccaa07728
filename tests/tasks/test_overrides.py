"""Arguments that cannot be composed: what is typed, and the line that comes instead of Hydra's answer. Oracle: the table."""

import subprocess
import sys

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.errors import ConfigCompositionException

from qat.tasks import cli, overrides
from tests.conftest import ROOT, compose

TYPED = {
    # a key that is not there: another option has it, another place has it, another spelling has it, nothing has it
    "loss.teacher_head=dist": "loss.teacher_head=dist: there is no such setting; loss=ce has none, loss=kd has",
    "lr=1e-3": "lr=1e-3: there is no such setting; near: optimizer.lr",
    "epochs=3": ("epochs=3: there is no such setting; near: scheduler.warmup_epochs, scheduler.cooldown_epochs, trainer.max_epochs"),
    "quant.bit=3": "quant.bit=3: there is no such setting; near: quant.bits, quant.act_bits, quant.stem_bits",
    "sed=1": "sed=1: there is no such setting; near: seed",
    "hydra.swep.dir=x": "hydra.swep.dir=x: there is no such setting; near: hydra.run.dir, hydra.sweep.dir",
    "nothing_like_it=1": "nothing_like_it=1: there is no such setting; +nothing_like_it=1 adds it",
    "seed=1 sed=1 lr=3": "sed=1: there is no such setting; near: seed",
    # an option that is not there
    "trainer=foo": "trainer=foo: there is no such option; must be one of cpu, ddp, fsdp, gpu, slurm",
    "+debug=slow": "debug=slow: there is no such option; must be one of fast, overfit, profile",
    "loss=ce quant=null": "quant=null: Config group override must be a string or a list. Got NoneType",
    # what is no assignment, or two
    "seed=1,2": "seed=1,2: several values; with -m they are so many runs, seed=[1,2] is a list",
    "seed=1 train": ("train: not understood (missing EQUAL at '<EOF>'); must be key=value, in quotes if it has blanks, commas or brackets"),
    "quant.overrides={a": (
        "quant.overrides={a: not understood (no viable alternative at input '{a'); must be key=value, in quotes if it has blanks, "
        "commas or brackets"
    ),
    "callbacks=[default,ema2]": "callbacks=ema2: there is no such option; must be one of cga, default, ema, freeze, oscillation",
    "+seed=3": "+seed=3: there is such a setting already; seed=3 sets it",
    # what Hydra says well, without its line breaks
    "~quant.foo": "~quant.foo: Could not delete from config. 'quant.foo' does not exist",
}


@pytest.fixture
def answered():
    with overrides.answered_in_one_line():
        yield


@pytest.mark.parametrize("typed", TYPED)
def test_an_argument_that_cannot_be_composed_gets_one_line(answered, typed):
    with pytest.raises(SystemExit) as ended:
        compose("train", *typed.split())
    assert ended.value.code == f"error: {TYPED[typed]}"


def test_a_config_that_can_be_composed_is_left_alone(answered):
    assert compose("train", "seed=3", "+colour=red", "~logger").seed == 3


def test_a_traceback_can_be_had(answered, monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ConfigCompositionException, match="Could not override 'sed'"):
        compose("train", "sed=1")


def test_the_process_is_left_as_it_was():
    load = ConfigLoaderImpl.load_configuration
    with overrides.answered_in_one_line(), pytest.raises(SystemExit):
        compose("train", "sed=1")
    assert ConfigLoaderImpl.load_configuration is load


@pytest.mark.parametrize("arguments", [["run_dir={run}", "sed=1"], ["-m", "hydra.sweep.dir={run}", "sed=1,2"]], ids=["run", "sweep"])
def test_the_scripts_answer_so(tmp_path, arguments):
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", *(argument.format(run=tmp_path / "run") for argument in arguments)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.strip() == "error: sed=1: there is no such setting; near: seed"
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} <= {"multirun.yaml"}  # Hydra's, of a sweep's arguments


def test_a_reference_to_nothing_is_one_line_in_a_fresh_folder(tmp_path, caplog):
    cfg = compose("train", "seed=${nowhere}", f"run_dir={tmp_path}/run")
    with pytest.raises(SystemExit):
        cli.run("train", cfg)
    assert "error: config: Interpolation key 'nowhere' not found" in caplog.text
    assert not (tmp_path / "run" / "results.json").exists()
