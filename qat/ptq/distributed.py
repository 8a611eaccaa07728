"""Several processes share the calibration batches; only scalars travel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """The processes of a group, or this one alone.

    Attributes:
        group: of `torch.distributed`, None = a single process.
    """

    group: dist.ProcessGroup | None = None

    @property
    def rank(self) -> int:
        """Own number in the group."""
        return 0 if self.group is None else dist.get_rank(self.group)

    @property
    def world(self) -> int:
        """Number of processes."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    @property
    def writes(self) -> bool:
        """True for the one process that writes files."""
        return self.rank == 0

    def own(self, n: int) -> range:
        """Which of `n` batches are this process's; a batch is never split: its images are each other's negatives."""
        return range(self.rank, n, self.world)

    def total(self, values: Tensor) -> Tensor:
        """Sum over the processes, elementwise, the same on all of them; float64 on the CPU, over gloo or nccl."""
        if self.group is None:
            return values
        on_gpu = dist.get_backend(self.group) == "nccl"
        summed = values.to(torch.device("cuda", torch.cuda.current_device())) if on_gpu else values
        dist.all_reduce(summed, group=self.group)
        return summed.cpu()
