"""Limits for what a file asks for: depth and number of its values, size of its weights and of the net that it describes."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qat.errors import UsageError

MOST_DEPTH, MOST_VALUES = 32, 10**6
# What a checkpoint may ask for before weights are compared: a number among a model's arguments; tensors and numbers of its net, in those
# of the file (a net is registered before and after conversion, with scales and offsets).
MOST_ARGUMENT = 2**17
TIMES, SPARE_TENSORS, SPARE_NUMBERS = 8, 2000, 2**24
# What weights may be made of: codes of two bits in the bytes of the file, and constant tensors, which take none.
MOST_PER_BYTE, MOST_CONSTANT = 4, 2**26


def check_bounds(value: object) -> None:
    """Raise `ValueError` for nested dicts and lists deeper than `MOST_DEPTH` or of more than `MOST_VALUES` values, each use counted."""
    level, values = [value], 0
    for _ in range(MOST_DEPTH):
        below: list[object] = []
        for node in level:
            below.extend(node.values() if isinstance(node, dict) else node if isinstance(node, list | tuple) else ())
            if values + len(below) > MOST_VALUES:
                raise ValueError(f"holds more than {MOST_VALUES} values")
        values += len(below)
        level = below
    if level:
        raise ValueError(f"is nested more than {MOST_DEPTH} deep")


def json_object(path: Path) -> dict[str, Any]:
    """What a JSON file holds; empty where it cannot be read, or holds something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def check_tensors(tensors: Mapping[str, Tensor], origin: str, size: int) -> None:
    """Raise `UsageError` unless the weights of a file of `size` bytes are dense real numbers, no more of them than it has room for."""
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized or tensor.is_complex():
            kind = "without values" if tensor.is_meta else str(tensor.dtype if tensor.layout == torch.strided else tensor.layout)
            raise UsageError(f"{origin}: its weight {name} is {kind.removeprefix('torch.')}; weights must be dense real numbers")
    numbers = sum(tensor.numel() for tensor in tensors.values())  # not those of their storages: many may share one, or be promised alone
    if numbers > MOST_PER_BYTE * size + MOST_CONSTANT:
        raise UsageError(f"{origin}: is damaged: its weights have {numbers} numbers, more than a file of {size} bytes holds")


def check_model_arguments(kwargs: Mapping[str, Any]) -> None:
    """Raise `ValueError` if a number among the arguments of a model is larger than any model needs."""
    for argument, value in kwargs.items():
        for number in value if isinstance(value, list | tuple) else [value]:
            if isinstance(number, int | float) and abs(number) > MOST_ARGUMENT:
                raise ValueError(f"argument {argument}={value!r} must be at most {MOST_ARGUMENT}")


@contextlib.contextmanager
def about_as_large_as(state: Mapping[str, Tensor]) -> Generator[None]:
    """Within it no net can be built that is much larger than some weights: `ValueError` at the first tensor too many, not yet filled."""
    tensors = TIMES * len(state) + SPARE_TENSORS
    numbers = TIMES * sum(tensor.numel() for tensor in state.values()) + SPARE_NUMBERS

    def count(_module: nn.Module, name: str, tensor: Tensor | None) -> None:
        nonlocal tensors, numbers
        if tensor is not None:
            tensors, numbers = tensors - 1, numbers - tensor.numel()
        if min(tensors, numbers) < 0:
            raise ValueError(f"the net is much larger than the weights of the file, at its {name}")

    watched = nn.modules.module
    hooks = watched.register_module_parameter_registration_hook(count), watched.register_module_buffer_registration_hook(count)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
