"""`conf/` for Hydra: where it is, the schemas of its roots, and the functions that its files call as `${name:arguments}`.

Imports nothing heavy, so that `--help` answers at once.
"""

from __future__ import annotations

import datetime
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from qat.launch import ranks
from qat.tasks.settings import COMMANDS

# In a clone a link to the folder at the top.
CONF = (Path(__file__).parents[1] / "conf").resolve()
SWIN_STAGES = 4


def typed(name: str) -> str:
    """A command as it is typed here: `qat train`, or `python train.py`."""
    return f"qat {name}" if Path(sys.argv[0]).name == "qat" else f"python {name}.py"


def recorded(cfg: DictConfig) -> str:
    """The text of `config.yaml`: every value as it was, as a record."""
    values: Any = OmegaConf.to_container(cfg, resolve=True)
    return OmegaConf.to_yaml(OmegaConf.create({key: value for key, value in values.items() if key != "sweep_dir"}))


def options(group: str) -> list[str]:
    """The choices of a group; files whose names begin with an underscore are parts of others."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml") if not path.stem.startswith("_"))


def config_groups() -> str:
    """A line for each group and its choices, for `--help`."""
    folders = sorted(path.name for path in CONF.iterdir() if path.is_dir() and path.name != "hydra")
    return "\n".join(f"{name}: {', '.join(options(name))}" for name in folders)


def run_name() -> str:
    """The job of SLURM, else date and time, the same in all processes of a run."""
    job = os.environ.get("SLURM_JOB_ID")
    return f"slurm-{job}" if job else ranks.broadcast_value("run_name", f"{datetime.datetime.now():%Y-%m-%d_%H-%M-%S}")


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


def _register() -> None:
    functions: tuple[Callable[..., Any], ...] = (typed, config_groups, swin_patch, swin_window, none_of, pick)
    for function in functions:
        OmegaConf.register_new_resolver(function.__name__, function, replace=True)
    OmegaConf.register_new_resolver("run_name", run_name, use_cache=True, replace=True)
    OmegaConf.register_new_resolver("slurm_tasks_per_node", ranks.tasks_per_node, replace=True)
    OmegaConf.register_new_resolver("slurm_nodes", ranks.nodes, replace=True)
    store = ConfigStore.instance()
    for name, schema in COMMANDS.items():
        store.store(name=f"_{name}", node=schema, provider="qat")
    # Any argument of Lightning's trainer goes without a plus.
    store.store(group="trainer", name="_lightning", node=DictConfig({}, flags={"struct": False}), provider="qat")


_register()
