"""What a run records of itself: `config.yaml`, the command line, and `results.json` with the same keys from every command."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

import qat
from qat.launch.ranks import is_first
from qat.launch.run_dir import WRITTEN
from qat.model.cost import Cost
from qat.model.pretrained import LIBRARY
from qat.spec import QuantRecipe
from qat.tasks.conf import recorded, typed
from qat.utils.files import csv_lines, csv_text, json_text, remove_unfinished, write_text
from qat.utils.text import count

CLASSES, CONFUSION = "classes.csv", "confusion.csv"
MOST_PAIRS = 10
KEYS = (
    "command",
    "model",
    "quant",
    "data",
    "seed",
    "split",
    "weights",
    "top1",
    "top5",
    "loss",
    "images",
    "majority_share",
    "val_top1",
    "top1_fp",
    "n_params",
    "size_bytes",
    "bitops",
    "wall_seconds",
    "git_commit",
    "versions",
)


def record_run(cfg: DictConfig) -> None:
    """Write `config.yaml` of a run, and its command line beside it; of a call from Python there is none.

    Delete what killed writes have left there: the directory is this run's by now.
    """
    remove_unfinished(Path(cfg.run_dir), WRITTEN)
    write_text(Path(cfg.run_dir) / "config.yaml", recorded(cfg))
    if HydraConfig.initialized():
        found = HydraConfig.get()
        known = {
            "command": f"{found.job.name}.py",
            "program": typed(found.job.name),
            "overrides": list(found.overrides.task),
        }
        write_text(Path(cfg.run_dir) / "command.json", json_text(known))


def write_results(cfg: DictConfig, **values: Any) -> dict[str, Any]:
    """Write `results.json` into the run directory, atomically; the first process of a run does.

    Args:
        cfg: the job's config; gives command, model, quant, data and seed unless `values` do.
        values: keys of `KEYS`, `error`, and what one command alone has to say.

    Returns:
        What was written; accuracies are in percent, sizes in bytes, times in seconds.
    """
    known: dict[str, Any] = {
        "command": cfg.get("command"),
        "command_line": _command_line(),
        "model": _selected(cfg, "model.name"),
        "quant": _selected(cfg, "quant.name"),
        "data": str(_selected(cfg, "data._target_") or "").rpartition(".")[2].lower() or None,
        "seed": cfg.get("seed"),
        "device": _device(cfg),
        "finished": f"{datetime.datetime.now().astimezone():%Y-%m-%d %H:%M:%S %z}",
        "git_commit": _git_commit(),
        "versions": library_versions(),
    }
    results = dict.fromkeys(KEYS) | known | values
    if is_first():
        write_text(Path(cfg.run_dir) / "results.json", json_text(results))
    return results


def _command_line() -> str | None:
    """As it was typed: with another `run_dir` it repeats the run. None for a call from Python."""
    if not HydraConfig.initialized():
        return None
    job = HydraConfig.get()
    return f"{typed(job.job.name)} {shlex.join(job.overrides.task)}"


def _selected(cfg: DictConfig, name: str) -> Any:
    """A setting, None where it is missing: a run that is refused has results too."""
    return OmegaConf.select(cfg, name, throw_on_resolution_failure=False)


def recipe_fields(recipe: QuantRecipe) -> dict[str, Any]:
    """`quant`, the name a config of this recipe has (`ofq_2bit`, `deploy_w8a8`), and `recipe`, all its knobs."""
    alike = recipe.GROUP == "quant" and recipe.bits == recipe.act_bits and recipe.name != "deploy"
    width = f"{recipe.bits}bit" if alike else f"w{recipe.bits}a{recipe.act_bits}"
    return {
        "quant": "fp" if recipe.name == "fp" else f"{recipe.name}_{width}",
        "recipe": recipe.to_dict(),
    }


def measured(metrics: Mapping[str, float], costs: Cost, classes: int) -> dict[str, Any]:
    """The keys that a test loop and `qat.model.cost` fill; no `top5` of five classes or fewer, which are all among the five likeliest."""
    return {
        key: metrics[f"test/{key}"]
        for key in ("top1", "top5", "loss")
        if classes > 5 or key != "top5"
    } | sizes(costs)


def sizes(costs: Cost) -> dict[str, Any]:
    """The keys that `qat.model.cost` fills."""
    return {"n_params": costs.n_params, "size_bytes": costs.size_bytes, "bitops": costs.bitops}


def _device(cfg: DictConfig) -> str:
    """What computes, by its name."""
    if _selected(cfg, "trainer.accelerator") not in {"cpu", None} and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {count(torch.get_num_threads(), 'thread')}"


def library_versions(*more: str) -> dict[str, str]:
    """Versions of Python, qat and the libraries that it stands on, and of packages that are named."""
    found = {
        name: importlib.metadata.version(name) for name in ("torch", "timm", "lightning", *more)
    }
    return {"python": platform.python_version(), "qat": qat.__version__, **found}


def _git_commit(clone: Path = Path(qat.__file__).parents[1]) -> str | None:
    """The commit of a clone of qat; None where qat is installed, also inside of another repository."""
    command = ["git", "-C", str(clone), "rev-parse", "--show-toplevel", "HEAD"]
    # Git's own variables, as in a hook, name another repository.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    try:
        project = (clone / "pyproject.toml").read_text(encoding="utf-8")
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=5, env=environment
        )
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    top, _, commit = done.stdout.strip().rpartition("\n")
    is_own = f'name = "{LIBRARY}"' in project and Path(top).resolve() == clone.resolve()
    return commit if is_own else None


def class_results(confusion: Tensor, names: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """The keys of `results.json` about classes.

    Args:
        confusion: (K, K), whole numbers: images of the class of the row that are taken for the class of the column.
        names: K of them.

    Returns:
        `classes`: of each its name, images, and top-1 in percent of them (None of a class without images); `confused`: the pairs that are
        confused most often, with the images and their share in percent of the true class.
    """
    images, right = confusion.sum(1).tolist(), confusion.diagonal().tolist()
    classes = [
        {"class": name, "images": n, "top1": round(100 * hits / n, 4) if n else None}
        for name, n, hits in zip(names, images, right, strict=True)
    ]
    wrong = confusion.clone().fill_diagonal_(0).flatten()
    counts, places = wrong.topk(min(MOST_PAIRS, len(wrong)))
    confused = [
        {
            "true": names[place // len(names)],
            "predicted": names[place % len(names)],
            "images": n,
            "share": round(100 * n / images[place // len(names)], 4),
        }
        for n, place in zip(counts.tolist(), places.tolist(), strict=True)
        if n
    ]
    return {"classes": classes, "confused": confused}


def write_class_tables(folder: Path, confusion: Tensor, names: Sequence[str]) -> None:
    """Write `classes.csv`, and `confusion.csv` with a row for each true and a column for each predicted class."""
    classes = class_results(confusion, names)["classes"]
    write_text(folder / CLASSES, csv_text(classes))
    rows = [[name, *counts] for name, counts in zip(names, confusion.tolist(), strict=True)]
    write_text(folder / CONFUSION, csv_lines([["true \\ predicted", *names], *rows]))
