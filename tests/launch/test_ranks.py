"""The processes that a command starts. Oracle: a table of cases; tests/cli/test_commands.py has the processes themselves."""

import os
import sys

import pytest

from qat.launch import ranks
from tests.errors import usage_error

PLACES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "SLURM_PROCID",
    "SLURM_STEP_ID",
    "SLURM_NTASKS",
    "TORCHELASTIC_RUN_ID",
)


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in PLACES:
        monkeypatch.delenv(name, raising=False)


def count(**trainer):
    return ranks.processes_to_start({"accelerator": "cpu", "strategy": "auto", **trainer})


@pytest.mark.parametrize(
    ("devices", "expected"),
    [(1, 0), (2, 2), ("2", 2), ([0, 1, 2], 3), ("auto", 0), ("x", 0), (0, 0), (-1, 0), (True, 0)],
)
def test_a_command_starts_what_devices_asks_for(devices, expected):
    assert count(devices=devices) == expected


@pytest.mark.parametrize(
    ("trainer", "line"),
    [
        ({"strategy": "ddp_spawn"}, r"^trainer\.strategy='ddp_spawn': must be .*auto, ddp, fsdp"),
        ({"num_nodes": 2}, r"^trainer\.num_nodes=2: must be 1; .* srun or torchrun"),
        (
            {"devices": 100000},
            r"^trainer\.devices=100000: must be at most 1024 processes per machine",
        ),
    ],
)
def test_what_cannot_be_started_is_refused(trainer, line):
    with usage_error(line):
        count(**{"devices": 2, **trainer})


@pytest.mark.parametrize(
    ("found", "number", "started"),
    [
        ({}, 0, 2),
        ({"RANK": "3"}, 3, 2),
        ({"LOCAL_RANK": "0"}, 0, 0),
        ({"SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, 1, 0),
        ({"SLURM_STEP_ID": "0", "SLURM_NTASKS": "1", "SLURM_PROCID": "2"}, 2, 2),
        ({"SLURM_PROCID": "2"}, 0, 2),  # what an allocation leaves in a shell
        ({"RANK": "1", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0"}, 1, None),
    ],
)
def test_rank_and_whether_processes_are_there(monkeypatch, found, number, started):
    for name, value in found.items():
        monkeypatch.setenv(name, value)
    assert ranks.rank() == number
    assert ranks.is_first() == (number == 0)
    assert started is None or count(devices=2) == started


def test_the_process_becomes_torchrun_of_the_same_command(monkeypatch):
    called = []
    monkeypatch.setattr(os, "execv", lambda *given: called.append(given))
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)))
    ranks.become_torchrun(4, ["train.py", "a=1"])
    ((program, arguments),) = called
    assert program == arguments[0] == sys.executable
    assert {"--standalone", "--nproc-per-node=4", f"--shutdown-timeout={ranks.SHUTDOWN_S}"} < set(
        arguments
    )
    assert arguments[-2:] == ["train.py", "a=1"]
    assert os.environ["OMP_NUM_THREADS"] == "3"
