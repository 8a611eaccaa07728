"""In which ONNX type the codes of a weight are stored, and what takes them back to numbers. Facts: docs/deployment.md."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qat.model.frozen import FrozenWeight

# From this opset on a Cast takes the type.
OPSETS = {"INT8": 13, "INT4": 21, "INT2": 25}
WIDTHS = {"INT8": 8, "INT4": 4, "INT2": 2}
TWO_BIT = {"int4": 4, "int2": 2}


@dataclass(frozen=True)
class Stored:
    """A weight as (factors - zero_point) * scale + constant, with factors of 8 bits: the codes, or 2 * codes + 1.

    Attributes:
        kind: ONNX type of the stored codes.
        codes: int8 that fit it.
        is_doubled: the factors are 2 * codes + 1.
        scale: (n,), a scale a row, or (1,).
        zero_point: (n,) or (1,), int8, or None = 0.
        constant: (n,), what is added to a row: half a step of 8-bit StatsQ, or what bias correction adds; None = 0.
    """

    kind: str
    codes: Tensor
    is_doubled: bool
    scale: Tensor
    zero_point: Tensor | None
    constant: Tensor | None

    @property
    def opset(self) -> int:
        """The lowest that has the type."""
        return OPSETS[self.kind]

    @property
    def factors(self) -> Tensor:
        """What products take, float32: whole numbers without their zero point, the shape of the weight."""
        factors = self.codes.float() * 2 + 1 if self.is_doubled else self.codes.float()
        return factors if self.zero_point is None else factors - _rows(self.zero_point.float(), factors)

    @property
    def value(self) -> Tensor:
        """The weight, float32."""
        value = self.factors * _rows(self.scale, self.codes)
        return value if self.constant is None else value + _rows(self.constant, value)


def _rows(t: Tensor, like: Tensor) -> Tensor:
    return t.reshape(-1, *[1] * (like.ndim - 1))


def stored_form(weight: FrozenWeight, lowest: int = 4) -> Stored:
    """Choose the smallest type that holds a weight exactly, and that is read where its file is to run.

    The levels of half-step grids (StatsQ, SEQ) lie half a step beside those of an integer type: products take the odd numbers 2k+1 in
    place of k. They are stored so where they fit the type that the width needs anyway (2 and 3 bits in INT4, 5 to 7 in INT8), else they are
    made of k when the file is opened (4 bits; 2 in INT2). At 8 bits they do not fit: k, with half a step added.

    Args:
        weight: frozen.
        lowest: width of the smallest type that may be used: 2, 4, which OpenVINO reads, or 8, which TensorRT does.
    """
    bits, signed = weight.spec.bits, weight.stored.dtype == torch.int8
    size = next(width for width in sorted(WIDTHS.values()) if width >= max(bits, lowest))
    below = 0 if signed else 2 ** (bits - 1)
    codes, shift, scale, constant = weight.stored.to(torch.int16) - below, weight.shift + below, weight.scale, weight.after
    zero_point, is_doubled = None, False
    if not bool((shift % 1 != 0).any()):
        zero_point = (-shift).to(torch.int8) if bool(shift.any()) else None
    elif bits < WIDTHS["INT8"] and bool((shift == 0.5).all()):
        scale, is_doubled = scale / 2, 2**bits > 2 ** (size - 1)
        codes = codes if is_doubled else 2 * codes + 1
    else:
        constant = scale * shift if constant is None else constant + scale * shift
    return Stored(f"INT{size}", codes.to(torch.int8), is_doubled, scale, zero_point, constant)
