"""Order and randomness as functions of (seed, epoch, index); a loader that can begin in the middle of an epoch."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Generator, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, DistributedSampler

from qat.errors import UsageError

# (epoch, index), with repeats (epoch, index, copy).
Key = tuple[int, ...]


class SeededSampler(DistributedSampler[Key]):
    """Yields (epoch, index) for one process; with repeats (epoch, index, copy).

    Torch's by its class alone: Lightning would share out the images of any other once more among the processes.

    Args:
        length: number of images.
        seed: of the order.
        shuffle: a new permutation each epoch, cut to a multiple of the world size; else the order of the data, uncut, so that no
            image is counted twice.
        rank: this process.
        world_size: number of processes.
        repeats: copies of an image, which stand next to each other in the order of all processes, so that they go to different ones
            where there are several; the length stays. Source: `RepeatAugSampler` of DeiT. Only where it shuffles.

    Attributes:
        skip: images of this process that the next iteration leaves out at its start; zero again afterwards.
    """

    def __init__(
        self,
        length: int,
        *,
        seed: int,
        shuffle: bool,
        rank: int = 0,
        world_size: int = 1,
        repeats: int = 1,
    ) -> None:
        self.length, self.seed, self.shuffle, self.repeats = length, seed, shuffle, repeats
        self.rank, self.world_size = rank, world_size
        self.epoch = 0
        self.skip = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning at the start of an epoch."""
        self.epoch = epoch

    def _mine(self) -> list[Key]:
        if not self.shuffle:
            return [(self.epoch, index) for index in range(self.rank, self.length, self.world_size)]
        order = torch.randperm(
            self.length, generator=torch.Generator().manual_seed(mix(self.seed, self.epoch))
        )
        places = torch.arange(
            self.rank, self.length - self.length % self.world_size, self.world_size
        )
        keys = zip(
            order[places // self.repeats].tolist(), (places % self.repeats).tolist(), strict=True
        )
        return [(self.epoch, index, copy)[: 2 if self.repeats == 1 else 3] for index, copy in keys]

    def __iter__(self) -> Iterator[Key]:
        skip, self.skip = self.skip, 0
        return iter(self._mine()[skip:])

    def __len__(self) -> int:
        if self.shuffle:
            return self.length // self.world_size
        return len(range(self.rank, self.length, self.world_size))


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
        self._handed_out = self._skip = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self._handed_out, self._skip = self._skip, 0
        self.sampler.skip = self._handed_out * (self.batch_size or 1)
        for batch in super().__iter__():
            self._handed_out += 1
            yield batch

    @property
    def _global_batch(self) -> int:
        return (self.batch_size or 1) * getattr(
            self.sampler, "world_size", 1
        )  # Lightning's own sampler, to overfit, has none

    def state_dict(self) -> dict[str, int]:
        """Number of batches handed out in this epoch, and of images, those of all processes together."""
        return {"batches": self._handed_out, "images": self._handed_out * self._global_batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """The next epoch begins after the batches of `state`, of as many images; Lightning counts on from their number.

        Raises:
            UsageError: batches of all processes have another size now.
        """
        self._skip, images = state["batches"], state.get("images")
        if images not in {None, self._skip * self._global_batch}:
            now = f"data.batch_size={self.batch_size} in {self.sampler.world_size} processes"
            raise UsageError(
                f"resume: {now}: must be {images // self._skip} images a step, as before, to end this epoch"
            )


def mix(*numbers: int) -> int:
    """One 63-bit seed from several numbers; near inputs give far seeds."""
    return int(
        np.random.SeedSequence([n & 0xFFFFFFFF for n in numbers]).generate_state(1, np.uint64)[0]
        >> np.uint64(1)
    )


@contextlib.contextmanager
def isolated_rng(*numbers: int) -> Generator[None]:
    """Give the three global generators that augmentations draw from back as they were; with numbers, seed them first."""
    # The CPU generator itself: torch.manual_seed would also queue a seeding of every accelerator, with a traceback each.
    generator = torch.default_generator
    states = random.getstate(), np.random.get_state(), generator.get_state()
    if numbers:
        seed_rng(*numbers)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        generator.set_state(states[2])


def seed_rng(*numbers: int) -> None:
    """Seed the three global generators that augmentations draw from."""
    seed = mix(*numbers)
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)


def seed_step(*numbers: int) -> None:
    """Seed what a training step draws from (dropout, drop path), so that a resumed run draws the same.

    Accelerators are seeded only where one is in use: `torch.manual_seed` would queue it for each of them, at half a millisecond a step.
    """
    seed = mix(*numbers)
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available():
        torch.cuda.manual_seed(seed)
