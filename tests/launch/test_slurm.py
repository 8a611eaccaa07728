"""Jobs of SLURM without SLURM: its variables as srun 22.05 sets them. tests/slurm has the real scheduler."""

import os
import signal
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest
from lightning.pytorch.plugins.environments import LightningEnvironment, SLURMEnvironment
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from qat.errors import UsageError
from qat.launch import slurm
from qat.launch.signals import Preempted
from tests.conftest import compose, train

WAYS = (
    "start them with: srun python ..., or a single one with: srun --nodes=1 --ntasks=1 python ..."
)
JOB = {
    "SLURM_JOB_ID": "17",
    "SLURM_JOB_NAME": "qat",
    "SLURM_NNODES": "1",
    "SLURM_NODELIST": "localhost",
    "SLURM_PROCID": "0",
}
BATCH = {**JOB, "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
TASK = {
    **BATCH,
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}
PAIR = {
    **TASK,
    "SLURM_NNODES": "2",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_NTASKS_PER_NODE": "1",
    "SLURM_NODELIST": "nowhere[1-2]",
}


@pytest.fixture
def place(monkeypatch):
    """Sets variables in place of all that a launcher may have set."""
    launchers = ("SLURM", "MASTER_", "TORCHELASTIC")
    for name in [
        name for name in os.environ if name.startswith(launchers) or name in {"RANK", "LOCAL_RANK"}
    ]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MASTER_ADDR", "")  # so that what the code sets is taken back
    monkeypatch.delenv("MASTER_ADDR")

    monkeypatch.setattr(
        rank_zero_only, "rank", rank_zero_only.rank
    )  # Lightning's environments set it for good

    def put(variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return put


@pytest.mark.parametrize(
    ("variables", "typed", "message"),
    [
        (
            BATCH,
            "",
            f"SLURM has 2 tasks for this job, and this process is not one of them; {WAYS}",
        ),
        (
            TASK,
            "",
            "trainer.devices=1: SLURM has 2 tasks on each node; must be 2, which trainer=slurm sets",
        ),
        (
            TASK,
            "trainer.devices=4",
            "trainer.devices=4: SLURM has 2 tasks on each node; must be 2, which trainer=slurm sets",
        ),
        (
            PAIR,
            "trainer.devices=1",
            "trainer.num_nodes=1: SLURM has 2 nodes; must be 2, which trainer=slurm sets",
        ),
        (
            {name: value for name, value in TASK.items() if name != "SLURM_NTASKS_PER_NODE"},
            "trainer.devices=2",
            "SLURM has 2 tasks for this job, but does not say how many run on a node; set --ntasks-per-node instead of --ntasks",
        ),
    ],
    ids=["no-srun", "devices", "more-devices", "nodes", "ntasks"],
)
def test_processes_that_would_wait_for_each_other_are_refused(place, variables, typed, message):
    place(variables)
    with pytest.raises(UsageError) as error:
        slurm.check_processes(compose("train", *typed.split(), "run_dir=a").trainer)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("variables", "typed"),
    [
        ({}, ""),
        (TASK, "trainer=slurm"),
        (
            {**TASK, "SLURM_JOB_NAME": "interactive"},
            "trainer=slurm",
        ),  # which Lightning alone would take for two single runs
        ({**BATCH, "SLURM_JOB_NAME": "bash"}, ""),  # a person tries something in an allocation
        ({**BATCH, "TORCHELASTIC_RUN_ID": "none"}, "trainer.devices=8"),
        ({**TASK, "SLURM_STEP_NUM_TASKS": "1"}, ""),  # srun --ntasks=1 in a job of two
        ({**JOB, "SLURM_NTASKS": "1"}, "trainer.devices=4"),  # processes of our own
    ],
)
def test_others_are_not(place, variables, typed):
    place(variables)
    slurm.check_processes(compose("train", *typed.split(), "run_dir=a").trainer)


@pytest.mark.parametrize(
    ("variables", "address"),
    [
        (TASK, "127.0.0.1"),
        ({**TASK, "MASTER_ADDR": "node7"}, "node7"),
        (PAIR, None),  # Lightning takes the name of the first node
        ({**TASK, "TORCHELASTIC_RUN_ID": "none"}, None),
        (BATCH, None),
    ],
    ids=["one node", "already set", "two nodes", "torchrun", "no srun"],
)
def test_processes_of_one_node_meet_at_its_own_address(place, variables, address):
    place(variables)
    slurm.set_address()
    assert os.environ.get("MASTER_ADDR") == address


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        (TASK, SLURMEnvironment),
        ({**JOB, "SLURM_NTASKS": "1"}, LightningEnvironment),
        ({**TASK, "TORCHELASTIC_RUN_ID": "1", "SLURM_STEP_NUM_TASKS": "1"}, None),
        ({**TASK, "TORCHELASTIC_RUN_ID": "1"}, None),
        ({}, None),
    ],
    ids=["srun", "alone", "torchrun", "torchrun on every node", "none"],
)
def test_lightning_is_told_whose_processes_they_are(place, variables, expected):
    place(variables)
    found = slurm.cluster_environments()
    assert [type(one) for one in found] == ([] if expected is None else [expected])
    assert not any(getattr(one, "auto_requeue", False) for one in found)


@pytest.mark.parametrize(
    ("variables", "resume", "overwrite", "expected"),
    [
        ({**JOB, "SLURM_RESTART_COUNT": "1"}, False, False, "auto"),
        ({**JOB, "SLURM_RESTART_COUNT": "1"}, True, False, True),
        ({**JOB, "SLURM_RESTART_COUNT": "0"}, False, False, False),
        (JOB, False, False, False),
        # What is in the directory may be the older run that is to be overwritten.
        ({**JOB, "SLURM_RESTART_COUNT": "1"}, False, True, False),
    ],
)
def test_a_job_that_is_started_again_goes_on(
    place, tmp_path, variables, resume, overwrite, expected
):
    place(variables)
    assert slurm.implied_resume(resume, tmp_path, overwrite=overwrite) == expected


def test_what_is_overwritten_is_not_gone_on_with_but_what_came_after_it(place, tmp_path, float_run):
    # A job that overwrites an older run: preempted before it began, and after.
    place({**JOB, "SLURM_RESTART_COUNT": "1", "SLURM_NTASKS": "1"})
    train(tmp_path, "quant=fp")
    assert (tmp_path / ".slurm-job").read_text() == "17\n"
    place({"SLURM_JOB_ID": "18"})
    assert slurm.implied_resume(False, tmp_path, overwrite=True) is False
    slurm.write_owner(tmp_path)
    assert slurm.implied_resume(False, tmp_path, overwrite=True) == "auto"


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """A command of that name that notes its arguments and ends as it is set to; and how long was waited for SLURM."""
    calls, waited = tmp_path / "calls", []
    monkeypatch.setattr(slurm, "time", SimpleNamespace(sleep=waited.append))
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGTERM)

    def make(code=0, error=""):
        path = tmp_path / "bin" / "scontrol"
        path.parent.mkdir()
        path.write_text(f"#!/bin/sh\necho $* >> {calls}\necho '{error}' >&2\nexit {code}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")
        return lambda: (calls.read_text().splitlines() if calls.exists() else [], waited)

    yield make
    signal.signal(signal.SIGTERM, before)


def left(caplog, stop, run_dir="runs/a"):
    caplog.clear()
    code = slurm.end_preempted(stop, Path(run_dir), "WAY ON")
    return code, caplog.messages


REFUSAL = "slurm_requeue error: Requested operation is presently disabled"


@pytest.mark.parametrize("error", ["", REFUSAL], ids=["requeued", "refused"])
def test_a_preempted_job_is_requeued_and_waits_for_its_end(
    place, scontrol, caplog, tmp_path, error
):
    asked = scontrol(1 if error else 0, error)
    place(JOB)
    lines = ["preempted by SIGUSR1 after training step 5: last.ckpt written, requeueing job 17"]
    waits = [slurm.SHOW_LOG_S]
    if error:
        lines.append(f"job 17 not requeued ({REFUSAL}); WAY ON")
    else:
        waits.append(slurm.KILL_S)
    assert left(caplog, Preempted(signal.SIGUSR1, 5, tmp_path / "last.ckpt")) == (138, lines)
    assert asked() == (["requeue 17"], waits)
    assert error or signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_of_an_array_it_is_the_one_job_and_only_the_first_process_asks(place, scontrol, caplog):
    asked = scontrol()
    place({**TASK, "SLURM_ARRAY_JOB_ID": "3", "SLURM_ARRAY_TASK_ID": "0"})
    assert left(caplog, Preempted(signal.SIGUSR2)) == (
        140,
        ["preempted by SIGUSR2 outside training, requeueing job 3_0"],
    )
    place({"SLURM_PROCID": "1"})
    assert left(caplog, Preempted(signal.SIGUSR2)) == (140, [])
    assert asked() == (["requeue 3_0"], [slurm.SHOW_LOG_S, slurm.KILL_S, slurm.KILL_S])


@pytest.mark.parametrize("name", [None, "checkpoints/last.ckpt"])
def test_a_job_that_never_saves_anything_is_not_started_for_ever(
    place, scontrol, caplog, tmp_path, name
):
    asked = scontrol()
    place({**JOB, "SLURM_RESTART_COUNT": "1"})
    assert len(left(caplog, Preempted(signal.SIGUSR1), tmp_path)[1]) == 1
    place({"SLURM_RESTART_COUNT": "2"})
    if name is not None:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    code, lines = left(caplog, Preempted(signal.SIGUSR1), tmp_path)
    assert (code, len(asked()[0])) == (138, 1 if name is None else 2)
    why = "3 runs of the job have ended before the first checkpoint; the time limit of the job is too short"
    assert lines[1:] == ([f"job 17 not requeued ({why}); WAY ON"] if name is None else [])


@pytest.mark.parametrize(
    ("variables", "stop", "line"),
    [
        (
            JOB,
            Preempted(signal.SIGTERM, 5),
            "stopped by SIGTERM after training step 5: no last.ckpt written; WAY ON",
        ),
        ({}, Preempted(signal.SIGUSR1), "preempted by SIGUSR1 outside training; WAY ON"),
    ],
    ids=["cancelled", "elsewhere"],
)
def test_elsewhere_and_where_it_is_to_stop_nobody_is_asked(
    place, scontrol, caplog, variables, stop, line
):
    asked = scontrol()
    place(variables)
    assert left(caplog, stop) == (128 + stop.signal, [line])
    assert asked() == ([], [])
