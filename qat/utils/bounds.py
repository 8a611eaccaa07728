"""What strangers wrote is read within bounds: of size, of depth, of how many values it holds, and of the net that it describes."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from qat.errors import UsageError

MOST_JSON_BYTES, MOST_YAML_BYTES = 2**25, 2**20
MOST_DEPTH, MOST_VALUES = 32, 10**6
MOST_DIGITS = 300
# Aliases of YAML are shared in memory and written out by whoever copies them.
MOST_YAML_VALUES = 20_000
# What a checkpoint may ask for before weights are compared: a number among a model's arguments; tensors and numbers of its net, in those
# of the file (a net is registered before and after conversion, with scales and offsets).
MOST_ARGUMENT = 2**17
TIMES, SPARE_TENSORS, SPARE_NUMBERS = 8, 2000, 2**24
# What weights may be made of: codes of two bits in the bytes of the file, and constant tensors, which take none.
MOST_PER_BYTE, MOST_CONSTANT = 4, 2**26


def check_bounds(value: object, most: int = MOST_VALUES) -> None:
    """Raise `ValueError` if nested dicts and lists are deeper than `MOST_DEPTH`, or hold more than `most` values, each use counted."""
    level, values = [value], 0
    for _ in range(MOST_DEPTH):
        below: list[Any] = []
        for node in level:
            if isinstance(node, Mapping):
                below.extend(node.values())
            elif isinstance(node, list | tuple):
                below.extend(node)
            if values + len(below) > most:
                raise ValueError(f"holds more than {most} values")
        values += len(below)
        level = below
    if level:
        raise ValueError(f"is nested more than {MOST_DEPTH} deep")


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no JSON, or beyond the bounds.
    """
    try:
        found = json.loads(_text(path, MOST_JSON_BYTES), parse_int=_integer)
    except RecursionError:
        raise ValueError(f"is nested more than {MOST_DEPTH} deep") from None
    check_bounds(found)
    return found


def json_object(path: Path) -> dict[str, Any]:
    """What a JSON file holds; empty where it cannot be read, or holds something else."""
    try:
        found = read_json(path)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _integer(text: str) -> int | float:
    """One that is also a float; a longer one is infinite."""
    return int(text) if len(text) < MOST_DIGITS else float(text)


def read_yaml(path: Path) -> tuple[Any, str]:
    """What a YAML file holds, as YAML 1.1 reads it, and its text.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no YAML of plain data, or beyond the bounds.
    """
    text = _text(path, MOST_YAML_BYTES)
    try:
        found = yaml.safe_load(text)
    except RecursionError:
        raise ValueError(f"is nested more than {MOST_DEPTH} deep") from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    check_bounds(found, MOST_YAML_VALUES)
    return found, text


def _text(path: Path, most: int) -> str:
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"is larger than {most} bytes")
    return content.decode()


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
        if any(abs(number) > MOST_ARGUMENT for number in _numbers(value)):
            raise ValueError(f"argument {argument}={value!r} must be at most {MOST_ARGUMENT}")


def _numbers(node: object) -> Iterator[float]:
    if isinstance(node, int | float):
        yield node
    for below in node.values() if isinstance(node, Mapping) else node if isinstance(node, list | tuple) else ():
        yield from _numbers(below)


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
