"""The commands as processes: exit codes and the lines on the terminal."""

import errno
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest

from qat.cli import entry
from tests.commands import typed
from tests.conftest import ROOT, TINY, compose, results, tiny

PYTHON = sys.executable


def command(script, *overrides, cwd, **env):
    """Run one of the root scripts."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "HYDRA"))} | {"OMP_NUM_THREADS": "1"} | env
    done = subprocess.run(
        [PYTHON, str(ROOT / script), *overrides], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.long
def test_train_then_evaluate(tmp_path):
    code, out, err = command("train.py", *TINY, "run_dir=run", cwd=tmp_path)
    assert code == 0, err
    run = tmp_path / "run"
    top1 = results(run)["top1"]
    assert f"test top-1 {top1:.2f} %" in out
    assert (run / "train.log").read_text().count("epoch 1/1") == 1
    assert "Warning" not in out + err
    code, out, err = command("eval.py", "ckpt=run/checkpoints/best.ckpt", "run_dir=eval", cwd=tmp_path)
    assert code == 0, err
    assert f"top-1  {top1:.2f} %" in out
    assert results(tmp_path / "eval")["top1"] == top1


def test_a_mistake_is_one_line_and_exit_code_1(tmp_path):
    code, out, err = command("train.py", *TINY, "quant.bits=9", "run_dir=run", cwd=tmp_path)
    assert code == 1
    assert out.strip() == "error: quant.bits=9: must be an integer from 2 to 8"
    assert "Traceback" not in err
    assert "quant.bits=9" in results(tmp_path / "run")["error"]


@pytest.mark.long
def test_with_debug_the_traceback_comes_through(tmp_path):
    code, out, err = command("train.py", *TINY, "quant.bits=9", "debug=fast", "run_dir=run", cwd=tmp_path)
    assert code == 1
    assert "UsageError: quant.bits=9" in out + err
    assert "check_bits" in out + err


def test_an_unknown_choice_is_answered_with_the_choices(tmp_path):
    code, out, err = command("train.py", "quant=ofq_9bit", cwd=tmp_path)
    assert code == 1
    assert "ofq_2bit" in out + err
    assert "Traceback" not in out + err


def test_help_lists_the_choices(tmp_path):
    code, out, _ = command("train.py", "--help", cwd=tmp_path)
    assert code == 0
    assert "quant: deploy_w4a4, deploy_w4a8, deploy_w8a8, fp, lsq_2bit" in out
    assert "optimizer:" in out
    assert not list(tmp_path.iterdir())


@pytest.mark.long
@pytest.mark.slow
def test_a_multirun_is_the_product_of_lists(tmp_path):
    code, out, err = command("train.py", "-m", *TINY, "quant=ofq_2bit,ofq_4bit", "seed=1,2", cwd=tmp_path)
    assert code == 0, out + err
    (root,) = (tmp_path / "outputs" / "train").iterdir()
    found = [(r["recipe"]["bits"], r["seed"]) for r in (results(root / str(i)) for i in range(4))]
    assert found == [(2, 1), (2, 2), (4, 1), (4, 2)]
    assert all((root / str(i) / "checkpoints" / "last.ckpt").exists() for i in range(4))


@pytest.mark.long
def test_in_a_multirun_a_mistake_stops_its_job_alone(tmp_path):
    code, out, err = command("train.py", "-m", *TINY, "quant.bits=9,2,4", "run_dir=sweep", cwd=tmp_path)
    assert code == 1
    failed, *fine = (results(tmp_path / "sweep" / str(i)) for i in range(3))
    assert "quant.bits=9" in failed["error"]
    assert failed["top1"] is None
    assert [r["recipe"]["bits"] for r in fine] == [2, 4]
    assert not any("error" in r for r in fine)
    assert out.count("error: quant.bits=9") == 1
    assert "3 jobs: 2 done, 1 failed" in out
    assert "job 0 (quant.bits=9): quant.bits=9: must be an integer from 2 to 8" in out
    assert {"sweep.csv", "report.html"} <= {path.name for path in (tmp_path / "sweep").iterdir()}
    assert "Traceback" not in out + err


@pytest.mark.long
@pytest.mark.slow
def test_in_a_multirun_a_run_that_turns_into_nan_stops_alone(tmp_path):
    spoil = ("+callbacks.spoil._target_=tests.callbacks.test_finite.SpoiledNet", "+callbacks.spoil.step=1,99")
    code, out, err = command("train.py", "-m", *TINY, *spoil, "run_dir=sweep", cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert code == 1
    failed, fine = (results(tmp_path / "sweep" / str(i)) for i in range(2))
    assert "the loss of step 1 is nan; first not finite: blocks.0.mlp.fc1.weight" in failed["error"]
    assert failed["top1"] is None
    assert fine["top1"] is not None
    assert out.count("error: training stopped") == 1
    assert "Traceback" not in out + err


def interrupted(cwd, moment, *arguments):
    """Run a command, and press Ctrl-C: the signal goes to all processes of the terminal. Gives exit code and what was printed.

    Args:
        moment: seconds after the start, or a text on the terminal.
    """
    run = subprocess.Popen(
        [PYTHON, *arguments],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    said = ""
    if isinstance(moment, str):
        while moment not in said and (line := run.stdout.readline()):
            said += line
    else:
        time.sleep(moment)
    os.killpg(run.pid, signal.SIGINT)
    rest, _ = run.communicate(timeout=120)
    return run.returncode, said + rest


@pytest.mark.parametrize("script", ["train.py", "export.py"])
def test_ctrl_c_while_a_command_starts_is_one_line(tmp_path, script):
    # Python names each import behind it: before the first of the command's own, Ctrl-C is Python's.
    code, said = interrupted(tmp_path, "qat.launch.startup\n", "-X", "importtime", ROOT / script, "run_dir=run")
    assert code == 130
    assert re.fullmatch(r"stopped by Ctrl-C.*\n", "".join(line for line in said.splitlines(True) if not line.startswith("import time:")))


def test_the_line_of_a_stopped_run_is_a_command_that_goes_on(tmp_path):
    spot = ("+callbacks.send._target_=tests.callbacks.test_preemption.Send", f"+callbacks.send._args_=[0,{int(signal.SIGINT)}]")
    settings = ("quant.overrides={blocks.0.*:{bits:8}}", "report=false", *spot)
    code, said = typed("train.py", *TINY, *settings, "trainer.limit_train_batches=3", "run_dir=run", cwd=tmp_path)
    assert code == 130
    line = r"stopped by Ctrl-C at step 1: last.ckpt written; go on with: (python train.py .* run_dir=run resume=true)"
    _, script, *arguments = shlex.split(re.search(line, said)[1])
    code, said = typed(script, *arguments, cwd=tmp_path)
    assert code == 0, said
    assert "resumed at step 1 from" in said
    assert results(tmp_path / "run")["top1"] is not None


@pytest.mark.parametrize("flag", ["--config-dir", "--config-path"])
def test_the_line_has_the_config_file_that_was_chosen(tmp_path, float_run, flag):
    chosen = (flag, str(float_run), "--config-name", "config")
    spot = ("+callbacks.send._target_=tests.callbacks.test_preemption.Send", f"+callbacks.send._args_=[0,{int(signal.SIGINT)}]")
    code, said = typed("train.py", *chosen, *spot, "run_dir=run", cwd=tmp_path)
    assert code == 130
    assert f"go on with: python train.py {shlex.join(chosen)} {spot[0]} " in said


@pytest.mark.long
@pytest.mark.slow
def test_ctrl_c_ends_a_run_in_one_line(tmp_path):
    code, said = interrupted(tmp_path, "epoch 2/500", ROOT / "train.py", "trainer.max_epochs=500", "report=false", "run_dir=run")
    assert code == 130
    assert "Traceback" not in said
    assert re.fullmatch(r"stopped by Ctrl-C at step \d+: last.ckpt written; go on with: python train.py .*", said.splitlines()[-1])


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("moment", [6, "epoch 2/500"], ids=["start", "training"])
def test_ctrl_c_ends_all_processes_of_a_run_in_one_line(tmp_path, moment):
    several = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2")
    code, said = interrupted(tmp_path, moment, ROOT / "train.py", *several, "trainer.max_epochs=500", "report=false", "run_dir=run")
    assert code == 130
    assert "Traceback" not in said
    assert said.count("stopped by Ctrl-C") == 1


@pytest.mark.long
@pytest.mark.slow
def test_ctrl_c_ends_a_sweep(tmp_path):
    code, said = interrupted(
        tmp_path, "epoch 2/", ROOT / "train.py", "-m", "seed=1,2", "trainer.max_epochs=50", "report=false", "run_dir=run"
    )
    assert code == 130
    assert "Traceback" not in said
    assert re.search(r"stopped by Ctrl-C at step \d+: last.ckpt written; the same command goes on with resume=auto run_dir=.*/run\n", said)
    assert not (tmp_path / "run" / "1").exists()


@pytest.mark.parametrize("run_dir", ["file", "file/run", "/proc/run"])
def test_a_run_dir_that_cannot_be_made_is_one_line(tmp_path, run_dir):
    (tmp_path / "file").touch()
    code, out, err = command("train.py", f"run_dir={run_dir}", cwd=tmp_path)
    assert code == 1
    assert (out + err).strip().startswith(f"error: run_dir='{run_dir}': cannot be written (")
    assert "Traceback" not in out + err


@pytest.mark.long
def test_a_tilde_is_the_home_folder(tmp_path):
    code, out, err = command("train.py", "data=cifar10", "data.root=~/nowhere", "run_dir=~/run", cwd=tmp_path, HOME=str(tmp_path))
    assert code == 1
    assert out.strip() == f"error: data.root='{tmp_path}/nowhere': no such folder", err
    assert "nowhere" in results(tmp_path / "run")["error"]


@pytest.mark.parametrize("config", ["train", "eval"])
def test_under_slurm_the_job_names_the_run_directory(monkeypatch, config):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    assert compose(config).run_dir == f"outputs/{config}/slurm-4711"


def test_without_slurm_date_and_time_do(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    run_dir = compose("train").run_dir
    time.strptime(run_dir, "outputs/train/%Y-%m-%d_%H-%M-%S")


def test_what_nobody_foresaw_keeps_its_traceback(tmp_path, monkeypatch):
    from qat.cli import entry
    from qat.tasks import train

    def fails(cfg):
        raise ZeroDivisionError

    monkeypatch.setattr(train, "train", fails)
    with pytest.raises(ZeroDivisionError):
        entry.run("train", tiny(tmp_path / "run"))


def test_the_result_of_the_task_is_handed_on(tmp_path, monkeypatch):
    from qat.cli import entry
    from qat.tasks import train

    monkeypatch.setattr(train, "train", lambda cfg: 42.0)
    assert entry.run("train", tiny(tmp_path / "run")) == 42.0


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            RuntimeError("your LightningModule has parameters that were not used in producing the loss"),
            "trainer.strategy: a step leaves some parameters out; must be ddp_find",
        ),
        (
            RuntimeError("DataLoader worker (pid 12) is killed by signal: Killed. "),
            "DataLoader worker (pid 12) is killed by signal: Killed; memory",
        ),
        (RuntimeError("received 0 items of ancdata"), "ulimit -n "),
        (OSError(errno.EMFILE, "Too many open files", "x"), "ulimit -n "),
        (OSError(errno.ENOSPC, "No space left on device", "x"), "cannot be written: x"),
        (RuntimeError("Connection closed by peer [1.2.3.4]"), "another process of this run is gone"),
        (RuntimeError("shape mismatch"), None),
    ],
)
def test_a_machine_that_is_in_the_way_is_no_bug_of_ours(error, said):
    found = entry._of_the_machine(error)
    assert (found is None) if said is None else str(found).startswith(said)
