"""Commands run in the process of a benchmark (what a new process spends on imports is most of a small run), and the cells of its table."""

from __future__ import annotations

import importlib
import json
import statistics
from pathlib import Path

import hydra
from omegaconf import DictConfig

from qat.cli import entry  # noqa: F401  (registers the resolvers of the configs)

ROOT = Path(__file__).resolve().parents[1]


def cell(values: list[float], form: str) -> str:
    """Mean and sample deviation."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):{form}} +- {spread:{form}}"


def compose(command: str, *settings: str) -> DictConfig:
    """The config of a command, as Hydra hands it to the task."""
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return hydra.compose(command, overrides=list(settings))


def run(command: str, run_dir: Path, *settings: str) -> dict:
    """Run `train` or `ptq` unless its results are there, and give them."""
    results = run_dir / "results.json"
    if not results.exists():
        print("+", f"python {command}.py run_dir='{run_dir}'", " ".join(settings), flush=True)
        run_dir.mkdir(parents=True, exist_ok=True)
        task = getattr(importlib.import_module(f"qat.tasks.{command}"), command)
        task(compose(command, f"run_dir='{run_dir}'", "overwrite=true", "report=false", *settings))
    return json.loads(results.read_text())
