"""Processes of a run: which one this is, how many are asked for, and torchrun where no launcher starts them. Imports nothing heavy."""

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

# Strategies of Lightning that copy the running process.
COPYING = ("spawn", "fork", "notebook")
# Seconds between a signal and the kill, of torchrun: a run saves after the step under way, or after the validation.
SAVE_S = 600


def rank() -> int:
    """Number of this process in the run; 0 in a run of one process."""
    return env_number("RANK", *(["SLURM_PROCID"] if "SLURM_STEP_ID" in os.environ else []), default=0)


def env_number(*names: str, default: int = 1) -> int:
    """The first of some environment variables that holds a whole number."""
    return next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdigit()), default)


def is_first() -> bool:
    """True for the one process of a run that writes files and logs."""
    return rank() == 0


def is_srun_task() -> bool:
    """True for one of several processes that srun started."""
    return "SLURM_STEP_ID" in os.environ and env_number("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS") > 1


def to_start(trainer: Mapping[str, Any]) -> int:
    """How many processes a run needs on this machine that nobody has started; 0 = none, this process is the run, or one of its ranks.

    Args:
        trainer: settings by name.

    Raises:
        UsageError: the processes of other machines would be missing, or the strategy would copy this process.
    """
    strategy, nodes = str(trainer.get("strategy")), trainer.get("num_nodes", 1)
    if any(word in strategy for word in COPYING):
        raise UsageError(f"trainer.strategy={strategy!r}: must be one whose processes are started anew: auto, ddp, fsdp")
    if is_srun_task() or "LOCAL_RANK" in os.environ:
        return 0
    if nodes != 1:
        raise UsageError(f"trainer.num_nodes={nodes!r}: must be 1; the processes of several nodes are started by srun or torchrun")
    count = local_count(trainer)
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
        return int(Trainer(**asked, logger=False, enable_checkpointing=False, enable_model_summary=False).num_devices)
    return 1


def broadcast_value(name: str, value: str) -> str:
    """A text that is the same in all processes of torchrun, also of those that it starts again: the first one's first value."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return value
    from torch.distributed import TCPStore

    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    if is_first():
        store.compare_set(f"qat/{name}", "", value)
    return store.get(f"qat/{name}").decode()


def connect(trainer: Trainer) -> None:
    """Connect the processes of a run before the first of them writes a file."""
    if trainer.world_size > 1:
        trainer.strategy.setup_environment()


def become_torchrun(count: int, command: Sequence[str]) -> NoReturn:
    """Replace this process by torchrun with `count` processes of a command (script, arguments) on this machine."""
    # As many threads as there are cores, in each process, would slow all of them down.
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // count, 1)))
    options = ["--standalone", f"--nproc-per-node={count}", f"--shutdown-timeout={SAVE_S}"]
    options.append("--signals-to-handle=SIGTERM,SIGINT,SIGUSR1,SIGUSR2")
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, str(Path(__file__).with_name("torchrun.py")), *options, *command])
