"""A loader that can begin in the middle of an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from qat.data.sampler import SeededSampler
from qat.errors import UsageError


class ResumableLoader(DataLoader):
    """Counts the batches it hands out, and continues after them.

    Lightning stores `state_dict` with a checkpoint and gives it back to the loader of a resumed run; a loader without it would
    begin the epoch again: images seen twice, others never. Iteration starts lazily: Lightning asks for an iterator before it sets
    the sampler's epoch.

    Args:
        args: of `DataLoader`; the sampler must be a `SeededSampler`.
        options: of `DataLoader`, by name.
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

    @property
    def _global_batch(self) -> int:
        return (self.batch_size or 1) * getattr(self.sampler, "world_size", 1)  # Lightning's own sampler, to overfit, has none

    def state_dict(self) -> dict[str, int]:
        """Number of batches handed out in this epoch, and of images, those of all processes together."""
        return {"batches": self._handed_out, "images": self._handed_out * self._global_batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """The next epoch begins after the images of `state`, which as many processes or as few may have seen.

        Raises:
            UsageError: that is in the middle of a batch of all processes.
        """
        images = state.get("images", state["batches"] * self._global_batch)
        if images % self._global_batch:
            now = f"data.batch_size={self.batch_size} in {self.sampler.world_size} processes"
            raise UsageError(f"resume: the run stopped after {images} images of an epoch, no whole number of batches of {now}")
        self._skip = images // self._global_batch
