"""How a tensor was made, noted on the tensor itself: who needs it in backward can keep what it was made of, which is kept anyway."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_NOTE = "qat_source"


class Source(NamedTuple):
    """A pure function and the tensors that gave the tensor.

    Attributes:
        make: makes it again, bit for bit.
        inputs: its arguments.
        version: of the tensor when it was made; another one means that somebody has written into it since.
    """

    make: Callable[..., Tensor]
    inputs: tuple[Tensor | None, ...]
    version: int

    def __reduce__(self) -> tuple[type[torch.Size], tuple[()]]:
        """Saved with a tensor as an empty one: functions may be local, inputs be large; `torch.load` takes a Size with `weights_only`."""
        return torch.Size, ()


def remember(made: Tensor, make: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
    """Note on `made` that it is `make(*inputs)`, all inputs being kept for backward by somebody already.

    Returns:
        `made`.
    """
    setattr(made, _NOTE, Source(make, inputs, made._version))
    return made


def viewed(x: Tensor, view: Callable[[Tensor], Tensor]) -> Tensor:
    """`view(x)`, a view, which keeps the note of `x`."""
    made, source = view(x), getattr(x, _NOTE, None)
    if not source or source.version != x._version:
        return made
    return remember(made, lambda *inputs: view(source.make(*inputs)), *source.inputs)


class Kept(NamedTuple):
    """What a Function keeps of a tensor: the tensor, or what it is made of.

    Attributes:
        tensors: for `save_for_backward`.
        make: see `Source`; None = the tensor itself is kept.
    """

    tensors: tuple[Tensor | None, ...]
    make: Callable[..., Tensor] | None


def recompute(make: Callable[..., Tensor] | None, saved: tuple[Tensor | None, ...]) -> Tensor:
    """The tensor, from `Kept.make` and what `save_for_backward` gives back of `Kept.tensors`."""
    found = saved[0] if make is None else make(*saved)
    assert found is not None  # noqa: S101  (narrows a type)
    return found


def keep(x: Tensor) -> Kept:
    """The least that has to be kept of `x`."""
    source = getattr(x, _NOTE, None)
    if not source or source.version != x._version:
        return Kept((x,), None)
    return Kept(source.inputs, source.make)
