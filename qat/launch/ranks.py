"""Processes of a run: which one this is, torchrun where no launcher starts them, jobs of SLURM. Imports nothing heavy."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from qat.errors import UsageError
from qat.launch.signals import Preempted

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

log = logging.getLogger(__name__)

HIGHEST_COUNT = 1024  # more is a typing mistake that no machine survives
# Strategies of Lightning that copy the running process.
COPYING = ("spawn", "fork", "notebook")
# Seconds between a signal and the kill, of torchrun: a run saves after the step under way, or after the validation.
SAVE_S = 600
OWNER = ".slurm-job"
# Number of the process that a rank ends with; the lock file that it holds for them.
LAUNCHER, HELD = "QAT_LAUNCHER", "QAT_LOCK"
FRUITLESS = 3  # so many stretches of a job may end without anything to go on from
SAID_S, REQUEUE_S, KILL_S = 0.5, 60, 120
# Names by which Lightning knows a session of a person, who may start what they like.
OF_PERSONS = ("bash", "interactive")


def rank() -> int:
    """Number of this process in the run; 0 in a run of one process."""
    return env_number(
        "RANK", *(["SLURM_PROCID"] if "SLURM_STEP_ID" in os.environ else []), default=0
    )


def env_number(*names: str, default: int = 1) -> int:
    """The first of some environment variables that holds a whole number."""
    return next(
        (int(os.environ[name]) for name in names if os.environ.get(name, "").isdigit()), default
    )


def is_first() -> bool:
    """True for the one process of a run that writes files and logs."""
    return rank() == 0


def is_launched() -> bool:
    """True if a scheduler, or a torchrun that was typed, started this process."""
    is_by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ and HELD not in os.environ
    return job() is not None or is_by_torchrun


def is_srun_task() -> bool:
    """True for one of several processes that srun started."""
    return "SLURM_STEP_ID" in os.environ and env_number("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS") > 1


def to_start(trainer: Mapping[str, Any]) -> int:
    """How many processes a run needs on this machine that nobody has started; 0 = none, this process is the run, or one of its ranks.

    Args:
        trainer: settings by name.

    Raises:
        UsageError: there are too many, the processes of other machines would be missing, or the strategy would copy this process.
    """
    strategy, nodes = str(trainer.get("strategy")), trainer.get("num_nodes", 1)
    if any(word in strategy for word in COPYING):
        raise UsageError(
            f"trainer.strategy={strategy!r}: must be one that starts new processes: auto, ddp, fsdp"
        )
    if is_srun_task() or "LOCAL_RANK" in os.environ:
        return 0
    if nodes != 1:
        raise UsageError(
            f"trainer.num_nodes={nodes!r}: must be 1; the processes of several nodes are started by srun or torchrun"
        )
    count = local_count(trainer)
    if count > HIGHEST_COUNT:
        raise UsageError(
            f"trainer.devices={trainer.get('devices')!r}: must be up to {HIGHEST_COUNT} processes on a machine"
        )
    return count if count > 1 else 0


def local_count(trainer: Mapping[str, Any]) -> int:
    """Processes that `trainer.devices` asks for on this machine; 1 for a value that Lightning will refuse."""
    devices = trainer.get("devices", 1)
    if isinstance(devices, Sequence) and not isinstance(devices, str):
        return len(devices)
    if isinstance(devices, int) and not isinstance(devices, bool) and devices >= 0:
        return devices
    from lightning.pytorch import Trainer

    with contextlib.suppress(Exception):  # the run itself shows what Lightning says
        asked = {key: trainer.get(key, "auto") for key in ("accelerator", "devices")}
        return int(
            Trainer(
                **asked, logger=False, enable_checkpointing=False, enable_model_summary=False
            ).num_devices
        )
    return 1


def broadcast_value(value: str) -> str:
    """A text that is the same in all processes of torchrun, also of those that it starts again: the first one's first value."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return value
    from torch.distributed import TCPStore

    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    if is_first():
        store.compare_set("qat", "", value)
    return store.get("qat").decode()


def connect(trainer: Trainer) -> None:
    """Connect the processes of a run before the first of them writes a file."""
    if trainer.world_size > 1:
        trainer.strategy.setup_environment()


def become_torchrun(count: int, command: Sequence[str]) -> NoReturn:
    """Replace this process by torchrun with `count` processes of a command (script, arguments) on this machine; none outlives it."""
    os.environ[LAUNCHER] = str(os.getpid())
    # As many threads as there are cores, in each process, would slow all of them down.
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // count, 1)))
    options = ["--standalone", f"--nproc-per-node={count}", f"--shutdown-timeout={SAVE_S}"]
    options.append("--signals-to-handle=SIGTERM,SIGINT,SIGUSR1,SIGUSR2")
    sys.stdout.flush()
    os.execv(
        sys.executable,
        [sys.executable, str(Path(__file__).with_name("torchrun.py")), *options, *command],
    )


def job() -> str | None:
    """Number of the job that this process belongs to, None outside SLURM; `3_0` for one of an array."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def slurm_tasks_per_node() -> int:
    """What a config file calls `${slurm_tasks_per_node:}`: processes on each node, 1 outside SLURM."""
    return env_number("SLURM_NTASKS_PER_NODE")


def slurm_nodes() -> int:
    """What a config file calls `${slurm_nodes:}`: 1 outside SLURM."""
    return env_number("SLURM_STEP_NUM_NODES", "SLURM_NNODES")


def check_place(trainer: Mapping[str, Any]) -> None:
    """Compare the processes that SLURM has started with those that `trainer.*` asks for: they would wait for each other.

    Raises:
        UsageError: they differ.
    """
    if "SLURM_JOB_ID" not in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:
        return
    if not is_srun_task():
        tasks = env_number("SLURM_NTASKS")
        if (
            tasks > 1
            and "SLURM_STEP_ID" not in os.environ
            and os.environ.get("SLURM_JOB_NAME") not in OF_PERSONS
        ):
            ways = "start them with: srun python ..., or one alone with: srun --nodes=1 --ntasks=1 python ..."
            raise UsageError(
                f"SLURM has {tasks} tasks for this job, and this process is not one of them; {ways}"
            )
        return
    wanted = (
        ("devices", local_count(trainer), slurm_tasks_per_node()),
        ("num_nodes", trainer.get("num_nodes", 1), slurm_nodes()),
    )
    for name, requested, there in wanted:
        if requested != there:
            what = "nodes" if name == "num_nodes" else "tasks on each node"
            raise UsageError(
                f"trainer.{name}={trainer.get(name, 1)!r}: SLURM has {there} {what}; must be {there}, which trainer=slurm sets"
            )
    if slurm_nodes() == 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")  # a name of the node may not resolve


def environments() -> list[Any]:
    """What gives Lightning the place of this process: left to itself it takes any process of a job for one that srun has started."""
    from lightning.pytorch.plugins.environments import LightningEnvironment, SLURMEnvironment

    if is_srun_task():
        return [SLURMEnvironment(auto_requeue=False)]
    return (
        [LightningEnvironment()]
        if "SLURM_JOB_ID" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ
        else []
    )


def implied_resume(resume: Any, run_dir: Path, *, overwrite: bool) -> Any:
    """The setting `resume`; "auto" where it is False in a job that SLURM has started again, which goes on where it was."""
    restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
    owner = run_dir / OWNER
    if (
        restarts == "0"
        or resume is not False
        or (overwrite and not (owner.is_file() and owner.read_text().strip() == job()))
    ):
        return resume
    if is_first():
        log.info("job %s, restart %s: resume=auto", job(), restarts)
    return "auto"


def write_owner(run_dir: Path) -> None:
    """Note that the files in a directory are of this job from here on; what an `overwrite=true` has removed was not."""
    if "SLURM_JOB_ID" in os.environ:
        (run_dir / OWNER).write_text(f"{job()}\n")


def leave(stop: Preempted, run_dir: Path, resume_hint: str) -> int:
    """Log that a signal ended the run, and have SLURM start the job again if that is what the signal means.

    Args:
        stop: the signal, and where the run stands.
        run_dir: of the run.
        resume_hint: how a person goes on with it.

    Returns:
        The exit code, for where nobody ends this process.
    """
    code = 128 + stop.signal
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # which SLURM sends to a job that is requeued
    requeues = stop.wants_requeue and job() is not None
    if is_first():
        saved = f"{stop.saved.name} written" if stop.saved else "this run writes no last.ckpt"
        where = (
            "outside training" if stop.step is None else f"after training step {stop.step}: {saved}"
        )
        what = f"{'preempted' if stop.wants_requeue else 'stopped'} by {stop.name} {where}"
        log.warning("%s%s", what, f", requeueing job {job()}" if requeues else f"; {resume_hint}")
        failure = _requeue(run_dir) if requeues else None
        if failure is not None:
            log.error("job %s not requeued (%s); %s", job(), failure, resume_hint)
            return code
    if requeues:
        time.sleep(KILL_S)
    return code


def _requeue(run_dir: Path) -> str | None:
    """None, or why the job is not started again. It ends srun at once, which gets a moment to show what was logged."""
    stretches = env_number("SLURM_RESTART_COUNT", default=0) + 1
    if stretches >= FRUITLESS and not any(run_dir.rglob("*.ckpt")):
        return f"{stretches} stretches have saved nothing to go on from; its time limit is too short for what comes before"
    time.sleep(SAID_S)
    command = ["scontrol", "requeue", str(job())]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=REQUEUE_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return None if done.returncode == 0 else " ".join((done.stderr or done.stdout).split())
