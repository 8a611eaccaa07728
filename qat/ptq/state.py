"""What a search leaves on the disk: every evaluation in `search.csv`, and after each visit all it needs to go on in `search.ckpt`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from qat.errors import UsageError
from qat.utils.files import appending, flush, read_torch, remove_unfinished, write_text, write_torch

STATE = "search.ckpt"
COLUMNS = ("pass", "block", "cycle", "fitness", "accepted", "seconds", "images")


@dataclass
class SearchState:
    """A search between two visits.

    Attributes:
        visits: how many are done.
        fitness: of the scales as they are.
        first: of the scales it began with.
        scales: of all blocks, by block.
        memory: what drivers remember, by block.
        best: scales kept for what they did on validation images, and their accuracy; only with `reference_selection`.
        lines: of `search.csv`, its header not counted.
        evaluations: candidates so far.
        accepted: candidates that became the incumbent.
        given_up: candidates that lost a race.
        images: forwarded for candidates, over all processes.
        seconds: taken so far.
    """

    visits: int
    fitness: float
    first: float
    scales: dict[str, Tensor]
    memory: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    best: dict[str, Any] | None = None
    lines: int = 0
    evaluations: int = 0
    accepted: int = 0
    given_up: int = 0
    images: int = 0
    seconds: float = 0.0


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """Digest of the values of some tensors."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class PlainSettings(Protocol):
    """What a search was asked to do."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""


class SearchFiles:
    """The two files of a search, or of a reconstruction, in its run directory.

    Args:
        folder: the run directory.
        settings: of the search.
        inputs: `fingerprint` of all it starts from.
        state: dataclass of what NAME.ckpt holds.
        columns: of NAME.csv.
        name: of the two files.
        setting: what its settings are called in messages.
    """

    def __init__(  # noqa: PLR0913  (what to write, and where)
        self,
        folder: Path,
        settings: PlainSettings,
        inputs: str,
        state: type = SearchState,
        columns: Sequence[str] = COLUMNS,
        *,
        name: str = "search",
        setting: str = "search",
    ) -> None:
        self.state_file, self.log_file, self.setting = folder / f"{name}.ckpt", folder / f"{name}.csv", setting
        remove_unfinished([folder])
        self.settings, self.inputs, self.state, self.columns = settings, inputs, state, columns

    def write(self, state: Any) -> None:
        """Replace the state; at every moment there is a complete one."""
        write_torch(self.state_file, {"settings": self.settings.to_dict(), "inputs": self.inputs, **asdict(state)})

    def read(self) -> Any:
        """The state to go on from, of the class given; None where there is none.

        Raises:
            UsageError: it is of another search, or cannot be read.
        """
        if not self.state_file.is_file():
            return None
        unreadable = f"resume: {self.state_file} cannot be read; delete it to start anew"
        try:
            content = read_torch(self.state_file)
            settings, inputs = content.pop("settings"), content.pop("inputs")
        except Exception as error:
            raise UsageError(unreadable) from error
        for name, value in self.settings.to_dict().items():
            if settings.get(name) != value:
                raise UsageError(f"{self.setting}.{name}={value!r}: the run to resume has {settings.get(name)!r} ({self.state_file})")
        if inputs != self.inputs:
            raise UsageError(f"resume: {self.state_file} is of a net, or of calibration images, with other values than these")
        try:
            return self.state(**content)
        except TypeError as error:
            raise UsageError(unreadable) from error

    def start_log(self, lines: int) -> None:
        """Cut the csv file to its header and `lines` more: those of a visit that was not finished are made again."""
        kept = self.log_file.read_text(encoding="utf-8").splitlines()[1 : lines + 1] if lines and self.log_file.is_file() else []
        write_text(self.log_file, "\n".join([",".join(self.columns), *kept]) + "\n")

    def log(self, lines: Sequence[Sequence[Any]]) -> None:
        """Append lines."""
        with appending(self.log_file) as file:
            file.writelines(",".join(str(value) for value in line) + "\n" for line in lines)
        flush(self.log_file)
