"""Order and random draws seeded by numbers such as the epoch, and a loader that can resume."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Generator, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, DistributedSampler

from qat.errors import UsageError

# (epoch, index), or with repeats (epoch, index, copy).
ImageKey = tuple[int, ...]


class SeededSampler(DistributedSampler[ImageKey]):
    """Yields (epoch, index) for one process, or with repeats (epoch, index, copy).

    This class is a subclass of torch's distributed sampler only because Lightning, with the default
    `use_distributed_sampler=True`, would divide the images of other samplers among the processes
    again.

    Args:
        length: number of images.
        seed: seed of the order.
        shuffle: True = a new permutation in each epoch, cut to a multiple of the world size; False
            = the order of the data, not cut and not padded, so that no image is counted twice.
        rank: number of this process.
        world_size: number of processes.
        repeats: number of copies of an image. Copies are adjacent in the order of all processes, so
            that processes get different copies; the length of an epoch does not change. Only used
            if `shuffle` is true. Source: `RepeatAugSampler` of DeiT.

    Attributes:
        skip: number of images of this process to skip at the start of the next iteration, which
            resets the number to zero.
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
        self.length = length
        self.seed = seed
        self.shuffle = shuffle
        self.rank = rank
        self.world_size = world_size
        self.repeats = repeats
        self.epoch = 0
        self.skip = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; Lightning calls this method at the start of each epoch."""
        self.epoch = epoch

    def _own_keys(self) -> list[ImageKey]:
        """Keys of the images of this process."""
        if not self.shuffle:
            return [(self.epoch, index) for index in range(self.rank, self.length, self.world_size)]
        generator = torch.Generator().manual_seed(combine_seeds(self.seed, self.epoch))
        order = torch.randperm(self.length, generator=generator)
        cut_length = self.length - self.length % self.world_size
        positions = torch.arange(self.rank, cut_length, self.world_size)
        indices = order[positions // self.repeats].tolist()
        if self.repeats == 1:
            return [(self.epoch, index) for index in indices]
        copies = (positions % self.repeats).tolist()
        return [(self.epoch, index, copy) for index, copy in zip(indices, copies, strict=True)]

    def __iter__(self) -> Iterator[ImageKey]:
        skip = self.skip
        self.skip = 0
        return iter(self._own_keys()[skip:])

    def __len__(self) -> int:
        if self.shuffle:
            return self.length // self.world_size
        return len(range(self.rank, self.length, self.world_size))


class ResumableLoader(DataLoader):
    """Counts the batches that were used, so that a resumed run continues after them.

    Lightning stores `state_dict` in a checkpoint, and loads it into the loader of a resumed run. A
    loader without a state would begin the epoch again, and some images would be used twice, others
    never. `__iter__` is a generator, so its body runs only after Lightning has set the epoch.

    Args:
        args: arguments of `DataLoader`; a resumed run needs a `SeededSampler` to skip images.
        options: arguments of `DataLoader`, by name.
    """

    sampler: SeededSampler

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._num_used = 0  # used batches of this epoch
        self._num_to_skip = 0  # batches to skip at the start of the next iteration
        self._skip_epoch: int | None = None  # epoch in which to skip them; None = the next one

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # After a checkpoint from the end of an epoch, Lightning may begin the next epoch.
        if self._skip_epoch in {None, self._epoch}:
            self._num_used = self._num_to_skip
        else:
            self._num_used = 0
        self._num_to_skip = 0
        self.sampler.skip = self._num_used * (self.batch_size or 1)
        for batch in super().__iter__():
            self._num_used += 1
            yield batch

    @property
    def _global_batch_size(self) -> int:
        # Lightning's own sampler for `overfit_batches` has no world size.
        world_size = getattr(self.sampler, "world_size", 1)
        return (self.batch_size or 1) * world_size

    @property
    def _epoch(self) -> int | None:
        # Lightning's own sampler for `overfit_batches` has no epoch either.
        return getattr(self.sampler, "epoch", None)

    def state_dict(self) -> dict[str, Any]:
        """`epoch`, and `batches` used in it; `images` = `batches` times the global batch size."""
        num_images = self._num_used * self._global_batch_size
        return {"batches": self._num_used, "images": num_images, "epoch": self._epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Skip the batches of `state` in their epoch; Lightning has already counted them.

        Raises:
            UsageError: batches must be skipped, and `images` shows another global batch size.
        """
        self._num_to_skip = state["batches"]
        self._skip_epoch = state.get("epoch")
        images = state.get("images")
        if images is not None and images != self._num_to_skip * self._global_batch_size:
            raise UsageError(
                f"resume: data.batch_size={self.batch_size} "
                f"in {getattr(self.sampler, 'world_size', 1)} processes: "
                f"batch size x processes must stay {images // self._num_to_skip} "
                "until this epoch ends"
            )


def combine_seeds(*numbers: int) -> int:
    """Mix several numbers into one 63-bit seed; similar numbers result in unrelated seeds.

    Of at most four numbers, zeros at the end do not count: (1, 2) and (1, 2, 0) result in the same
    seed. Only the low 32 bits of a number count.
    """
    sequence = np.random.SeedSequence([number & 0xFFFFFFFF for number in numbers])
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


@contextlib.contextmanager
def isolated_rng(*numbers: int) -> Generator[None]:
    """Save the three global random generators that augmentations use; restore them after the block.

    Args:
        numbers: numbers with which the generators are seeded before the block; without numbers, the
            generators keep their states.
    """
    # `torch.manual_seed` would also queue a seed call, with a traceback, for every accelerator.
    generator = torch.default_generator
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    torch_state = generator.get_state()
    if numbers:
        seed_rng(*numbers)
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        generator.set_state(torch_state)


def seed_rng(*numbers: int) -> None:
    """Seed the three global random generators that augmentations use."""
    seed = combine_seeds(*numbers)
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)


def seed_step(*numbers: int) -> None:
    """Seed the generators of a training step (dropout, drop path), so that a resumed run is exact.

    `torch.manual_seed` is avoided, as it queues a seed call for every accelerator, which costs half
    a millisecond per step. Of all accelerators, only CUDA and MPS are seeded.
    """
    seed = combine_seeds(*numbers)
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available():
        torch.cuda.manual_seed(seed)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)
