"""Real jobs of the real scheduler. Oracles: what SLURM says of them; the run uninterrupted; one process with the global batch."""

import logging
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT, compose, results
from tests.tasks.test_resume import assert_same_checkpoint, assert_same_results, last

log = logging.getLogger(__name__)
pytestmark = [pytest.mark.slurm, pytest.mark.timeout(500)]

# Nine steps an epoch, on two processes or one. Adam would turn the rounding of sums into steps of its own size.
SETTINGS = [
    "model.args.embed_dim=24",
    "model.args.depth=1",
    "trainer.max_epochs=2",
    "optimizer=sgd",
    "optimizer.lr=0.01",
    "report=false",
]
ON_CPU = ["trainer.accelerator=cpu"]
HELD_AT = 4
# One after the step in which a signal comes: the processes exchange it.
STOPPED_AT = HELD_AT + 2
HELD = ["+callbacks.pace._target_=tests.slurm.pace.Pace", f"+callbacks.pace.step={HELD_AT}"]
# The batch script of the documentation; what a job is to have of its own is said to sbatch.
SCRIPT = re.search(
    r"^```bash\n(#!/bin/bash\n.*?)^```$",
    (ROOT / "docs" / "cluster.md").read_text(),
    re.DOTALL | re.MULTILINE,
)[1]
COMMAND = Path(sys.executable).with_name("qat")
MODEST = ["--gpus-per-node=0", "--cpus-per-task=1", "--time=10"]


class Job:
    """A job that is handed in: its number, its run directory, what it prints."""

    def __init__(self, scheduler, folder, *overrides, options=(), script=SCRIPT):
        self.scheduler = scheduler
        path = folder / "train.sbatch"
        path.write_text(script)
        sizes = ["--nodes=1", "--ntasks-per-node=1", *MODEST, *options]
        self.number = scheduler.call(
            "sbatch", "--parsable", *sizes, str(path), *SETTINGS, *overrides, cwd=folder
        ).strip()
        self.run_dir, self.output = (
            folder / "outputs" / "train" / f"slurm-{self.number}",
            folder / f"qat-{self.number}.out",
        )

    def signal_when_held(self, *options, processes=1):
        """Send a signal once the processes are in the middle of a step."""
        self.held(processes)
        self.scheduler.call("scancel", *options, self.number)

    def held(self, processes):
        """Wait until the processes are in the middle of a step, and return their numbers."""
        signs = [self.run_dir / f"waiting-{rank}" for rank in range(processes)]
        self.scheduler.until(
            lambda: held(signs) or self.scheduler.end(self.number),
            f"job {self.number} trains",
            240,
            self.output,
        )
        assert held(signs), self.output.read_text()
        return [int(sign.read_text()) for sign in signs]

    def ended(self, state="COMPLETED"):
        """Wait for the end in a state, and return what was printed."""
        self.scheduler.wait(self.number, state, 240, self.output)
        said = self.output.read_text()
        log.info("job %s, %s:\n%s", self.number, state, said)
        return said


def held(signs):
    return all(sign.exists() and sign.read_text() for sign in signs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where jobs are handed in: it has the command beside it, as the repository has."""
    made = tmp_path_factory.mktemp("jobs")
    for name in ("train.py", "conf"):
        (made / name).symlink_to(ROOT / name)
    return made


@pytest.fixture(scope="module", autouse=True)
def jobs(scheduler, folder):
    """Jobs that run in parallel with other tests."""
    # The names of the two nodes do not resolve.
    pair = ["--partition=pair", "--nodes=2", "--export=ALL,MASTER_ADDR=127.0.0.1"]
    plain = SCRIPT.replace("srun python", "python")
    return {
        "preempted": Job(
            scheduler,
            folder,
            *ON_CPU,
            *HELD,
            "data.batch_size=64",
            "data.num_workers=1",
            options=pair,
        ),
        "cancelled": Job(scheduler, folder, *ON_CPU, *HELD, "data.num_workers=1"),
        "bereft": Job(
            scheduler, folder, *ON_CPU, *HELD, "data.batch_size=64", options=["--ntasks-per-node=2"]
        ),
        "plain": Job(scheduler, folder, *ON_CPU, options=["--ntasks-per-node=2"], script=plain),
        "installed": Job(
            scheduler,
            folder,
            *ON_CPU,
            script=SCRIPT.replace("srun python train.py", f"srun {COMMAND} train"),
        ),
    }


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run of one process, here."""
    from qat.tasks.train import train

    run_dir = tmp_path_factory.mktemp("alone") / "run"
    train(compose("train", *SETTINGS, "data.batch_size=128", f"run_dir={run_dir}"))
    return run_dir


@pytest.fixture(scope="module")
def preempted(jobs):
    """The job of two nodes, taken away in mid-epoch, at its end: it and what it printed."""
    job = jobs["preempted"]
    job.signal_when_held("--signal=USR1", processes=2)
    return job, job.ended()


@pytest.fixture(scope="module")
def sweep(scheduler, folder, jobs):
    """Two jobs of two processes each, with the same settings. The first is held and gets submitit's own signal."""
    fields = {"partition": "ci", "tasks_per_node": 2, "cpus_per_task": 1, "timeout_min": 10}
    preset = [
        "hydra/launcher=slurm_cpu",
        *(f"hydra.launcher.{name}={value}" for name, value in fields.items()),
    ]
    command = [
        sys.executable,
        "train.py",
        "-m",
        *SETTINGS,
        "trainer=slurm",
        *ON_CPU,
        "data.batch_size=64",
        *preset,
        HELD[0],
        f"{HELD[1]},99",
        "run_dir=sweep",
    ]
    parent = subprocess.Popen(
        command,
        cwd=folder,
        env=scheduler.env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        signs = [folder / "sweep" / "0" / f"waiting-{rank}" for rank in (0, 1)]
        scheduler.until(
            lambda: held(signs) or parent.poll() is not None, "the first job trains", 240
        )
        array = re.search(r"(\d+)_0", scheduler.call("squeue", "-h", "-r", "-o", "%i")).group(1)
        scheduler.call("scancel", "--signal=USR2", f"{array}_0")
        scheduler.until(
            lambda: scheduler.job(f"{array}_0")["Restarts"] == "1", "the first job is requeued", 120
        )
        scheduler.wait(f"{array}_0", seconds=240)
        out, _ = parent.communicate(timeout=120)
    finally:
        parent.kill()
    log.info("sweep, array %s:\n%s", array, out)
    assert parent.returncode == 0, out
    return array, folder / "sweep"


def assert_same(run_dir, other_dir):
    assert assert_same_checkpoint(run_dir, other_dir)["global_step"] == 18
    assert_same_results(run_dir, other_dir)


def named(run_dir):
    """Files that a person sees in a run directory."""
    paths = [path.relative_to(run_dir) for path in run_dir.rglob("*") if path.is_file()]
    return {str(path) for path in paths if not any(part.startswith(".") for part in path.parts)}


def test_cancelled_it_saves_and_stays_cancelled(jobs, scheduler):
    # Its loader process gets the signal too.
    job = jobs["cancelled"]
    job.signal_when_held()
    said = job.ended("CANCELLED")
    way = f"the same command resumes with resume=auto run_dir={job.run_dir}"
    assert f"stopped by SIGTERM after training step {HELD_AT + 1}: last.ckpt written; {way}" in said
    assert last(job.run_dir)["global_step"] == HELD_AT + 1
    assert scheduler.job(job.number)["Restarts"] == "0"


def test_when_a_process_dies_the_others_do_not_wait_for_it(jobs, scheduler):
    _, second = jobs["bereft"].held(2)
    os.kill(second, signal.SIGKILL)
    scheduler.until(
        lambda: scheduler.end(jobs["bereft"].number),
        "the first process is gone",
        60,
        jobs["bereft"].output,
    )
    assert "task 1: Killed" in jobs["bereft"].ended("FAILED")


def test_the_command_of_an_installed_package_trains_as_the_script_does(jobs):
    said = jobs["installed"].ended()
    assert f"outputs in {jobs['installed'].run_dir}" in said
    assert results(jobs["installed"].run_dir)["split"] == "test"


def test_without_srun_several_tasks_are_refused(jobs):
    what = "error: SLURM has 2 tasks for this job, and this process is not one of them"
    ways = "start them with: srun python ..., or a single one with: srun --nodes=1 --ntasks=1 python ..."
    assert jobs["plain"].ended("FAILED").strip() == f"{what}; {ways}"


def test_preempted_in_mid_epoch_a_job_of_two_nodes_goes_on_under_its_number(
    preempted, scheduler, folder, sweep
):
    job, said = preempted
    lines = [
        f"preempted by SIGUSR1 after training step {STOPPED_AT}: last.ckpt written, requeueing job {job.number}",
        f"job {job.number}, restart 1: resume=auto",
        f"resumed at training step {STOPPED_AT} from {job.run_dir}/checkpoints/last.ckpt",
        "epoch 1/2",
        "outputs in ",
    ]
    assert [said.count(line) for line in lines] == [1] * len(lines), said
    assert "Warning" not in said
    assert "site-packages" not in said
    assert scheduler.job(job.number)["Restarts"] == "1"
    assert_same(job.run_dir, sweep[1] / "1")
    assert not list(folder.rglob("hpc_ckpt*"))


def test_in_a_sweep_a_job_that_gets_sigusr2_goes_on(sweep):
    array, root = sweep
    log = (root / "0" / "train.log").read_text()
    assert (
        f"preempted by SIGUSR2 after training step {STOPPED_AT}: last.ckpt written, requeueing job {array}_0"
        in log
    )
    assert f"resumed at training step {STOPPED_AT} from {root}/0/checkpoints/last.ckpt" in log
    assert_same(root / "0", root / "1")


def test_two_processes_train_as_one_does_and_write_one_set_of_files(sweep, alone, jobs):
    job = sweep[1] / "1"
    ours, theirs = last(job), last(alone)
    assert ours["global_step"] == theirs["global_step"] == 18
    for name, value in theirs["state_dict"].items():
        torch.testing.assert_close(
            ours["state_dict"][name], value, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert named(job) - {"train.log", "command.json"} == named(alone)
