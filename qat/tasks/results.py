"""Records of a run: `config.yaml`, the command line, and `results.json`.

`results.json` has at least `KEYS`, with None for values that were not measured.
"""

from __future__ import annotations

import base64
import datetime
import importlib.metadata
import os
import platform
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

import qat
from qat.launch.ranks import is_first
from qat.launch.run_dir import ALL_OUTPUTS
from qat.model.cost import Cost
from qat.model.pretrained import LIBRARY
from qat.spec import QuantRecipe
from qat.tasks.conf import command_words, config_text
from qat.utils.files import csv_lines, csv_text, json_text, remove_unfinished, write_text
from qat.utils.text import format_count

CLASSES = "classes.csv"
CONFUSION = "confusion.csv"
MAX_CONFUSED_PAIRS = 10
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
    """Write `config.yaml`, and `command.json` unless the run is a call from Python.

    Files that a killed process left unfinished are deleted, because the directory now belongs to
    this run.
    """
    run_dir = Path(cfg.run_dir)
    remove_unfinished(run_dir, ALL_OUTPUTS)
    write_text(run_dir / "config.yaml", config_text(cfg))
    if not HydraConfig.initialized():
        return
    hydra_config = HydraConfig.get()
    command = {
        "command": f"{hydra_config.job.name}.py",
        "program": command_words(hydra_config.job.name),
        "overrides": list(hydra_config.overrides.task),
    }
    write_text(run_dir / "command.json", json_text(command))


def write_results(cfg: DictConfig, **values: Any) -> dict[str, Any]:
    """Write `results.json` into the run directory, atomically, in the first process of a run.

    Args:
        cfg: the job's config, from which command, model, quant, data and seed are taken unless
            `values` contains them.
        values: values for `KEYS` and for further keys, such as `error`.

    Returns:
        All results: accuracies in percent, sizes in bytes, times in seconds except `latency_ms`.
    """
    data_class = str(_get_setting(cfg, "data._target_") or "").rpartition(".")[2]
    common: dict[str, Any] = {
        "command": cfg.get("command"),
        "command_line": _command_line(),
        "model": _get_setting(cfg, "model.name"),
        "quant": _get_setting(cfg, "quant.name"),
        "data": data_class.lower() or None,
        "seed": cfg.get("seed"),
        "device": _device(_get_setting(cfg, "trainer.accelerator")),
        "finished": f"{datetime.datetime.now().astimezone():%Y-%m-%d %H:%M:%S %z}",
        "git_commit": _git_commit(),
        "versions": library_versions(),
    }
    results = dict.fromkeys(KEYS) | common | values
    if is_first():
        write_text(Path(cfg.run_dir) / "results.json", json_text(results))
    return results


def _command_line() -> str | None:
    """Return the job's command line, quoted for a shell, or None for a call from Python."""
    if not HydraConfig.initialized():
        return None
    hydra_config = HydraConfig.get()
    return f"{command_words(hydra_config.job.name)} {shlex.join(hydra_config.overrides.task)}"


def _get_setting(cfg: DictConfig, name: str) -> Any:
    """Return a setting, or None if it is missing or cannot be resolved."""
    return OmegaConf.select(cfg, name, throw_on_resolution_failure=False)


def recipe_fields(recipe: QuantRecipe) -> dict[str, Any]:
    """Entries of `results.json` that describe a recipe.

    Returns:
        `quant`: name and bits of the recipe (`ofq_2bit`, `deploy_w8a8`), or `fp`; `recipe`: its
        settings.
    """
    name = recipe.name
    if name != "fp":
        has_equal_bits = recipe.bits == recipe.act_bits
        if recipe.GROUP == "quant" and has_equal_bits and name != "deploy":
            name += f"_{recipe.bits}bit"
        else:
            name += f"_w{recipe.bits}a{recipe.act_bits}"
    return {"quant": name, "recipe": recipe.to_dict()}


def score_fields(metrics: Mapping[str, float], costs: Cost, num_classes: int) -> dict[str, Any]:
    """Entries of `results.json` with the results of a test loop and of `qat.model.cost`.

    There is no `top5` for five classes or fewer, because it would always be 100 %.
    """
    keys = ["top1", "top5", "loss"] if num_classes > 5 else ["top1", "loss"]
    scores = {key: metrics[f"test/{key}"] for key in keys}
    return scores | size_fields(costs)


def correct_field(correct: Tensor | None) -> dict[str, str | None]:
    """Entry of `results.json` that records which test images are classified correctly.

    Args:
        correct: (N,) booleans, True for an image that is classified correctly; None = unknown.

    Returns:
        `correct`: base64 of bytes with one bit per image, in the order of the split, from the
        highest bit of the first byte on, padded with zeros; None if unknown.
    """
    if correct is None:
        return {"correct": None}
    packed_bits = np.packbits(correct.numpy()).tobytes()
    return {"correct": base64.b64encode(packed_bits).decode()}


def size_fields(costs: Cost) -> dict[str, Any]:
    """Entries of `results.json` with the results of `qat.model.cost`."""
    return {"n_params": costs.n_params, "size_bytes": costs.size_bytes, "bitops": costs.bitops}


def _device(accelerator: str | None) -> str:
    """Name of the GPU, or architecture and number of threads of the CPU."""
    if accelerator not in {"cpu", None} and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {format_count(torch.get_num_threads(), 'thread')}"


def library_versions(*more: str) -> dict[str, str]:
    """Versions of Python, qat, the libraries that qat is based on, and the packages in `more`."""
    versions = {"python": platform.python_version(), "qat": qat.__version__}
    for name in ("torch", "timm", "lightning", *more):
        versions[name] = importlib.metadata.version(name)
    return versions


def _git_commit(clone: Path = Path(qat.__file__).parents[1]) -> str | None:
    """Return the commit of a clone of qat, or None for an installed package or if git fails.

    An installed package may be inside a clone of another project, whose commit is not returned.
    """
    command = ["git", "-C", str(clone), "rev-parse", "--show-toplevel", "HEAD"]
    # Git's own variables, which are set in hooks, may name another repository.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    try:
        project = (clone / "pyproject.toml").read_text(encoding="utf-8")
        process = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=5, env=environment
        )
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    top, _, commit = process.stdout.strip().rpartition("\n")
    is_own_clone = f'name = "{LIBRARY}"' in project and Path(top).resolve() == clone.resolve()
    return commit if is_own_clone else None


def class_fields(confusion: Tensor, names: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Entries of `results.json` that describe the classes.

    Args:
        confusion: (K, K), integers: images by true class (row) and predicted class (column).
        names: names of the K classes.

    Returns:
        `classes`: name, images, and top-1 in percent of each class (None for a class without
        images); `confused`: the most frequent wrong predictions, each with the number of images and
        the percentage of the true class's images.
    """
    class_sizes = confusion.sum(1).tolist()
    correct_counts = confusion.diagonal().tolist()
    classes = []
    for name, size, num_correct in zip(names, class_sizes, correct_counts, strict=True):
        top1 = round(100 * num_correct / size, 4) if size else None
        classes.append({"class": name, "images": size, "top1": top1})
    wrong_counts = confusion.clone().fill_diagonal_(0).flatten()
    counts, cells = wrong_counts.topk(min(MAX_CONFUSED_PAIRS, len(wrong_counts)))
    confused_pairs = []
    for images, cell in zip(counts.tolist(), cells.tolist(), strict=True):
        if images == 0:
            continue
        row, column = divmod(cell, len(names))
        confused_pairs.append({
            "true": names[row],
            "predicted": names[column],
            "images": images,
            "share": round(100 * images / class_sizes[row], 4),
        })
    return {"classes": classes, "confused": confused_pairs}


def write_class_tables(
    folder: Path, confusion: Tensor, names: Sequence[str]
) -> dict[str, list[dict[str, Any]]]:
    """Write `classes.csv` and `confusion.csv`, in the first process of a run.

    `confusion.csv` has a row for each true class and a column for each predicted class.

    Returns:
        Result of `class_fields` for `confusion` and `names`.
    """
    results = class_fields(confusion, names)
    if is_first():
        write_text(folder / CLASSES, csv_text(results["classes"]))
        header = ["true \\ predicted", *names]
        rows = [[name, *counts] for name, counts in zip(names, confusion.tolist(), strict=True)]
        write_text(folder / CONFUSION, csv_lines([header, *rows]))
    return results
