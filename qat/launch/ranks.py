"""Processes of a run: which one this is, and how a command starts those that nobody started for it.

Lightning's own launcher runs the command line again for each process. In a sweep every process would then replay the whole sweep, and with
a sampler that has no seed train another net than its neighbours. Here the config of a job goes to the processes of that job; the one that
read the command line watches over them and trains nothing. Under srun and torchrun the processes are there already. Imports nothing heavy.
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
from collections.abc import Generator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, SCMode

from qat.errors import UsageError
from qat.launch import signals
from qat.launch.watch import Watch

# In the environment of a process that this module started: the pipe for what the task returns, -1 in all but the first.
OUTCOME = "QAT_RANK_OUTCOME"
FORWARDED = signals.SIGNALS
# Strategies of Lightning that copy the running process.
COPYING = ("spawn", "fork", "notebook")
HIGHEST_COUNT = 1024  # more is a typing mistake that no machine survives
MEETING = {"MASTER_ADDR", "MASTER_PORT", "NODE_RANK"}


def rank() -> int:
    """Number of this process in the run; 0 in a run of one process."""
    names = ("RANK", "SLURM_PROCID") if "SLURM_STEP_ID" in os.environ else ("RANK",)
    return next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdigit()), 0)


def is_first() -> bool:
    """True for the one process of a run that writes files and talks."""
    return rank() == 0


def is_started_here() -> bool:
    """True for a process that `supervise` started."""
    return OUTCOME in os.environ


def is_started_elsewhere() -> bool:
    """True where srun with several tasks, torchrun or a like program starts the processes."""
    by_srun = "SLURM_STEP_ID" in os.environ and os.environ.get("SLURM_NTASKS", "1") != "1"
    return not is_started_here() and ("LOCAL_RANK" in os.environ or by_srun or "OMPI_COMM_WORLD_SIZE" in os.environ)


def to_start(cfg: DictConfig) -> int:
    """How many processes this command has to start for a job on this machine; 0 = none, it is the process.

    Raises:
        UsageError: the processes of other machines would be missing, or the strategy would copy this process.
    """
    settings = cfg.get("trainer")
    if not OmegaConf.is_dict(settings):  # the job itself refuses it
        return 0
    strategy = settings.get("strategy")
    if isinstance(strategy, str) and any(word in strategy for word in COPYING):
        raise UsageError(f"trainer.strategy={strategy!r}: must be one whose processes are started anew: auto, ddp, fsdp ...")
    if is_started_here() or is_started_elsewhere():
        return 0
    count, nodes = local_count(settings), settings.get("num_nodes", 1)
    if count > HIGHEST_COUNT:
        raise UsageError(f"trainer.devices={settings.get('devices')!r}: must be up to {HIGHEST_COUNT} processes on a machine")
    if nodes == 1:
        return count if count > 1 else 0
    if not os.environ.keys() >= MEETING:
        how = f"srun or torchrun, or by hand with {', '.join(sorted(MEETING))} in the environment of each"
        raise UsageError(f"trainer.num_nodes={nodes!r}: the processes of several nodes are started by {how}")
    return count


def local_count(settings: Mapping[str, Any]) -> int:
    """Processes that `trainer.devices` asks for on this machine; 1 for a value that Lightning will refuse."""
    devices = settings.get("devices", 1)
    if OmegaConf.is_list(devices):
        return len(devices)
    if isinstance(devices, int) and not isinstance(devices, bool) and devices >= 0:
        return devices
    from lightning.pytorch import Trainer

    with contextlib.suppress(Exception):  # the job itself says what is wrong, in its own words
        asked = {key: settings.get(key, "auto") for key in ("accelerator", "devices")}
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
        code: exit code of the one that failed first.
        message: what is to be said; None = the first process has said it.
    """

    def __init__(self, code: int, message: str | None) -> None:
        super().__init__(message)
        self.code, self.message = code, message


def supervise(task: str, cfg: DictConfig, count: int) -> float | None:
    """Run a task in `count` processes of this machine, each with the config of the job, and wait for them.

    What the first prints is seen; the others write to `rank-1.log` ... in the run directory, and what is empty at the end goes.

    Args:
        task: name of the module and of its function.
        cfg: the job's config, `cfg.run_dir` its directory.
        count: of processes.

    Returns:
        What the task returns in the first process.

    Raises:
        RankError: one of them failed.
    """
    watch = Watch([Path(cfg.run_dir) / f"rank-{number}.log" for number in range(1, count)])
    reading, writing = os.pipe()
    with os.fdopen(reading, encoding="utf-8") as outcome, _forwarding(watch):
        try:
            with os.fdopen(writing, "w"):  # closed here, so that reading ends where the first process does
                _start_all(watch, _order(task, cfg), cfg, writing)
            watch.wait()
        except BaseException:  # Ctrl-C too
            watch.end(signal.SIGINT, signal.SIGKILL)
            raise
        value = outcome.read()
    if watch.culprit is not None:
        raise RankError(watch.exit_code(), watch.complaint())
    for path in watch.logs:
        if path.stat().st_size == 0:
            path.unlink()
    return json.loads(value) if value else None


def _order(task: str, cfg: DictConfig) -> bytes:
    """What a process is told: the task, its config, and what Hydra knows of the job; references stay references."""
    hydra_cfg: Any = HydraConfig.instance().cfg
    if hydra_cfg is not None:
        hydra_cfg = OmegaConf.to_container(hydra_cfg, structured_config_mode=SCMode.DICT, enum_to_str=True)
        for part in ("launcher", "sweeper"):  # those of plugins are of types that only they know
            hydra_cfg["hydra"][part] = {"_target_": hydra_cfg["hydra"][part]["_target_"]}
    return OmegaConf.to_yaml(OmegaConf.create({"task": task, "cfg": OmegaConf.to_container(cfg), "hydra_cfg": hydra_cfg})).encode()


def told(order: str) -> tuple[str, DictConfig]:
    """The task and the config of an order; Hydra's config of the job is in force from here on."""
    read: Any = OmegaConf.to_container(OmegaConf.create(order))
    if read["hydra_cfg"] is not None:
        read["hydra_cfg"]["hydra"]["mode"] = RunMode[read["hydra_cfg"]["hydra"]["mode"] or "RUN"]
        HydraConfig.instance().cfg = OmegaConf.create(read["hydra_cfg"])
    cfg = OmegaConf.create(read["cfg"])
    OmegaConf.set_struct(cfg, value=True)
    return read["task"], cfg


def _start_all(watch: Watch, order: bytes, cfg: DictConfig, outcome: int) -> None:
    """Start a process for each log and the first; it alone has the pipe."""
    logs, port = [None, *watch.logs], _free_port()
    for number, log_file in enumerate(logs):
        place = _place(cfg, number, len(logs), port) | {OUTCOME: str(-1 if number else outcome)}
        watch.processes.append(_start(place, order, log_file))


@contextlib.contextmanager
def _forwarding(watch: Watch) -> Generator[None]:
    """Hand on the signals by which a cluster or a person ends or preempts a job; a second Ctrl-C ends it here."""

    def hand_on(number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and signals.is_impatient():
            raise KeyboardInterrupt
        watch.send(signal.Signals(number))

    try:
        before = {number: signal.signal(number, hand_on) for number in FORWARDED if signal.getsignal(number) != signal.SIG_IGN}
    except ValueError:  # not in the main thread, where no signal arrives
        before = {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _place(cfg: DictConfig, number: int, count: int, port: int) -> dict[str, str]:
    """Where a process stands, under the names that torchrun uses and Lightning and torch read."""
    nodes, node = int(cfg.trainer.get("num_nodes", 1)), int(os.environ.get("NODE_RANK", "0"))
    numbers = {"LOCAL_RANK": number, "LOCAL_WORLD_SIZE": count, "NODE_RANK": node}
    numbers |= {"RANK": node * count + number, "WORLD_SIZE": nodes * count}
    place = {name: str(value) for name, value in numbers.items()}
    # Processes of several nodes meet where the environment says.
    return place if nodes > 1 else place | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _start(place: dict[str, str], work: bytes, log_file: Path | None) -> subprocess.Popen:
    # As many threads as there are cores, in each process, would slow all of them down.
    threads = {"OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // int(place["LOCAL_WORLD_SIZE"]), 1))}
    # Modules that lie beside the script are found there too.
    paths = {"PYTHONPATH": os.pathsep.join(path for path in (sys.path[0], os.environ.get("PYTHONPATH")) if path)}
    outcome = int(place[OUTCOME])
    with contextlib.ExitStack() as stack:
        given = stack.enter_context(tempfile.TemporaryFile())
        given.write(work)
        given.seek(0)
        said = None if log_file is None else stack.enter_context(log_file.open("wb"))
        return subprocess.Popen(
            [sys.executable, "-m", "qat.launch.rank"],
            env=threads | os.environ | paths | place,
            stdin=given,
            stdout=said,
            stderr=said,
            pass_fds=() if outcome < 0 else (outcome,),
        )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
