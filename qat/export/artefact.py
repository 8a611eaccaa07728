"""Write a file, run it beside its net, say what came of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from qat.errors import UsageError
from qat.export.check import Checked, check_packed
from qat.model.checkpoint import load
from qat.model.frozen.packed import write_packed


@dataclass(frozen=True)
class Written:
    """What came of an export.

    Attributes:
        checked: the file beside its net.
        text: for people.
        results: for `results.json`.
    """

    checked: Checked
    text: str
    results: Mapping[str, Any] = field(default_factory=dict)


def kept(target: Path, write: Callable[[Path], Written]) -> Written:
    """Write, compare, and only then give a file its name.

    Raises:
        UsageError: what was written disagrees; it is kept as `<target>.rejected`.
    """
    unchecked = target.with_name(f".unchecked.{target.name}")
    unchecked.parent.mkdir(parents=True, exist_ok=True)
    try:
        written = write(unchecked)
        problem, rejected = written.checked.problem, target.with_name(f"{target.name}.rejected")
        if problem is not None:
            unchecked.replace(rejected)
            raise UsageError(f"file={str(target)!r}: what was written does not agree with the checkpoint ({problem}); kept as {rejected}")
        rejected.unlink(missing_ok=True)
        unchecked.replace(target)
    finally:
        unchecked.unlink(missing_ok=True)
    return written


def packed_artefact(path: Path, frozen: nn.Module, net: nn.Module, meta: Mapping[str, Any], images: Sequence[Tensor]) -> Written:
    """A packed file, read back.

    Args:
        path: the file.
        frozen: what is written.
        net: what it was frozen from.
        meta: of `qat.model.checkpoint.describe`.
        images: (B, C, H, W) each.
    """
    sizes = write_packed(frozen, path, meta)
    checked = check_packed(frozen, net, load(path), images)
    shown = f"{checked.to_text()}\n{sizes.to_text()}"
    return Written(checked, shown, {"bytes": {"codes": sizes.codes, "scales": sizes.scales, "offsets": sizes.offsets, "rest": sizes.rest}})
