"""Which processes a command starts, and what it makes of their ends. Oracles: written-out cases, and one sweep on the command line."""

import contextlib
import functools
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from qat.cli import entry
from qat.errors import UsageError
from qat.launch import group, ranks, watch
from tests.conftest import ROOT, results

PLACES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_STEP_ID", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", ranks.EXCHANGE)


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in (*PLACES, *ranks.MEETING, "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


def asking(**trainer):
    return OmegaConf.create({"accelerator": "cpu", "strategy": "auto", **trainer})


@pytest.mark.parametrize(
    ("devices", "count"), [(1, 0), (2, 2), (8, 8), ("2", 2), ([0, 1, 2], 3), ("auto", 0), ("x", 0), (0, 0), (-1, 0), (True, 0)]
)
def test_a_command_starts_what_devices_asks_for(devices, count):
    assert ranks.to_start(asking(devices=devices)) == count


@pytest.mark.parametrize(
    "found", [{"LOCAL_RANK": "0"}, {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "2"}, {ranks.EXCHANGE: ""}, {"OMPI_COMM_WORLD_SIZE": "2"}]
)
def test_nothing_is_started_where_the_processes_are_there(monkeypatch, found):
    for name, value in found.items():
        monkeypatch.setenv(name, value)
    assert ranks.to_start(asking(devices=2)) == 0


def test_a_single_task_of_slurm_starts_the_processes_of_its_devices(monkeypatch):
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert ranks.to_start(asking(devices=4)) == 4


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork", "ddp_notebook"])
def test_strategies_that_copy_the_process_are_refused(strategy):
    with pytest.raises(UsageError, match=rf"^trainer\.strategy='{strategy}': must be .*auto, ddp, fsdp"):
        ranks.to_start(asking(devices=2, strategy=strategy))


def test_several_nodes_need_someone_who_starts_them(monkeypatch):
    with pytest.raises(
        UsageError, match=r"^trainer\.num_nodes=2: .* srun or torchrun, or by hand with MASTER_ADDR, MASTER_PORT, NODE_RANK"
    ):
        ranks.to_start(asking(devices=1, num_nodes=2))
    for name, value in {"MASTER_ADDR": "a", "MASTER_PORT": "1", "NODE_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert ranks.to_start(asking(devices=1, num_nodes=2)) == 1


@pytest.mark.parametrize(
    ("found", "number"),
    [
        ({}, 0),
        ({"RANK": "3"}, 3),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "2"}, 2),
        ({"SLURM_PROCID": "2"}, 0),  # what an allocation leaves in a shell
        ({"RANK": "1", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0"}, 1),
    ],
)
def test_rank(monkeypatch, found, number):
    for name, value in found.items():
        monkeypatch.setenv(name, value)
    assert ranks.rank() == number
    assert ranks.is_first() == (number == 0)


def test_differing_configs_are_named():
    base = {"seed": 0, "optimizer.lr": 0.1}
    message = group.difference([base, base, base | {"optimizer.lr": 0.3}])
    assert message.startswith("optimizer.lr: process 2 of 3 has 0.3, process 0 has 0.1; all processes of a run need one config")
    assert "extra: process 1 of 2 has 1, process 0 has 'nothing'" in group.difference([base, base | {"extra": 1}])
    assert group.difference([base | {"nan": float("nan")}, base | {"nan": float("nan")}]) is None


def watched(tmp_path, *scripts):
    """Processes of one line of Python each, watched until they have ended."""
    found = watch.Watch([tmp_path / f"rank-{number}.log" for number in range(1, len(scripts))])
    for number, script in enumerate(scripts):
        with contextlib.ExitStack() as stack:
            said = stack.enter_context(found.logs[number - 1].open("wb")) if number else None
            found.processes.append(subprocess.Popen([sys.executable, "-c", script], stdout=said, stderr=said))
    found.wait()
    assert all(process.poll() is not None for process in found.processes)
    return found


WAITS, FINE = "import time; time.sleep(60)", "pass"


def dies(kind):
    return f"import os; os.kill(os.getpid(), {int(kind)})"


@pytest.mark.parametrize(
    ("scripts", "code", "complaint"),
    [
        ((FINE, FINE), 0, None),
        # The first says itself what is wrong; the other, which is wrong too, is not heard.
        (("exit(1)", "exit(1)"), 1, None),
        (("exit(1)", WAITS), 1, None),
        ((WAITS, "exit('error: the line')"), 1, r"^process 1 of 2 ended with exit code 1: error: the line \(.*rank-1\.log\)$"),
        ((WAITS, dies(signal.SIGKILL)), -9, r"^process 1 of 2 was killed \(SIGKILL, often for want of memory\)$"),
        ((dies(signal.SIGSEGV), WAITS), -11, r"^process 0 of 2 was killed \(SIGSEGV\)$"),
        # Who lost the connection to one that was killed is not the news.
        ((f"exit({watch.LOST})", f"import time; time.sleep(0.5); {dies(signal.SIGKILL)}"), -9, r"^process 1 of 2 was killed"),
        ((f"exit({watch.LOST})", f"exit({watch.LOST})"), watch.LOST, "^process 0 of 2 lost the connection to another$"),
    ],
)
def test_the_one_that_failed_is_named_and_none_is_left(tmp_path, monkeypatch, scripts, code, complaint):
    monkeypatch.setattr(watch, "GRACE", 1.5)
    found = watched(tmp_path, *scripts)
    assert (found.failed or (0, 0))[1] == code
    if complaint is None:
        assert found.complaint() is None
    else:
        assert re.search(complaint, found.complaint())


@pytest.mark.parametrize("there", [0, 1])
def test_a_signal_that_comes_before_all_are_started_reaches_them(tmp_path, there):
    found = watch.Watch([tmp_path / "rank-1.log"])
    start = functools.partial(subprocess.Popen, [sys.executable, "-c", WAITS])
    found.processes.extend(start() for _ in range(there))
    found.hand_on(signal.SIGTERM, None)
    found.processes.extend(start() for _ in range(2 - there))
    found.wait()
    assert [process.returncode for process in found.processes] == [-signal.SIGTERM] * 2


def test_a_lost_connection_is_one_line():
    error = RuntimeError("[.../gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:25395. This is typically ...\nmore")
    found = entry._mistake(error)
    assert isinstance(found, entry.LostError)
    assert str(found).startswith("another process of this run is gone: ")
    assert "\n" not in str(found)
    assert entry._mistake(RuntimeError("shapes differ")) is None


TINY = (
    "trainer=ddp",
    "report=false",
    "model.args.embed_dim=24",
    "model.args.depth=1",
    "trainer.max_epochs=1",
    "trainer.limit_train_batches=2",
)


def typed(tmp_path, *arguments):
    command = [sys.executable, str(ROOT / "train.py"), *arguments, *TINY]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.long
def test_a_job_of_a_sweep_starts_its_processes(tmp_path):
    """A sampler without a seed: a process that read the command line again would train another net in a sweep of its own."""
    sampled = ("hydra/sweeper=optuna", "optimizer.lr=interval(1e-4,1e-2)", "hydra.sweeper.n_trials=1", "hydra.sweeper.n_jobs=1")
    done = typed(tmp_path, "-m", *sampled, f"run_dir={tmp_path / 'sweep'}")
    assert done.returncode == 0, done.stderr
    assert results(tmp_path / "sweep" / "0")["top1"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["sweep"]
    assert not list((tmp_path / "sweep" / "0").glob("rank-*.log"))


def test_nodes_write_into_one_folder(tmp_path, monkeypatch):
    """Started by hand, both with two processes: each has a file for what its own second process says."""
    for node in ("0", "1"):
        monkeypatch.setenv("NODE_RANK", node)
        assert ranks.supervise("tests.launch.speaking:speak", "", tmp_path, 2, nodes=2) == int(node) * 2
        assert ranks.is_on_first_node() == (node == "0")
    assert {path.name: path.read_text().strip() for path in tmp_path.iterdir()} == {"rank-1.log": "1", "rank-3.log": "3"}


@pytest.mark.long
def test_a_mistake_is_told_once(tmp_path):
    done = typed(tmp_path, "optimizer.lr=-1", f"run_dir={tmp_path / 'run'}")
    assert done.returncode == 1
    assert (done.stdout + done.stderr).strip() == "error: optimizer.lr=-1: must be a number above 0"
    assert results(tmp_path / "run")["error"].startswith("optimizer.lr=-1")


@pytest.mark.long
@pytest.mark.slow
def test_killing_a_process_ends_the_run(tmp_path):
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        "trainer=ddp",
        "report=false",
        "trainer.max_epochs=500",
        f"run_dir={tmp_path / 'run'}",
    ]
    run = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    others = _wait_for_ranks(run, tmp_path / "run" / "checkpoints" / "last.ckpt")
    os.kill(others[1], signal.SIGKILL)
    said, _ = run.communicate(timeout=180)  # the report of an error takes imports
    assert run.returncode == 128 + signal.SIGKILL
    assert "error: process 1 of 2 was killed (SIGKILL, often for want of memory)" in said
    assert "Traceback" not in said
    assert not any(_is_alive(pid) for pid in others)


def _wait_for_ranks(run, path):
    """The processes that a command started, by rank, once they have written a file."""
    deadline = time.monotonic() + 120
    while not path.exists() and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    return sorted(int(pid) for pid in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split())


def _is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
