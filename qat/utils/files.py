"""Outputs appear whole or not at all: write beside, flush to the disk, rename. Files of tensors are read only if they are whole.

What a file asks for is limited: depth and number of its values, size of its weights; `qat/model/bounds.py` has the net it describes.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import hashlib
import io
import json
import math
import os
import pickle
import pickletools
import shutil
import zipfile
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from qat.errors import UsageError
from qat.utils.text import is_number, one_line, read_file

_UNFINISHED = ".part"
_FORMULA_STARTS = (
    "=",
    "+",
    "-",
    "@",
    "\uff1d",
    "\uff0b",
    "\uff0d",
    "\uff20",
)  # ASCII and full-width
_FOLDER_MARK = 0x10
MOST_DEPTH, MOST_VALUES = 32, 10**6
# What weights may be made of: codes of two bits in the bytes of the file, and constant tensors, which take none.
MOST_PER_BYTE, MOST_CONSTANT = 4, 2**26
# Functions that a pickle may call, of those that torch allows: results of the others may be far larger than the file.
_CALLABLE = (
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
_CALLABLE_PREFIXES = ("collections.", "torch._utils._rebuild_", "torch._tensor._rebuild_")
_ARCHIVE_START = b"PK\x03\x04"
_LEGACY_PICKLES = 5  # before the weights of a file that torch < 1.6 wrote
# Opcodes that leave their first value on the stack. A list or dict counts as one value: unlike a tuple, it is never hashed.
_UNCHANGED = {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD", "MEMOIZE", "DUP"}


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], *, previous: str | None = None) -> Generator[Path]:
    """Yield a temporary path beside `path`; on success it takes the place of `path`, on an error nothing is left of it.

    Args:
        path: the file to write.
        previous: name beside it under which the file that is replaced stays; at no moment is there no complete `path`.

    Raises:
        OSError: with the name of the file that was to be written.
        UsageError: `path` is a folder.
    """
    target = Path(path)
    check_not_folder(path)
    with _named(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}{_UNFINISHED}")
        temporary.touch()
        try:
            yield temporary
            flush(temporary)
            if previous is not None and target.exists():
                _keep(target, target.with_name(previous))
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
        flush(target.parent)


def check_not_folder(path: str | os.PathLike[str], setting: str = "path") -> None:
    """Raise `UsageError` if a file to be written is an existing folder."""
    if os.path.isdir(path or "."):
        raise UsageError(f"{setting}={str(path)!r}: must be a file, not a folder")


@contextlib.contextmanager
def _named(path: Path) -> Generator[None]:
    """An error of the disk that names no file, or the unfinished one, names this one."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and (
            error.filename is None or str(error.filename).endswith(_UNFINISHED)
        ):
            error.filename = str(path)
        raise


def flush(path: Path) -> None:
    """Put a file, or the names in a folder, onto the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _keep(present: Path, previous: Path) -> None:
    """Give a file a second name, taking that name from another file if need be; a copy where links are not to be had."""
    link = previous.with_name(f".{previous.name}.{os.getpid()}{_UNFINISHED}")
    link.unlink(missing_ok=True)
    try:
        link.hardlink_to(present)
    except OSError:
        shutil.copyfile(present, link)
    link.replace(previous)


def remove_unfinished(run_dir: Path, files: Iterable[str]) -> list[Path]:
    """Delete what killed writes have left.

    Args:
        run_dir: a directory that no other process writes to.
        files: patterns below it of the files that were written; unfinished files of other names stay.

    Returns:
        The deleted paths.
    """
    removed = []
    for pattern in files:
        folder, _, name = pattern.rpartition("/")
        for path in sorted((run_dir / folder).glob(f".{name}.*{_UNFINISHED}")):
            process = path.name.removesuffix(_UNFINISHED).rpartition(".")[2]
            if process.isdigit():
                path.unlink(missing_ok=True)
                removed.append(path)
    return removed


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file atomically; bytes of a name that UTF-8 cannot hold are escaped."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def csv_lines(rows: Iterable[Iterable[Any]]) -> str:
    """Cells of each line as a CSV file has them; no text is a formula or has a control character."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([csv_cell(cell) for cell in row] for row in rows)
    return text.getvalue()


def csv_cell(value: Any) -> Any:
    """A cell of a table: a text that a spreadsheet would take for a formula begins with an apostrophe.

    Examples:
        >>> [csv_cell(value) for value in ("=1+1", "-0.5", -0.5, "cat")]
        ["'=1+1", '-0.5', -0.5, 'cat']
    """
    if not isinstance(value, str):
        return value
    text = one_line(value)
    if text.lstrip().startswith(_FORMULA_STARTS) and not is_number(text):
        return f"'{text}"
    return text


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a CSV file has them, with all columns that any of them has; a value that is missing is an empty cell."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return csv_lines([columns, *([row.get(column) for column in columns] for row in rows)])


def csv_rows(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file by column; half a row at its end, as a kill leaves it, is none."""
    lines = io.StringIO(read_file(path).decode(), newline="")
    return list(csv.DictReader(line for line in lines if line.endswith("\n")))


def json_text(value: Any) -> str:
    """Plain data as a JSON file has them: null for NaN and infinity, which JSON does not know, and text for what else it does not know."""
    return json.dumps(_finite(value), indent=2, allow_nan=False, default=str) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_torch(path: str | os.PathLike[str], content: Any, *, previous: str | None = None) -> None:
    """`torch.save` atomically; see `replacing`."""
    with replacing(path, previous=previous) as temporary:
        try:
            torch.save(content, temporary)
        except RuntimeError as error:  # torch does not say why it cannot write
            with temporary.open("ab") as file:
                file.write(bytes(2**16))
                file.flush()
                os.fsync(file.fileno())
            raise error from None


def damage_of(path: str | os.PathLike[str]) -> str | None:
    """What is wrong with the archive that `torch.save` writes, None if it is as it was written; torch itself does not look at checksums.

    A file that is no such archive has no checksums, and nothing is said of it.
    """
    if not zipfile.is_zipfile(path):
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            # torch would leave the memory of an entry marked as a folder as it finds it, and no checksum covers that mark.
            entries = archive.infolist()
            folder = next(
                (entry.filename for entry in entries if entry.external_attr & _FOLDER_MARK), None
            )
            # Looked at before any of it is read: three megabytes may unpack to three gigabytes.
            if (
                any(entry.compress_type for entry in entries)
                or sum(entry.file_size for entry in entries) > Path(path).stat().st_size
            ):
                return "it is compressed, which torch.save never does"
            damaged = archive.testzip() or folder
    except (zipfile.BadZipFile, OSError, ValueError, RuntimeError, EOFError) as error:
        return " ".join(str(error).split())
    return None if damaged is None else f"checksum of {damaged} does not fit"


def read_torch(path: str | os.PathLike[str], *, map_location: Any = "cpu") -> Any:
    """Plain data and tensors of a file whose checksums fit; nothing in it is executed.

    Raises:
        OSError: it is damaged.
        OverflowError: it holds too many values.
        pickle.UnpicklingError: it holds something else.
        RuntimeError, EOFError: it is no file of `torch.save`.
    """
    if damage := damage_of(path):
        raise OSError(errno.EIO, f"it is damaged ({damage})", str(path))
    _check_pickles(path)
    return torch.load(path, map_location=map_location, weights_only=True)


def digest_of(tensors: Iterable[Tensor]) -> str:
    """A digest of the values of tensors, in their order: 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(
            tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()


def _check_pickles(path: str | os.PathLike[str]) -> None:
    """Raise an error if reading the pickles of a file could take much more than the file; none is executed."""
    with contextlib.suppress(EOFError), open(path, "rb") as file:
        # What torch looks at: a file may begin as a pickle and end as an archive.
        is_archive = file.read(len(_ARCHIVE_START)) == _ARCHIVE_START
        file.seek(0)
        for _ in range(0 if is_archive else _LEGACY_PICKLES):
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
    """A value on the stack of a pickle: name of a global or text, and number of values in it, each use counted."""

    name: str = ""
    values: int = 1


def _check_opcodes(file: IO[bytes]) -> None:
    """Follow the stack of one pickle up to its end; raise an error for a call or a size that no checkpoint needs."""
    mark = _Slot("mark")
    stack: list[_Slot] = []
    memo: dict[int, _Slot] = {}
    opcodes: Iterable[tuple[pickletools.OpcodeInfo, Any, int | None]] = pickletools.genops(file)
    try:
        for number, (opcode, argument, _) in enumerate(opcodes):
            if number > 2 * MOST_VALUES:
                raise OverflowError(f"holds more than {MOST_VALUES} values")
            popped = _pop(stack, opcode, mark)
            if opcode.name in {"REDUCE", "NEWOBJ", "NEWOBJ_EX", "INST", "OBJ"}:
                _check_call(popped[0].name if popped else str(argument))
            slot = _Slot(
                str(argument).replace(" ", ".") if opcode.name == "GLOBAL" else "",
                1 + sum(one.values for one in popped),
            )
            if opcode.name == "STACK_GLOBAL":
                slot.name = ".".join(one.name for one in popped)
            elif "UNICODE" in opcode.name:
                slot.name = argument
            elif opcode.name in _UNCHANGED:
                slot = popped[0]
            elif "GET" in opcode.name:
                slot = memo[argument]
            if slot.values > MOST_VALUES:
                raise OverflowError(f"holds more than {MOST_VALUES} values")
            if opcode.name == "MEMOIZE":
                memo[len(memo)] = slot
            elif "PUT" in opcode.name:
                memo[argument] = stack[-1]
            stack += [mark if opcode.name == "MARK" else slot] * len(opcode.stack_after)
    except (LookupError, ValueError) as error:
        raise pickle.UnpicklingError(f"its pickle is damaged ({error})") from error


def _pop(stack: list[_Slot], opcode: pickletools.OpcodeInfo, mark: _Slot) -> list[_Slot]:
    """Take from a stack what an opcode takes, lowest first, without the mark."""
    taken = opcode.stack_before
    above: list[_Slot] = []
    if pickletools.markobject in taken:
        while (slot := stack.pop()) is not mark:
            above.append(slot)
        taken = taken[: taken.index(pickletools.markobject)]
    below = [stack.pop() for _ in taken]
    return below[::-1] + above[::-1]


def _check_call(name: str) -> None:
    registered = {
        f"{one.__module__}.{one.__qualname__}"
        for one in torch.serialization.get_safe_globals()
        if callable(one)
    }
    if not (name.startswith(_CALLABLE_PREFIXES) or name in {*_CALLABLE, *registered}):
        raise pickle.UnpicklingError(f"calls {name}, which no checkpoint needs")


def files_below(folder: str | os.PathLike[str], *, hidden: bool = True) -> list[str]:
    """All files below a folder, sorted; links are followed, no folder is gone through twice.

    Args:
        folder: where.
        hidden: with what is below folders whose names begin with a dot.
    """
    found: list[str] = []
    seen: set[str] = set()
    for at, folders, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(at)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if hidden or not name.startswith(".")]
        found += [os.path.join(at, name) for name in files]
    return sorted(found)


def check_bounds(value: object) -> None:
    """Raise `ValueError` for nested dicts and lists deeper than `MOST_DEPTH` or of more than `MOST_VALUES` values, each use counted."""
    level, values = [value], 0
    for _ in range(MOST_DEPTH):
        below: list[object] = []
        for node in level:
            below.extend(
                node.values()
                if isinstance(node, dict)
                else node
                if isinstance(node, list | tuple)
                else ()
            )
            if values + len(below) > MOST_VALUES:
                raise ValueError(f"holds more than {MOST_VALUES} values")
        values += len(below)
        level = below
    if level:
        raise ValueError(f"is nested more than {MOST_DEPTH} deep")


def check_tensors(tensors: Mapping[str, Tensor], origin: str, size: int) -> None:
    """Raise `UsageError` unless the weights of a file of `size` bytes are dense real numbers, no more of them than it has room for."""
    for name, tensor in tensors.items():
        if (
            tensor.layout != torch.strided
            or tensor.is_meta
            or tensor.is_quantized
            or tensor.is_complex()
        ):
            kind = (
                "without values"
                if tensor.is_meta
                else str(tensor.dtype if tensor.layout == torch.strided else tensor.layout)
            )
            raise UsageError(
                f"{origin}: its weight {name} is {kind.removeprefix('torch.')}; weights must be dense real numbers"
            )
    numbers = sum(
        tensor.numel() for tensor in tensors.values()
    )  # not those of their storages: many may share one, or be promised alone
    if numbers > MOST_PER_BYTE * size + MOST_CONSTANT:
        raise UsageError(
            f"{origin}: is damaged: its weights have {numbers} numbers, more than a file of {size} bytes holds"
        )
