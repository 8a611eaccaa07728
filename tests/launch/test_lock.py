"""One run at a time in a directory. Oracle: the files that are there."""

import contextlib
import errno
import fcntl
import multiprocessing
import os
import re
import signal
import socket
import time

import pytest

from qat.cli import entry
from qat.launch import lock
from qat.launch.lock import InUseError
from tests.commands import typed
from tests.conftest import TINY, tiny

CONTEXT = multiprocessing.get_context("fork")


def _hold(run_dir, ready, loader):
    lock.take(run_dir)
    if loader:
        CONTEXT.Process(target=time.sleep, args=(60,)).start()
    ready.set()
    time.sleep(60)


@contextlib.contextmanager
def held_elsewhere(run_dir, *, loader=False):
    """Another process that holds a directory, until it is killed."""
    ready = CONTEXT.Event()
    process = CONTEXT.Process(target=_hold, args=(str(run_dir), ready, loader))
    process.start()
    assert ready.wait(10)
    try:
        yield process
    finally:
        process.kill()
        process.join()


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "arguments",
    [
        ("train.py", *TINY),
        ("train.py", "overwrite=true"),
        ("train.py", "-m", "seed=1,2"),
        ("eval.py", "ckpt=x.ckpt"),
        ("ptq.py", "ckpt=x.ckpt"),
        ("analyze.py", "ckpt=x.ckpt", "analysis=cost"),
        ("export.py", "ckpt=x.ckpt"),
    ],
    ids=" ".join,
)
def test_a_second_run_is_refused_in_one_line_and_leaves_no_trace(tmp_path, arguments):
    with held_elsewhere(tmp_path / "run") as holder:
        before = contents(tmp_path)
        code, out = typed(*arguments, "run_dir=run", cwd=tmp_path)
        who = f"process {holder.pid} on host {socket.gethostname()}"
        assert code == f"error: run_dir='run': is in use by {who}; must be another directory, or wait for it to end"
        assert out == ""
        assert contents(tmp_path) == before


def test_a_job_whose_directory_is_in_use_fails_alone(tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr("qat.tasks.train.train", lambda cfg: trained.append(cfg.seed))
    with held_elsewhere(tmp_path / "sweep" / "0"):
        code, out = typed("train.py", "-m", *TINY, "report=false", "seed=1,2", "run_dir=sweep", cwd=tmp_path)
    assert code == 1
    assert re.search(r"error: run_dir='.*/sweep/0': is in use by process \d+", out)
    assert not (tmp_path / "sweep" / "0" / "results.json").exists()
    assert trained == [2]
    assert not list(tmp_path.rglob(lock.FILE))[1:], "only that of the other process"


def test_a_killed_run_locks_nobody_out_though_a_loader_of_it_lives_on(tmp_path):
    with held_elsewhere(tmp_path, loader=True) as holder:
        with pytest.raises(InUseError):
            lock.take(str(tmp_path))
        os.kill(holder.pid, signal.SIGKILL)
        holder.join()
        with lock.held(str(tmp_path)):
            assert f"process {os.getpid()} " in (tmp_path / lock.FILE).read_text()
    assert contents(tmp_path) == {}


def test_one_that_waits_gets_the_lock_of_one_that_ends(tmp_path, monkeypatch):
    # The last stretch of a job that is requeued, on another host.
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with held_elsewhere(tmp_path) as holder:
        monkeypatch.setattr(time, "sleep", lambda _: (holder.kill(), holder.join()))
        with lock.held(str(tmp_path)):
            assert (tmp_path / lock.FILE).exists()


def test_a_file_of_another_user_is_held(tmp_path, monkeypatch):
    def denied(path, *_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    (tmp_path / lock.FILE).write_text("process 7 on host other\n")
    monkeypatch.setattr(os, "open", denied)
    with pytest.raises(InUseError, match="is in use by process 7 on host other"):
        lock.take(str(tmp_path))


OTHERS = [{"RANK": "1"}, {"QAT_RANK_EXCHANGE": ""}, {"NODE_RANK": "1"}, {"SLURM_STEP_ID": "0", "SLURM_PROCID": "1"}]


@pytest.mark.parametrize("place", OTHERS, ids=str)
def test_the_other_processes_of_a_run_are_not_asked(tmp_path, monkeypatch, place):
    with held_elsewhere(tmp_path):
        before = contents(tmp_path)
        for name, value in place.items():
            monkeypatch.setenv(name, value)
        with lock.held(str(tmp_path)):
            assert contents(tmp_path) == before
        assert contents(tmp_path) == before


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_prevents_no_run(tmp_path, monkeypatch, caplog, number):
    def no_locks(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    monkeypatch.setattr("qat.tasks.train.train", lambda cfg: 42.0)
    assert entry.run("train", tiny(tmp_path / "run")) == 42.0
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warning.startswith(f"run_dir='{tmp_path / 'run'}': this file system has no locks")
    assert contents(tmp_path) == {}


def test_the_report_of_a_run_that_is_going_can_be_made(tmp_path, float_run):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_bytes((float_run / "config.yaml").read_bytes())
    with held_elsewhere(run):
        code, _ = typed("analyze.py", f"run={run}", "run_dir=report", cwd=tmp_path)
    assert code == 0
    assert (run / "report.html").exists()
