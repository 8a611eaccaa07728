"""Data-parallel training as quantized nets want it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch.nn.parallel import DistributedDataParallel

from qat.lit.sharded import ShardedStrategy

SHARDED, SEARCHING = "fsdp", "ddp_find_unused_parameters_true"


def strategy_of(name: Any, processes: int) -> Any:
    """The strategy that a name stands for where there are so many processes; what has no meaning of its own here is Lightning's."""
    if processes == 1:
        return "auto" if name == SHARDED else name
    searching = partial(data_parallel, find_unused_parameters=True)
    ours: dict[Any, Callable[[], Strategy]] = {"auto": data_parallel, "ddp": data_parallel, SEARCHING: searching, SHARDED: ShardedStrategy}
    return ours[name]() if isinstance(name, str) and name in ours else name


def data_parallel(*, find_unused_parameters: bool = False) -> DDPStrategy:
    """Lightning's DDP for nets whose buffers are the same in all processes.

    Quantizers' buffers are, since they follow from the parameters; the statistics of batch norms are averaged where they are used
    (`QATModule`). DDP's own way would send all buffers before every forward pass, and would wait for ever in a validation in which one
    process has a batch more than another, as it has where no image is counted twice.

    Args:
        find_unused_parameters: for nets with parameters that a step does not use, as a head that the loss leaves out.
    """
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    # torch 2.14 has another name for it.
    sync_buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {sync_buffers: False, "gradient_as_bucket_view": True, "find_unused_parameters": find_unused_parameters}
    return DDPStrategy(**options)
