"""Processes of a run: which one this is, and how a command starts those that nobody started for it. Imports nothing heavy.

Lightning's own launcher runs the command line again for each process. In a sweep every process would then replay the whole sweep, and with
a sampler that has no seed train another net than its neighbours. Here the config of a job goes to the processes of that job; the one that
read the command line watches over them and trains nothing. Under srun and torchrun the processes are there already.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qat.errors import UsageError
from qat.launch import signals
from qat.launch.watch import Watch

# In the environment of a process that this module started: a folder with the job's text, in which the first process leaves its outcome.
EXCHANGE, JOB, OUTCOME = "QAT_RANK_EXCHANGE", "job.yaml", "outcome.json"
# Strategies of Lightning that copy the running process.
COPYING = ("spawn", "fork", "notebook")
HIGHEST_COUNT = 1024  # more is a typing mistake that no machine survives
MEETING = {"MASTER_ADDR", "MASTER_PORT", "NODE_RANK"}


def rank() -> int:
    """Number of this process in the run; 0 in a run of one process."""
    return env_number("RANK", *(["SLURM_PROCID"] if "SLURM_STEP_ID" in os.environ else []), default=0)


def env_number(*names: str, default: int = 1) -> int:
    """The first of some environment variables that holds a whole number."""
    return next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdigit()), default)


def is_first() -> bool:
    """True for the one process of a run that writes files and talks."""
    return rank() == 0


def is_on_first_node() -> bool:
    """False on the further machines of a run; what starts their processes has no rank of its own."""
    return all(os.environ.get(name, "0") in {"", "0"} for name in ("NODE_RANK", "OMPI_COMM_WORLD_RANK"))


def is_started_here() -> bool:
    """True for a process that `supervise` started."""
    return EXCHANGE in os.environ


def is_srun_task() -> bool:
    """True for one of several processes that srun started."""
    return not is_started_here() and "SLURM_STEP_ID" in os.environ and env_number("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS") > 1


def is_started_elsewhere() -> bool:
    """True where srun with several tasks, torchrun or a like program starts the processes."""
    return is_srun_task() or (not is_started_here() and bool(os.environ.keys() & {"LOCAL_RANK", "OMPI_COMM_WORLD_SIZE"}))


def to_start(trainer: Any) -> int:
    """How many processes this command has to start for a job on this machine; 0 = none, it is the process.

    Args:
        trainer: settings by name; nothing is started for anything else, which the job itself refuses.

    Raises:
        UsageError: the processes of other machines would be missing, or the strategy would copy this process.
    """
    if not isinstance(trainer, Mapping):
        return 0
    strategy = trainer.get("strategy")
    if isinstance(strategy, str) and any(word in strategy for word in COPYING):
        raise UsageError(f"trainer.strategy={strategy!r}: must be one whose processes are started anew: auto, ddp, fsdp ...")
    if is_started_here() or is_started_elsewhere():
        return 0
    count, nodes = local_count(trainer), trainer.get("num_nodes", 1)
    if count > HIGHEST_COUNT:
        raise UsageError(f"trainer.devices={trainer.get('devices')!r}: must be up to {HIGHEST_COUNT} processes on a machine")
    if nodes == 1:
        return count if count > 1 else 0
    if not os.environ.keys() >= MEETING:
        how = f"srun or torchrun, or by hand with {', '.join(sorted(MEETING))} in the environment of each"
        raise UsageError(f"trainer.num_nodes={nodes!r}: the processes of several nodes are started by {how}")
    return count


def local_count(trainer: Mapping[str, Any]) -> int:
    """Processes that `trainer.devices` asks for on this machine; 1 for a value that Lightning will refuse."""
    devices = trainer.get("devices", 1)
    if isinstance(devices, Sequence) and not isinstance(devices, str):
        return len(devices)
    if isinstance(devices, int) and not isinstance(devices, bool) and devices >= 0:
        return devices
    from lightning.pytorch import Trainer

    with contextlib.suppress(Exception):  # the job itself says what is wrong, in its own words
        asked = {key: trainer.get(key, "auto") for key in ("accelerator", "devices")}
        return int(Trainer(**asked, logger=False, enable_checkpointing=False, enable_model_summary=False).num_devices)
    return 1


def agreed(name: str, value: str) -> str:
    """A text that is the same in all processes of torchrun, also of those that it starts again: the first one's first value."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return value
    from torch.distributed import TCPStore

    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    if is_first():
        store.compare_set(f"qat/{name}", "", value)
    return store.get(f"qat/{name}").decode()


class RankError(Exception):
    """The processes of a job ended with an error.

    Args:
        code: exit code of the one that failed first, as a shell has it.
        message: what is to be said; None = the first process has said it.
        said: error of the first process; None where it had none, or could not hand it back.
    """

    def __init__(self, code: int, message: str | None, said: str | None = None) -> None:
        super().__init__(message or said or f"it ended with exit code {code}")
        self.code, self.message = code, message


def supervise(function: str, job: str, run_dir: Path, count: int, nodes: int = 1) -> Any:
    """Run a job in `count` processes of this machine, and wait for them.

    What the first prints is seen; the others write to `rank-1.log` ... in the run directory, by their number in the whole run, and what is
    empty at the end goes.

    Args:
        function: `module:name` of what each process calls with the job's text.
        job: the text.
        run_dir: of the job.
        count: of processes.
        nodes: machines that the job has; those of several meet where the environment says.

    Returns:
        The value that the first process handed back.

    Raises:
        RankError: one of them failed.
    """
    first = env_number("NODE_RANK", default=0) * count
    watch = Watch([run_dir / f"rank-{first + number}.log" for number in range(1, count)])
    with tempfile.TemporaryDirectory(prefix="qat-") as folder, signals.handling(watch.hand_on):
        Path(folder, JOB).write_text(job, encoding="utf-8")
        environment = os.environ | _shared_environment(count, nodes) | {EXCHANGE: folder}
        try:
            for number in range(count):
                watch.processes.append(_start(function, environment, number, [None, *watch.logs][number]))
            watch.wait()
        except BaseException:  # Ctrl-C too
            watch.end(signal.SIGINT, signal.SIGKILL)
            raise
        found: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):  # the first process was killed
            found = json.loads(Path(folder, OUTCOME).read_text(encoding="utf-8"))
    if watch.failed is not None:
        code = watch.failed[1]
        raise RankError(code if code >= 0 else 128 - code, watch.complaint(), found.get("error"))
    for path in watch.logs:
        if path.stat().st_size == 0:
            path.unlink()
    return found.get("value")


def hand_back(value: Any, error: str | None) -> None:
    """Give what a job returned, and its error if it had one, to the process that started this one; the first on a machine does so."""
    if os.environ["LOCAL_RANK"] == "0":
        Path(os.environ[EXCHANGE], OUTCOME).write_text(json.dumps({"value": value, "error": error}), encoding="utf-8")


def _shared_environment(count: int, nodes: int) -> dict[str, str]:
    """Where the processes of this machine stand, under the names that torchrun uses and Lightning and torch read."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    place = {"LOCAL_WORLD_SIZE": str(count), "WORLD_SIZE": str(nodes * count), "NODE_RANK": os.environ.get("NODE_RANK", "0")}
    return {
        # As many threads as there are cores, in each process, would slow all of them down.
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // count, 1))),
        # Modules that lie beside the script are found there too.
        "PYTHONPATH": os.pathsep.join(path for path in (sys.path[0], os.environ.get("PYTHONPATH")) if path),
        **place,
        **({} if nodes > 1 else {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}),
    }


def _start(function: str, environment: dict[str, str], number: int, log_file: Path | None) -> subprocess.Popen:
    first = int(environment["NODE_RANK"]) * int(environment["LOCAL_WORLD_SIZE"])
    with contextlib.nullcontext() if log_file is None else log_file.open("wb") as said:
        return subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.rank", function],
            env=environment | {"LOCAL_RANK": str(number), "RANK": str(first + number)},
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
        )
