"""What an exported file gives on images, beside the net that it was made from."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from qat.export.session import LEVELS, OPENVINO, Transparent, has_openvino, logits_of, open_session
from qat.model.frozen.agreement import Agreement, compare, run_watched

# Of a logit, on images on which no code differs. OpenVINO makes mistakes of its own where a file takes any number of images
# (docs/deployment.md#openvino): such a file is still one for others.
TOLERANCE = 1e-4
# Percent; what thresholds alone take from it is said, and no reason to reject a file.
EXPECTED_TOP1 = 99.9
# Beyond `ORT_ENABLE_BASIC` onnxruntime computes in integers: where values lie on thresholds, as behind zero points, it may round them the
# other way. More than this share of the images means that it computes something else.
UNLIKE = 0.1


@dataclass
class Checked:
    """A file beside its net.

    Attributes:
        agreement: codes and logits of the net and of the file, step by step; by the level to which onnxruntime changes the graph, and of
            OpenVINO, where it is installed and runs the file (INT2 it does not read). Onnxruntime decides whether a file is good.
        unlike: images on which the file as people run it differs from the one that was looked into, by the same.
        failure: why OpenVINO does not run the file; None if it does or was not asked.
    """

    agreement: dict[str, Agreement] = field(default_factory=dict)
    unlike: dict[str, int] = field(default_factory=dict)
    failure: str | None = None

    def to_text(self) -> str:
        """Lines for people."""
        lines = [f"{level}: {found.to_text()}" for level, found in self.agreement.items()]
        if any(found.top1 < EXPECTED_TOP1 for found in self.agreement.values()):
            lines.append(f"top-1 agrees on fewer than {EXPECTED_TOP1} % of the images: this net decides much by values on thresholds")
        if text := self.differs(OPENVINO):
            lines.append(f"not for OpenVINO: {text.removeprefix(f'{OPENVINO}: ')}; a file with format.dynamic_batch=false may be")
        return "\n".join(lines)

    @property
    def problem(self) -> str | None:
        """Why the file must not be used; None if it agrees."""
        return next((text for level in self.agreement if level != OPENVINO and (text := self.differs(level))), None)

    def differs(self, level: str) -> str | None:
        """What speaks against a file in a runtime; None if nothing does."""
        if level == OPENVINO and self.failure is not None:
            return f"{level}: it fails ({self.failure})"
        found = self.agreement.get(level)
        if found is None:
            return None
        if found.not_ties:
            return f"{level}: codes of {found.not_ties[0]} differ away from a threshold"
        if found.largest_absolute > TOLERANCE:
            return f"{level}: logits differ by {found.largest_absolute:.1e} where no code does; must be at most {TOLERANCE:.0e}"
        if self.unlike.get(level, 0) > UNLIKE * found.images:
            return f"{level}: on {self.unlike[level]} of {found.images} images it is not what its graph gives step by step"
        return None

    @contextlib.contextmanager
    def running(self, level: str) -> Generator[None]:
        """An error of OpenVINO says something about the file in OpenVINO alone: it is noted, and nothing else is asked of it."""
        try:
            yield
        except RuntimeError as error:
            if level != OPENVINO:
                raise
            said = [line for line in str(error).splitlines() if not line.startswith("Exception from ")]  # its own source files
            self.failure = " ".join(" ".join(said).split())[:200]
            del self.agreement[level]


@torch.no_grad()
def check_onnx(frozen: nn.Module, net: nn.Module, path: Path, batches: Iterable[Tensor]) -> Checked:
    """Run a file and the net that it was made from on the same images.

    Args:
        frozen: the net that was written.
        net: what it was frozen from, or itself.
        path: the file.
        batches: images (B, C, H, W) each.
    """
    import onnx  # noqa: PLC0415  (an extra)

    model = onnx.load(str(path))
    has_int2 = any(tensor.data_type == onnx.TensorProto.INT2 for tensor in model.graph.initializer)
    levels = (*LEVELS, OPENVINO) if has_openvino() and not has_int2 else LEVELS
    opened = functools.cache(lambda level: (Transparent(model, level), open_session(path, level=level)))
    done = Checked({level: Agreement() for level in levels}, dict.fromkeys(levels, 0))
    for x in batches:
        theirs = run_watched(net, x)
        for level in tuple(done.agreement):
            with done.running(level):
                watched, session = opened(level)
                mine, as_run = watched.run(x), logits_of(session, x)
                done.agreement[level].add(compare(frozen, theirs, mine))
                done.unlike[level] += _unlike(as_run, mine[0])
    return done


@torch.no_grad()
def check_packed(frozen: nn.Module, net: nn.Module, again: nn.Module, batches: Iterable[Tensor]) -> Checked:
    """Compare a net with the one that a packed file gives back, which has to be the frozen one to the last bit."""
    done = Checked({"qat.load": Agreement()}, {"qat.load": 0})
    for x in batches:
        mine = run_watched(again, x)
        done.agreement["qat.load"].add(compare(frozen, run_watched(net, x), mine))
        done.unlike["qat.load"] += int((frozen(x) != mine[0]).any(1).sum())
    return done


def _unlike(a: Tensor, b: Tensor) -> int:
    return int(((a - b).abs().amax(1) > TOLERANCE).sum())


def table(rows: Mapping[str, Mapping[str, str]]) -> str:
    """Rows by name, columns by name, as plain text."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    cells = [["", *columns], *([name, *(row.get(column, "") for column in columns)] for name, row in rows.items())]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    return "\n".join(
        "  ".join(f"{cell:<{w}}" if i == 0 else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(line, widths, strict=True))).rstrip()
        for line in cells
    )
