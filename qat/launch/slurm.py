"""SLURM jobs: processes, restarts and requeueing. This module imports nothing heavy."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qat.errors import UsageError
from qat.launch.ranks import LOCK_FILE, env_number, is_first, is_srun_task, local_processes
from qat.launch.signals import Preempted

log = logging.getLogger(__name__)

OWNER_FILE = ".slurm-job"
# A job is not requeued if this many of its runs have ended before a checkpoint was saved.
MAX_RUNS_WITHOUT_CHECKPOINT = 3
# Seconds for srun to show the log, for scontrol to answer, and for SLURM to end this process.
SHOW_LOG_S = 0.5
REQUEUE_S = 60
KILL_S = 120
# Job names that Lightning treats as an interactive session, in which any command may be started.
INTERACTIVE = ("bash", "interactive")


def job_id() -> str | None:
    """Return the number of this process's job, such as `3_0` in an array, or None outside SLURM."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    task = os.environ.get("SLURM_ARRAY_TASK_ID")
    if array and task:
        return f"{array}_{task}"
    return os.environ.get("SLURM_JOB_ID")


def is_launched() -> bool:
    """True in a SLURM job, and in a rank of a torchrun that the user started."""
    is_by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ and LOCK_FILE not in os.environ
    return job_id() is not None or is_by_torchrun


def slurm_tasks_per_node() -> int:
    """Processes per node (1 outside SLURM), for `${slurm_tasks_per_node:}` in config files."""
    return env_number("SLURM_NTASKS_PER_NODE")


def slurm_nodes() -> int:
    """Nodes of the srun step or job (1 outside SLURM), for `${slurm_nodes:}` in config files."""
    return env_number("SLURM_STEP_NUM_NODES", "SLURM_NNODES")


def check_processes(trainer: Mapping[str, Any]) -> None:
    """Compare the processes that SLURM started with `trainer.devices` and `trainer.num_nodes`.

    If the numbers differed, processes would wait for each other.

    Raises:
        UsageError: the numbers differ or are unknown; or in a batch job of several tasks, srun did
            not start this process.
    """
    if "SLURM_JOB_ID" not in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:
        return
    if not is_srun_task():
        _check_single_process()
        return
    tasks = env_number("SLURM_NTASKS")
    if tasks > 1 and "SLURM_NTASKS_PER_NODE" not in os.environ:
        raise UsageError(
            f"SLURM has {tasks} tasks for this job, but does not say how many run on a node; "
            "set --ntasks-per-node instead of --ntasks"
        )
    counts = (
        ("devices", local_processes(trainer), slurm_tasks_per_node(), "tasks on each node"),
        ("num_nodes", trainer.get("num_nodes", 1), slurm_nodes(), "nodes"),
    )
    for name, requested, started, unit in counts:
        if requested != started:
            raise UsageError(
                f"trainer.{name}={trainer.get(name, 1)!r}: SLURM has {started} {unit}; "
                f"must be {started}, which trainer=slurm sets"
            )


def set_address() -> None:
    """If srun started the processes on one node, set the address at which they connect, if unset.

    By default it is the name of the node, which may not resolve.
    """
    if is_srun_task() and "TORCHELASTIC_RUN_ID" not in os.environ and slurm_nodes() == 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")


def _check_single_process() -> None:
    """Raise `UsageError` in a batch job of several tasks if srun did not start this process."""
    tasks = env_number("SLURM_NTASKS")
    is_interactive = os.environ.get("SLURM_JOB_NAME") in INTERACTIVE
    if tasks <= 1 or "SLURM_STEP_ID" in os.environ or is_interactive:
        return
    raise UsageError(
        f"SLURM has {tasks} tasks for this job, and this process is not one of them; "
        "start them with: srun python ..., "
        "or a single one with: srun --nodes=1 --ntasks=1 python ..."
    )


def cluster_environments() -> list[Any]:
    """Plugins that tell Lightning the rank of this process, unless it finds the rank itself.

    By default, Lightning assumes that srun started every process of a SLURM job.
    """
    from lightning.pytorch.plugins.environments import LightningEnvironment, SLURMEnvironment

    # Srun may have started torchrun, once for each node.
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return []
    if is_srun_task():
        return [SLURMEnvironment(auto_requeue=False)]
    return [LightningEnvironment()] if "SLURM_JOB_ID" in os.environ else []


def implied_resume(resume: Any, run_dir: Path, *, overwrite: bool) -> Any:
    """Return the setting `resume`, or "auto" for a job that SLURM has restarted.

    Args:
        resume: the setting; only False is replaced.
        run_dir: the run directory.
        overwrite: True if older files of the directory are to be removed; the job then resumes only
            if the files belong to it.
    """
    restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
    if restarts == "0" or resume is not False:
        return resume
    if overwrite and not _is_owner(run_dir):
        return resume
    if is_first():
        log.info("job %s, restart %s: resume=auto", job_id(), restarts)
    return "auto"


def _is_owner(run_dir: Path) -> bool:
    owner = run_dir / OWNER_FILE
    return owner.is_file() and owner.read_text().strip() == job_id()


def write_owner(run_dir: Path) -> None:
    """Record the SLURM job, if any, as the owner of the files in a run directory."""
    if "SLURM_JOB_ID" in os.environ:
        (run_dir / OWNER_FILE).write_text(f"{job_id()}\n")


def end_preempted(stop: Preempted, run_dir: Path, resume_hint: str) -> int:
    """Log that a signal ended the run, and requeue a SLURM job if the signal asks for it.

    Args:
        stop: the exception, with the signal and, in training, the step.
        run_dir: the run directory.
        resume_hint: how a user resumes the run.

    Returns:
        The exit code, used if SLURM does not end this process first.
    """
    code = 128 + stop.signal
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # SLURM sends SIGTERM to requeued jobs
    will_requeue = stop.wants_requeue and job_id() is not None
    if is_first():
        next_step = f", requeueing job {job_id()}" if will_requeue else f"; {resume_hint}"
        log.warning("%s%s", _describe(stop), next_step)
        failure_reason = _requeue(run_dir) if will_requeue else None
        if failure_reason is not None:
            log.error("job %s not requeued (%s); %s", job_id(), failure_reason, resume_hint)
            return code
    if will_requeue:
        time.sleep(KILL_S)
    return code


def _describe(stop: Preempted) -> str:
    verb = "preempted" if stop.wants_requeue else "stopped"
    if stop.step is None:
        return f"{verb} by {stop.name} outside training"
    checkpoint_text = f"{stop.saved.name} written" if stop.saved else "no last.ckpt written"
    return f"{verb} by {stop.name} after training step {stop.step}: {checkpoint_text}"


def _requeue(run_dir: Path) -> str | None:
    """Requeue this job, which makes SLURM end srun.

    Returns the reason if the job is not requeued, else None.
    """
    runs = env_number("SLURM_RESTART_COUNT", default=0) + 1
    if runs >= MAX_RUNS_WITHOUT_CHECKPOINT and not any(run_dir.rglob("*.ckpt")):
        return (
            f"{runs} runs of the job have ended before the first checkpoint; "
            "the time limit of the job is too short"
        )
    time.sleep(SHOW_LOG_S)  # requeueing kills srun, which must print the log first
    try:
        process = subprocess.run(
            ["scontrol", "requeue", str(job_id())],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=REQUEUE_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if process.returncode == 0:
        return None
    return " ".join((process.stderr or process.stdout).split())
