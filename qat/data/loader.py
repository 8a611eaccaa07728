"""A loader that can begin in the middle of an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from qat.data.sampler import SeededSampler


class ResumableLoader(DataLoader):
    """Counts the batches it hands out, and goes on behind them.

    Lightning stores `state_dict` with a checkpoint and gives it back to the loader of a resumed run; a loader without it would
    begin the epoch again: images seen twice, others never. Iteration starts lazily: Lightning asks for an iterator before it tells
    the sampler which epoch it is.

    Args:
        args: of `DataLoader`; the sampler must be a `SeededSampler`.
        options: likewise.
    """

    sampler: SeededSampler

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._handed_out = 0
        self._skip = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self._handed_out, self._skip = self._skip, 0
        self.sampler.skip = self._handed_out * (self.batch_size or 1)
        for batch in super().__iter__():
            self._handed_out += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Number of batches handed out in this epoch."""
        return {"batches": self._handed_out}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """The next epoch begins behind the batches of `state`."""
        self._skip = state["batches"]
