"""The processes of a run that has several: which they are, killing some of them, and whether the others go too."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

# Seconds within which all processes of a run have to be gone once one was killed.
LIMIT = 20.0


def family(pid: int) -> dict[int, str]:
    """Processes below one, with the number each has in the run, by process id."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    found, new = set(), {pid}
    while new:
        found |= new
        new = {child for child, parent in parents.items() if parent in new} - found
    return {child: _rank(child) for child in found - {pid}}


def _rank(pid: int) -> str:
    with contextlib.suppress(OSError):
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        return next((entry.partition(b"=")[2].decode() for entry in variables if entry.startswith(b"RANK=")), "")
    return ""


def strike(pid: int, who: str, seconds: float, run_dir: Path) -> dict[int, str]:
    """Kill some processes of a run, a while after it has saved twice; gives all that it had below it.

    Args:
        pid: of the command.
        who: `main`, or numbers of processes: `0`, `1`, `0+1`.
        seconds: behind the second save.
        run_dir: its directory.
    """
    before = _written(run_dir)
    while _written(run_dir) == before and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        time.sleep(0.02)
    time.sleep(seconds)
    below = family(pid)
    victims = [pid] if who == "main" else [child for child, rank in below.items() if rank in who.split("+")]
    for victim in victims:
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
    return below


def _written(run_dir: Path) -> int:
    path = run_dir / "checkpoints" / "last.prev.ckpt"
    return path.stat().st_mtime_ns if path.exists() else 0


def seconds_to_go(pids: list[int]) -> float:
    """Seconds until the last of some processes is gone.

    Raises:
        SystemExit: one is there after `LIMIT`.
    """
    began = time.monotonic()
    while left := [pid for pid in pids if _lives(pid)]:
        if time.monotonic() - began > LIMIT:
            raise SystemExit(f"processes {left} live on")
        time.sleep(0.05)
    return time.monotonic() - began


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
