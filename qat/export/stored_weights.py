"""In which ONNX type the codes of a weight are stored, and what takes them back to numbers. Facts: docs/deployment.md."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qat.errors import UsageError
from qat.model.frozen import FrozenWeight

# From this opset on DequantizeLinear takes the type.
OPSETS = {"INT8": 13, "UINT8": 13, "INT4": 21, "UINT4": 21, "INT2": 25, "UINT2": 25}
WIDTHS = {"INT8": 8, "UINT8": 8, "INT4": 4, "UINT4": 4, "INT2": 2, "UINT2": 2}
TWO_BIT = ("int2", "int4")


@dataclass(frozen=True)
class Stored:
    """A weight as (codes - zero_point) * scale + constant.

    Attributes:
        kind: ONNX type of the codes and of the zero point.
        codes: int8 or uint8 that fit it.
        scale: (n,), a scale a row, or (1,).
        zero_point: (n,) or (1,), or None = 0.
        constant: (n,), what is added to a row: half a step of StatsQ, or what bias correction adds; None = 0.
    """

    kind: str
    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    constant: Tensor | None

    @property
    def opset(self) -> int:
        """The lowest that has the type."""
        return OPSETS[self.kind]


def stored_form(weight: FrozenWeight, two_bit: str = "int2") -> Stored:
    """Choose the smallest type that holds a weight exactly.

    The levels of StatsQ lie half a step beside those of an integer type. They are stored as the odd numbers 2k+1 where these fit the
    type that the width needs anyway (3 bits in INT4, 5 to 7 in INT8), else as k, with half a step added behind the scale (2, 4, 8 bits).

    Args:
        weight: frozen.
        two_bit: `int2` stores 2 bits of StatsQ as k in INT2; `int4` as odd numbers in INT4: twice the bytes, nothing to add.
    """
    bits, signed = weight.spec.bits, weight.stored.dtype == torch.int8
    size = 2 if bits == WIDTHS["INT2"] else 4 if bits <= WIDTHS["INT4"] else 8
    shift, scale, constant = weight.shift, weight.scale, weight.after
    codes, zero_point = weight.stored, None
    if bool((shift % 1 != 0).any()):
        size = 4 if bits == WIDTHS["INT2"] and two_bit == "int4" else size
        if 2**bits - 1 <= 2 ** (size - 1) - 1:
            codes, scale = 2 * weight.stored + 1, scale / 2
        else:
            constant = scale * shift if constant is None else constant + scale * shift
    elif bool(shift.any()):
        zero_point = (-shift).to(weight.stored.dtype)
    return Stored(f"{'' if signed else 'U'}INT{size}", codes, scale, zero_point, constant)


def needed_opset(forms: dict[str, Stored], wanted: int | None, lowest: int) -> int:
    """The opset to write.

    Args:
        forms: of all weights, by name.
        wanted: None = the lowest that does.
        lowest: what the rest of the graph needs.

    Raises:
        UsageError: the one that is wanted is too low.
    """
    name = max(forms, key=lambda key: forms[key].opset, default=None)
    needed = max(lowest, forms[name].opset if name is not None else 0)
    if wanted is not None and wanted < needed:
        why = f"{name} is stored as {forms[name].kind}" if name is not None and forms[name].opset == needed else "the graph"
        raise UsageError(f"opset={wanted}: too low, {why} needs {needed}; must be an integer of at least {needed}")
    return needed if wanted is None else wanted
