"""The processes of a run meet before the first of them writes a file, and compare what they are about to do."""

from __future__ import annotations

import hashlib
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Trainer
from omegaconf import DictConfig, OmegaConf

from qat.errors import UsageError

# Each process of a launcher that reads the command line itself may have its own directory in a sweep.
_MISSING = "nothing"


def meet(cfg: DictConfig, trainer: Trainer) -> None:
    """Connect the processes of a run and compare their configs; nothing in a run of one process.

    Args:
        cfg: the job's config.
        trainer: knows how many processes there are, and where.

    Raises:
        UsageError: they differ; names the first setting that does.
    """
    if trainer.world_size == 1:
        return
    trainer.strategy.setup_environment()
    settings = flat(OmegaConf.to_container(cfg, resolve=True))
    digest = hashlib.sha256(repr(sorted(settings.items())).encode()).hexdigest()
    if len(set(_gathered(digest))) > 1:
        raise UsageError(difference(_gathered(settings)))


def difference(configs: list[dict[str, Any]]) -> str:
    """What to say of configs, flat and in the order of the processes, that are not all the same."""
    for name in sorted(set().union(*configs)):
        values = [config.get(name, _MISSING) for config in configs]
        for number, value in enumerate(values):
            if value != values[0]:
                return (
                    f"{name}: process {number} of {len(configs)} has {value!r}, process 0 has {values[0]!r}; "
                    "all processes of a run need one config (a sampler of a sweep needs a seed)"
                )
    return "the processes have different configs"


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves of nested dicts by their dotted names."""
    if not isinstance(node, dict):
        return {prefix: node}
    return {name: leaf for key, value in node.items() for name, leaf in flat(value, f"{prefix}.{key}" if prefix else str(key)).items()}


def _gathered(value: Any) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found
