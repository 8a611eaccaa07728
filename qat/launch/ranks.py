"""Processes of a run: the rank of this process, and torchrun if no launcher starts the processes.

This module imports nothing heavy.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from qat.errors import UsageError

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

MAX_RANKS = 1024  # per machine; a higher number is a typing mistake that would overload it
# Parts of the names of Lightning's strategies that copy the running process.
COPYING_STRATEGIES = ("spawn", "fork", "notebook")
# Seconds between a signal and the kill by torchrun, in which a run finishes its step or validation
# and saves.
SHUTDOWN_S = 600
# Environment variables that the launcher of the ranks sets: its process id (ranks end when the
# launcher ends), and the path of the lock file that it holds for the ranks.
LAUNCHER = "QAT_LAUNCHER"
LOCK_FILE = "QAT_LOCK"


def rank() -> int:
    """Number of this process in the run; 0 if the run has one process."""
    names = ["RANK"]
    if "SLURM_STEP_ID" in os.environ:
        names.append("SLURM_PROCID")
    return env_number(*names, default=0)


def env_number(*names: str, default: int = 1) -> int:
    """Value of the first of these environment variables that is an integer, or else `default`."""
    for name in names:
        text = os.environ.get(name, "")
        if text.isdigit():
            return int(text)
    return default


def is_first() -> bool:
    """True for the process of a run that writes files and logs."""
    return rank() == 0


def is_srun_task() -> bool:
    """True if srun started this process as one of several."""
    return "SLURM_STEP_ID" in os.environ and env_number("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS") > 1


def processes_to_start(trainer: Mapping[str, Any]) -> int:
    """Number of processes that this process has to start for a run on this machine.

    Args:
        trainer: settings of `trainer.*`.

    Returns:
        The number; 0 if this process is the whole run, or a rank of the run.

    Raises:
        UsageError: there are too many processes, processes of other machines would be missing, or
            the strategy would copy this process.
    """
    strategy = str(trainer.get("strategy"))
    nodes = trainer.get("num_nodes", 1)
    if any(word in strategy for word in COPYING_STRATEGIES):
        raise UsageError(
            f"trainer.strategy={strategy!r}: must be a strategy that starts new "
            "processes: auto, ddp, fsdp"
        )
    if is_srun_task() or "LOCAL_RANK" in os.environ:
        return 0
    if nodes != 1:
        raise UsageError(
            f"trainer.num_nodes={nodes!r}: must be 1; "
            "the processes of several nodes are started by srun or torchrun"
        )
    num_processes = local_processes(trainer)
    if num_processes > MAX_RANKS:
        raise UsageError(
            f"trainer.devices={trainer.get('devices')!r}: "
            f"must be at most {MAX_RANKS} processes per machine"
        )
    return num_processes if num_processes > 1 else 0


def local_processes(trainer: Mapping[str, Any]) -> int:
    """Number of processes that `trainer.devices` asks for on this machine.

    Lightning interprets settings such as `auto` or -1; if it refuses them, the number is 1.
    """
    devices = trainer.get("devices", 1)
    if isinstance(devices, Sequence) and not isinstance(devices, str):
        return len(devices)
    if isinstance(devices, int) and not isinstance(devices, bool) and devices >= 0:
        return devices
    from lightning.pytorch import Trainer

    with contextlib.suppress(Exception):  # the run itself raises Lightning's error
        probe = Trainer(
            accelerator=trainer.get("accelerator", "auto"),
            devices=devices,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
        )
        return int(probe.num_devices)
    return 1


def broadcast_value(value: str) -> str:
    """Return the first process's value in all ranks of torchrun, and `value` in other processes.

    After a restart of the ranks, the value from before the restart is returned.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return value
    from torch.distributed import TCPStore

    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    if is_first():
        store.compare_set("qat", "", value)
    return store.get("qat").decode()


def connect(trainer: Trainer) -> None:
    """Connect the processes of a run before the first process writes a file."""
    if trainer.world_size > 1:
        trainer.strategy.setup_environment()


def num_cores() -> int:
    """Number of cores that this process may use; srun may exclude cores of other tasks."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def become_torchrun(num_processes: int, command: Sequence[str]) -> NoReturn:
    """Replace this process by torchrun; no rank outlives torchrun on Linux.

    Args:
        num_processes: number of ranks, on this machine.
        command: script and arguments of each rank.
    """
    os.environ[LAUNCHER] = str(os.getpid())
    # If each process used one thread per core, all processes would be slow.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(num_cores() // num_processes, 1)))
    script = str(Path(__file__).with_name("torchrun.py"))
    options = [
        "--standalone",
        f"--nproc-per-node={num_processes}",
        f"--shutdown-timeout={SHUTDOWN_S}",
        "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1,SIGUSR2",
    ]
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, script, *options, *command])
