"""The settings of a run and those of the command that goes on with it: what is compared, and how they differ."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf

from qat.tasks.settings import removed

# Where things are, how they are shown and how images come to the run: nothing of it changes a result. All other settings are compared.
INDIFFERENT = {
    *("run_dir", "sweep_dir", "resume", "overwrite", "report", "allow_changed_data", "logger", "debug", "defaults", "follows"),
    *("checkpoint.every_n_steps", "trainer.log_every_n_steps", "trainer.profiler"),
    *(f"data.{name}" for name in ("root", "num_workers", "in_memory", "memory_mb", "cache")),
    *(f"callbacks.{name}" for name in ("last", "progress", "epoch_log", "throughput", "learning_rate", "preemption")),
}
# What is left of a value that a line cannot hold.
SHOWN = 60
MISSING = object()
Difference = tuple[str, Any, Any]


def compared(cfg: DictConfig) -> dict[str, Any]:
    """The settings of a run that shape what comes out, as plain data: what a checkpoint holds of them."""
    return of_file(OmegaConf.to_container(cfg, resolve=True)) or {}


def of_file(content: Any) -> dict[str, Any] | None:
    """The same of what a `config.yaml` holds, of which nothing is resolved; None where that is no config of a run."""
    if not isinstance(content, dict) or "trainer" not in content:
        return None
    return _kept(content)


def _kept(node: Any, name: str = "") -> Any:
    if isinstance(node, dict):
        below = {str(key): (f"{name}.{key}" if name else str(key), value) for key, value in node.items()}
        return {key: _kept(value, path) for key, (path, value) in below.items() if path not in INDIFFERENT and not removed(path)}
    if isinstance(node, list | tuple):
        return [_kept(value, name) for value in node]
    return node if node is None or type(node) in {bool, int, float, str} else str(node)


def differences(had: Any, has: Any, name: str = "") -> Iterator[Difference]:
    """Settings that differ: name and both values, `MISSING` where one side has none. What only one side has is named once, as a whole."""
    if not (isinstance(had, dict) and isinstance(has, dict)):
        if had != has:
            yield name, had, has
        return
    for key in dict.fromkeys([*had, *has]):
        yield from differences(had.get(key, MISSING), has.get(key, MISSING), f"{name}.{key}" if name else key)


def in_words(difference: Difference) -> str:
    """One difference: `trainer.precision was '32-true', is 'bf16-mixed'`."""
    name, had, has = difference
    before = "was not set" if had is MISSING else f"was {_short(had)}"
    return f"{name} {before}, {'is not set' if has is MISSING else f'is {_short(has)}'}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 4]} ..."
