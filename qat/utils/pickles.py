"""Check the pickles in a file of tensors without executing them, to limit the cost of reading."""

from __future__ import annotations

import contextlib
import os
import pickle
import pickletools
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from typing import IO, Any

import torch

MAX_VALUES = 10**6
# Functions that a pickle may call, besides those registered with torch. Functions that torch
# allows but whose results may be far larger than the file are left out.
_ALLOWED_CALLS = (
    "argparse.Namespace",
    "builtins.complex",
    "builtins.set",
    "__builtin__.set",
    "__builtin__.complex",
    "torch.Size",
    "torch.device",
    "torch.serialization._get_layout",
    "torch.torch_version.TorchVersion",
)
_ALLOWED_CALL_PREFIXES = ("collections.", "torch._utils._rebuild_", "torch._tensor._rebuild_")
_ARCHIVE_START = b"PK\x03\x04"
_LEGACY_PICKLES = 5  # pickles before the weights in a file of torch < 1.6
_CALL_OPCODES = {"REDUCE", "NEWOBJ", "NEWOBJ_EX", "INST", "OBJ"}
# Opcodes that leave their lowest input on the stack, such as those that add to a list, dict or set.
# Added values do not count as values inside the list, dict or set: only hashing is slow if values
# are shared, because it visits them each time, and these types are never hashed.
_IN_PLACE_OPCODES = {
    "APPEND",
    "APPENDS",
    "SETITEM",
    "SETITEMS",
    "ADDITEMS",
    "BUILD",
    "MEMOIZE",
    "DUP",
}


def check_pickles(path: str | os.PathLike[str]) -> None:
    """Raise an error if reading pickles could cost far more than the size of their file suggests.

    Raises:
        OverflowError: a pickle contains more than about `MAX_VALUES` values.
        pickle.UnpicklingError: a pickle is damaged, or calls a function that no checkpoint needs.
        zipfile.BadZipFile: the archive is damaged.
    """
    with contextlib.suppress(EOFError), open(path, "rb") as file:
        # Look at the start, as torch does: a file may begin as a pickle and end as an archive.
        is_archive = file.read(len(_ARCHIVE_START)) == _ARCHIVE_START
        file.seek(0)
        if not is_archive:
            for _ in range(_LEGACY_PICKLES):
                _check_opcodes(file)
    if not is_archive:
        return
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.filename.lower().endswith(".pkl"):
                with archive.open(entry) as file:
                    _check_opcodes(file)


@dataclass
class _Slot:
    """A value on the stack of a pickle.

    Attributes:
        name: name of a global, or content of a string; empty for other values.
        values: number of values in this value, with itself; shared values count each time.
    """

    name: str = ""
    values: int = 1


def _check_opcodes(file: IO[bytes]) -> None:
    """Check one pickle by tracking the values on the stack, without executing the pickle."""
    mark = _Slot("mark")
    stack: list[_Slot] = []
    memo: dict[int, _Slot] = {}
    opcodes: Iterable[tuple[pickletools.OpcodeInfo, Any, int | None]] = pickletools.genops(file)
    try:
        for number, (opcode, argument, _) in enumerate(opcodes):
            if number > 2 * MAX_VALUES:
                raise OverflowError(f"contains more than {MAX_VALUES} values")
            popped_slots = _pop(stack, opcode, mark)
            if opcode.name in _CALL_OPCODES:
                _check_call(popped_slots[0].name if popped_slots else str(argument))

            slot = _pushed_value(opcode, argument, popped_slots, memo)
            if slot.values > MAX_VALUES:
                raise OverflowError(f"contains more than {MAX_VALUES} values")
            if opcode.name == "MEMOIZE":
                memo[len(memo)] = slot
            elif "PUT" in opcode.name:
                memo[argument] = stack[-1]
            pushed_slot = mark if opcode.name == "MARK" else slot
            stack += [pushed_slot] * len(opcode.stack_after)
    except (LookupError, ValueError) as error:
        raise pickle.UnpicklingError(f"the pickle is damaged ({error})") from error


def _pop(stack: list[_Slot], opcode: pickletools.OpcodeInfo, mark: _Slot) -> list[_Slot]:
    """Pop the inputs of an opcode from the stack; return them without the mark, lowest first."""
    inputs = opcode.stack_before
    popped_slots: list[_Slot] = []
    if pickletools.markobject in inputs:
        slot = stack.pop()
        while slot is not mark:
            popped_slots.append(slot)
            slot = stack.pop()
        inputs = inputs[: inputs.index(pickletools.markobject)]
    popped_slots += [stack.pop() for _ in inputs]
    return popped_slots[::-1]


def _pushed_value(
    opcode: pickletools.OpcodeInfo, argument: Any, popped_slots: list[_Slot], memo: dict[int, _Slot]
) -> _Slot:
    """The value that an opcode pushes onto the stack."""
    if "UNICODE" in opcode.name:
        return _Slot(argument)
    if opcode.name in _IN_PLACE_OPCODES:
        return popped_slots[0]
    if "GET" in opcode.name:
        return memo[argument]
    values = 1 + sum(slot.values for slot in popped_slots)
    if opcode.name == "GLOBAL":
        return _Slot(str(argument).replace(" ", "."), values)
    if opcode.name == "STACK_GLOBAL":
        return _Slot(".".join(slot.name for slot in popped_slots), values)
    return _Slot(values=values)


def _check_call(name: str) -> None:
    if name.startswith(_ALLOWED_CALL_PREFIXES) or name in _ALLOWED_CALLS:
        return
    registered_callables = [
        entry for entry in torch.serialization.get_safe_globals() if callable(entry)
    ]
    if name not in {f"{entry.__module__}.{entry.__qualname__}" for entry in registered_callables}:
        raise pickle.UnpicklingError(f"calls {name}, which no checkpoint needs")
