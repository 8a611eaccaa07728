"""Functions that config files call as `${name:arguments}`. Imports nothing heavy, so that `--help` answers at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from omegaconf import OmegaConf

from qat.cli.arguments import groups
from qat.cli.repeat import typed
from qat.launch import slurm

SWIN_STAGES = 4


def swin_patch(image_size: int, wanted: int | None) -> int:
    """Patch of a Swin, in pixels: the one wanted (4 if that is None), halved until its four stages have something to merge."""
    patch = wanted or 4
    while patch > 1 and image_size // patch < 2 ** (SWIN_STAGES - 1):
        patch //= 2
    return patch


def swin_window(image_size: int, patch: int, own: int) -> int:
    """Window of a Swin, in patches: its own, or the largest below it that divides the side of the map; shifting needs two windows."""
    side = image_size // patch
    return next((window for window in (own, *range(own - 1, 1, -1)) if side % window == 0 and window < side), own)


def none_of(*values: object) -> bool:
    """True if no value is set: a recipe's own start gives way to another one, and to a dry run that downloads nothing."""
    return not any(values)


def pick(net: str | None, bits: int, table: Mapping[str, Any]) -> Any:
    """What a published recipe has for a net and a width: `{deit_t:140,deit_s:{2:140,3:100}}`.

    Raises:
        ValueError: there is no such row; OmegaConf's error names the setting.
    """
    rows = table.get(net) if net is not None else None
    found = rows.get(bits) if isinstance(rows, Mapping) else rows
    if found is None:
        raise ValueError(f"no published row of this model at {bits} bits; model must be one of {', '.join(table)}")
    return found


def register() -> None:
    """Make them known to OmegaConf."""
    functions: dict[str, Callable[..., Any]] = {function.__name__: function for function in (swin_patch, swin_window, none_of, pick, typed)}
    functions |= {"slurm_tasks_per_node": slurm.tasks_per_node, "slurm_nodes": slurm.nodes}
    functions["config_groups"] = groups
    for name, function in functions.items():
        OmegaConf.register_new_resolver(name, function, replace=True)
