"""Locks of run directories. Oracle: the files in them."""

import contextlib
import errno
import fcntl
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from qat.cli import job
from qat.launch import run_dir
from qat.launch.run_dir import UsedError
from tests.commands import typed
from tests.conftest import ROOT, TINY, contents, results, tiny

CONTEXT = multiprocessing.get_context("fork")


def _hold(folder, ready):
    run_dir.lock(folder)
    CONTEXT.Process(target=time.sleep, args=(60,)).start()  # as a loader of the run
    ready.set()
    time.sleep(60)


@contextlib.contextmanager
def locked_elsewhere(folder):
    """Another process that has locked a directory, until it is killed."""
    ready = CONTEXT.Event()
    process = CONTEXT.Process(target=_hold, args=(str(folder), ready))
    process.start()
    assert ready.wait(10)
    try:
        yield process
    finally:
        process.kill()
        process.join()


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    "arguments",
    [("train.py", "overwrite=true"), ("train.py", "-m", "seed=1,2"), ("eval.py", "ckpt=x.ckpt")],
    ids=" ".join,
)
def test_a_second_run_is_refused_in_one_line_and_leaves_no_trace(tmp_path, arguments):
    with locked_elsewhere(tmp_path / "run") as holder:
        before = contents(tmp_path)
        code, out = typed(*arguments, "run_dir=run", cwd=tmp_path)
        who = f"process {holder.pid} on host {socket.gethostname()}"
        assert code.startswith(f"error: run_dir='run': is in use by {who}; ")
        assert out == ""
        assert contents(tmp_path) == before


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_log_that_is_no_file_is_refused_in_one_line(tmp_path, make):
    (tmp_path / "run").mkdir()
    make(tmp_path / "run" / "train.log")
    code, _ = typed("train.py", *TINY, "run_dir=run", cwd=tmp_path)
    assert code == "error: run_dir='run': train.log exists and must be a file"


def test_a_job_whose_directory_is_in_use_fails_alone(tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr("qat.tasks.train.train", lambda cfg: trained.append(cfg.seed))
    with locked_elsewhere(tmp_path / "sweep" / "0"):
        code, out = typed(
            "train.py", "-m", *TINY, "report=false", "seed=1,2", "run_dir=sweep", cwd=tmp_path
        )
    assert code == 1
    assert re.search(r"error: run_dir='.*/sweep/0': is in use by process \d+", out)
    assert not (tmp_path / "sweep" / "0" / "results.json").exists()
    assert trained == [2]


def test_a_killed_run_locks_nobody_out_though_a_loader_of_it_lives_on(tmp_path):
    with locked_elsewhere(tmp_path) as holder:
        with pytest.raises(UsedError):
            run_dir.lock(str(tmp_path))
        os.kill(holder.pid, signal.SIGKILL)
        holder.join()
        with run_dir.hold_lock(str(tmp_path)):
            assert f"process {os.getpid()} " in (tmp_path / run_dir.LOCK).read_text()
    assert contents(tmp_path) == {}


def test_what_replaces_a_process_holds_the_directory_for_its_ranks(tmp_path, monkeypatch):
    program = """
import os, sys
from qat.launch import run_dir
run_dir.lock_for_ranks(sys.argv[1])
os.execvp("sh", ["sh", "-c", "echo; exec sleep 60"])
"""
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE
    ) as launcher:
        launcher.stdout.readline()
        with pytest.raises(UsedError, match=f"process {launcher.pid} on host"):
            run_dir.lock(str(tmp_path))
        monkeypatch.setenv("QAT_LOCK", str(tmp_path / ".lock"))
        with run_dir.hold_lock(str(tmp_path)):
            pass
        assert (tmp_path / ".lock").exists()
        monkeypatch.delenv("QAT_LOCK")
        launcher.kill()
    with run_dir.hold_lock(str(tmp_path)):
        assert f"process {os.getpid()} " in (tmp_path / ".lock").read_text()


def test_a_job_that_is_started_again_waits_for_its_last_stretch(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with locked_elsewhere(tmp_path) as holder:
        monkeypatch.setattr(time, "sleep", lambda _: (holder.kill(), holder.join()))
        with run_dir.hold_lock(str(tmp_path)):
            assert (tmp_path / run_dir.LOCK).exists()


def test_a_file_system_without_locks_prevents_no_run(tmp_path, monkeypatch, caplog):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    monkeypatch.setattr("qat.tasks.train.train", lambda _: 42.0)
    assert job.run_task(tiny(tmp_path / "run")) == 42.0
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warning.startswith(f"run_dir='{tmp_path / 'run'}': this file system has no locks")
    assert contents(tmp_path) == {}


def test_a_directory_is_locked_until_an_error_is_recorded(tmp_path, monkeypatch):
    locked = []
    write = job._write_error
    monkeypatch.setattr(
        job,
        "_write_error",
        lambda *args: (locked.append((tmp_path / "run/.lock").exists()), write(*args)),
    )
    with pytest.raises(SystemExit):
        job.run_task(tiny(tmp_path / "run", "ckpt=missing.ckpt"))
    assert locked == [True]
    assert "missing.ckpt" in results(tmp_path / "run")["error"]
    assert not (tmp_path / "run/.lock").exists()
