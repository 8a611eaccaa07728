"""The processes of a run are connected before the first of them writes a file, and compare what they are about to do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Trainer

from qat.errors import UsageError
from qat.utils.text import leaves

# Each process of a launcher that reads the command line itself may have its own directory in a sweep.
_MISSING = "nothing"


def connect(trainer: Trainer, settings: Mapping[str, Any]) -> None:
    """Connect the processes of a run and compare their settings; nothing in a run of one process.

    Args:
        trainer: knows how many processes there are, and where.
        settings: the job's config as plain dicts.

    Raises:
        UsageError: they differ; names the first setting that does.
    """
    if trainer.world_size == 1:
        return
    trainer.strategy.setup_environment()
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, {".".join(path): value for path, value in leaves(settings)})
    message = difference(found)
    if message is not None:
        raise UsageError(message)


def difference(configs: list[dict[str, Any]]) -> str | None:
    """What to say of configs, flat and in the order of the processes; None if they are all the same."""
    for name in sorted(set().union(*configs)):
        values = [config.get(name, _MISSING) for config in configs]
        for number, value in enumerate(values):
            if repr(value) != repr(values[0]):  # a NaN is another than itself
                return (
                    f"{name}: process {number} of {len(configs)} has {value!r}, process 0 has {values[0]!r}; "
                    "all processes of a run need one config (a sampler of a sweep needs a seed)"
                )
    return None
