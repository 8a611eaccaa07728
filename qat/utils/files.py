"""Write files, tables and JSON atomically, and read files of tensors with checks.

Files are written under a temporary name, flushed to the disk and renamed. `read_torch` checks
the checksums of a file of tensors and the number of its values, `check_bounds` their depth,
`check_tensors` the size of weights, and `qat/model/bounds.py` the model that the file describes.
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
import shutil
import zipfile
from collections.abc import Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qat.errors import UsageError
from qat.utils.pickles import MAX_VALUES, check_pickles
from qat.utils.text import is_number, one_line, read_file

_UNFINISHED = ".part"
# Characters that start a formula in spreadsheets, in ASCII and full-width.
_FORMULA_STARTS = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")
_FOLDER_MARK = 0x10
MAX_NESTING = 32
# A byte of a file can contain at most this many numbers: four 2-bit codes.
MAX_NUMBERS_PER_BYTE = 4
# Tensors of equal numbers may be stored as one number, so a file may have this many more numbers
# than its size allows.
MAX_CONSTANT_NUMBERS = 2**26


@contextlib.contextmanager
def replace_atomically(
    path: str | os.PathLike[str], *, previous: str | None = None
) -> Generator[Path]:
    """Yield a temporary path in the folder of `path`, and rename it to `path` after the block.

    An error in the block removes the temporary file and leaves `path` unchanged.

    Args:
        path: the file to write.
        previous: name in the same folder under which an old file is kept; None = it is deleted.
            Until the new file is complete, the old file stays at `path`.

    Raises:
        OSError: the file cannot be written.
        UsageError: `path` is a folder.
    """
    target = Path(path)
    check_not_folder(path)
    with _name_path_in_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}{_UNFINISHED}")
        temporary.touch()
        try:
            yield temporary
            flush(temporary)
            if previous is not None and target.exists():
                _link_or_copy(target, target.with_name(previous))
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
        flush(target.parent)


def check_not_folder(path: str | os.PathLike[str], setting: str = "path") -> None:
    """Raise `UsageError` if the path for a file is empty or leads to a folder."""
    if os.path.isdir(path or "."):
        raise UsageError(f"{setting}={str(path)!r}: must be a file, not a folder")


@contextlib.contextmanager
def _name_path_in_errors(path: Path) -> Generator[None]:
    """Put a path into OS errors that name no file or only a temporary file."""
    try:
        yield
    except OSError as error:
        is_unnamed = error.filename is None or str(error.filename).endswith(_UNFINISHED)
        if error.errno is not None and is_unnamed:
            error.filename = str(path)
        raise


def flush(path: Path) -> None:
    """Flush a file, or the names in a folder, from the system's buffers to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _link_or_copy(current: Path, previous: Path) -> None:
    """Give a file a second name, which may replace another file; copy the file if links fail."""
    link = previous.with_name(f".{previous.name}.{os.getpid()}{_UNFINISHED}")
    link.unlink(missing_ok=True)
    try:
        link.hardlink_to(current)
    except OSError:
        shutil.copyfile(current, link)
    link.replace(previous)


def remove_unfinished(run_dir: Path, files: Iterable[str]) -> list[Path]:
    """Delete the temporary files of processes that were killed while writing.

    Args:
        run_dir: a directory that no other process writes to.
        files: patterns of file names, relative to `run_dir`; temporary files of other names are not
            deleted.

    Returns:
        The deleted paths.
    """
    removed_paths = []
    for pattern in files:
        folder, _, name = pattern.rpartition("/")
        for path in sorted((run_dir / folder).glob(f".{name}.*{_UNFINISHED}")):
            process = path.name.removesuffix(_UNFINISHED).rpartition(".")[2]
            if process.isdigit():
                path.unlink(missing_ok=True)
                removed_paths.append(path)
    return removed_paths


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file atomically; characters that UTF-8 cannot encode are escaped."""
    with replace_atomically(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def csv_lines(rows: Iterable[Iterable[Any]]) -> str:
    """Make the text of a CSV file from rows of cells; escape formulas and control characters."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([csv_cell(cell) for cell in row] for row in rows)
    return text.getvalue()


def csv_cell(value: Any) -> Any:
    """Escape the text of a cell; an apostrophe keeps spreadsheets from reading it as a formula.

    Examples:
        >>> [csv_cell(value) for value in ("=1+1", "-0.5", -0.5, "cat")]
        ["'=1+1", '-0.5', -0.5, 'cat']
    """
    if not isinstance(value, str):
        return value
    text = one_line(value)
    is_formula = text.lstrip().startswith(_FORMULA_STARTS) and not is_number(text)
    return f"'{text}" if is_formula else text


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Make the text of a CSV file with the columns of all rows; missing values are empty cells."""
    columns: dict[str, None] = {}  # serves as an ordered set
    for row in rows:
        columns |= dict.fromkeys(row)
    lines = [[row.get(column) for column in columns] for row in rows]
    return csv_lines([columns, *lines])


def csv_rows(path: Path) -> list[dict[str, str]]:
    """Read the rows of a CSV file as dicts; ignore a last line that a killed process cut off."""
    lines = io.StringIO(read_file(path).decode(errors="replace"), newline="")
    return list(csv.DictReader(line for line in lines if line.endswith("\n")))


def json_text(value: Any) -> str:
    """Convert to JSON; NaN and infinity become null, values that JSON lacks become strings."""
    return json.dumps(_replace_non_finite(value), indent=2, allow_nan=False, default=str) + "\n"


def _replace_non_finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _replace_non_finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_replace_non_finite(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def files_below(folder: str | os.PathLike[str], *, hidden: bool = True) -> list[str]:
    """Sorted paths of all files below a folder; links are followed, but each folder only once.

    Args:
        folder: the folder.
        hidden: True = include files below folders whose names begin with a dot. Files whose own
            names begin with a dot are always included.
    """
    paths: list[str] = []
    visited_folders: set[str] = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        real_parent = os.path.realpath(parent)
        if real_parent in visited_folders:
            folders.clear()
            continue
        visited_folders.add(real_parent)
        folders[:] = sorted(name for name in folders if hidden or not name.startswith("."))
        paths += [os.path.join(parent, name) for name in files]
    return sorted(paths)


def write_torch(path: str | os.PathLike[str], content: Any, *, previous: str | None = None) -> None:
    """Write a file by `torch.save` atomically; see `replace_atomically`."""
    with replace_atomically(path, previous=previous) as temporary:
        try:
            torch.save(content, temporary)
        except RuntimeError as error:
            # Write more, so that the operating system raises its own error, which says why torch
            # cannot write.
            with temporary.open("ab") as file:
                file.write(bytes(2**16))
                file.flush()
                os.fsync(file.fileno())
            raise error from None


def read_torch(path: str | os.PathLike[str], *, map_location: Any = "cpu") -> Any:
    """Read plain data and tensors from a file; check its checksums, and execute nothing in it.

    Raises:
        OSError: the file cannot be opened, is cut off, or `find_damage` finds damage.
        OverflowError: the file contains too many values.
        pickle.UnpicklingError: the file contains something other than plain data and tensors.
        RuntimeError: the file was not written by `torch.save`.
    """
    damage = find_damage(path)
    if damage is not None:
        raise OSError(errno.EIO, f"the file is damaged: {damage}", str(path))
    try:
        check_pickles(path)
    except zipfile.BadZipFile as error:
        raise OSError(errno.EIO, f"the file is damaged: {error}", str(path)) from error
    return torch.load(path, map_location=map_location, weights_only=True)


def find_damage(path: str | os.PathLike[str]) -> str | None:
    """Find damage in an archive of `torch.save`; torch itself does not compare checksums.

    Returns:
        A description of the damage; None for an intact archive, and for files without the
        end of an archive, where the checksums are.
    """
    if not zipfile.is_zipfile(path):
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            # Check this before anything is read: 3 MB could unpack to 3 GB.
            if _is_compressed(archive, Path(path).stat().st_size):
                return "it is compressed, which torch.save never does"
            damaged_entry = archive.testzip()
            # Torch would leave the memory of an entry that is marked as a folder uninitialized.
            # No checksum covers this mark.
            folders = [e.filename for e in archive.infolist() if e.external_attr & _FOLDER_MARK]
    except (zipfile.BadZipFile, OSError, ValueError, RuntimeError, EOFError) as error:
        return " ".join(str(error).split()) or type(error).__name__
    if damaged_entry is not None:
        return f"the checksum of {damaged_entry} does not match"
    return f"{folders[0]} is marked as a folder" if folders else None


def _is_compressed(archive: zipfile.ZipFile, file_size: int) -> bool:
    entries = archive.infolist()
    unpacked_size = sum(entry.file_size for entry in entries)
    return any(entry.compress_type for entry in entries) or unpacked_size > file_size


def hash_tensors(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of the values of tensors in this order, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for tensor in tensors:
        values = tensor.detach().cpu().contiguous().flatten()
        digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_bounds(value: object) -> None:
    """Check that the nested dicts, lists and tuples of a file are within limits.

    Raises:
        ValueError: a value is inside `MAX_NESTING` or more of them, or there are more than
            `MAX_VALUES` values; shared values count each time.
    """
    level = [value]
    num_values = 0
    for _ in range(MAX_NESTING):
        next_level: list[object] = []
        for node in level:
            if isinstance(node, dict):
                next_level.extend(node.values())
            elif isinstance(node, list | tuple):
                next_level.extend(node)
            if num_values + len(next_level) > MAX_VALUES:
                raise ValueError(f"contains more than {MAX_VALUES} values")
        num_values += len(next_level)
        level = next_level
    if level:
        raise ValueError(f"has values at a depth of {MAX_NESTING} or more")


def check_tensors(tensors: Mapping[str, Tensor], origin: str, size: int) -> None:
    """Check that weights are dense real tensors, with no more numbers than their file can contain.

    Args:
        tensors: the weights by name.
        origin: the file, for the message.
        size: size of the file in bytes.

    Raises:
        UsageError: a weight is sparse, quantized, complex or on the meta device, or there are too
            many numbers.
    """
    for name, tensor in tensors.items():
        kind = _unusable_kind(tensor)
        if kind is not None:
            raise UsageError(
                f"{origin}: weight {name} is {kind}; weights must be dense real numbers"
            )
    # Sizes of storages would mislead, because many tensors may share a storage or expand one
    # number.
    num_numbers = sum(tensor.numel() for tensor in tensors.values())
    if num_numbers > MAX_NUMBERS_PER_BYTE * size + MAX_CONSTANT_NUMBERS:
        raise UsageError(
            f"{origin}: is damaged, because the weights have {num_numbers} numbers, "
            f"more than a file of {size} bytes can contain"
        )


def _unusable_kind(tensor: Tensor) -> str | None:
    """Description of a tensor that cannot be a weight; None for a usable tensor."""
    if tensor.is_meta:
        return "without values"
    if tensor.layout != torch.strided:
        return str(tensor.layout).removeprefix("torch.")
    if tensor.is_quantized or tensor.is_complex():
        return str(tensor.dtype).removeprefix("torch.")
    return None
