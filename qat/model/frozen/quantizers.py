"""Quantizers of a net that learns no more: codes of weights, fixed grids of activations. The float masters are gone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qat.functional.ste import code_dtype, view_along
from qat.model.frozen.coded import Coded
from qat.quantizers import Quantizer
from qat.spec import OUTPUT_ROLES, QuantSpec

MODES = ("float", "integer")
# What leaves these goes into sums and norms, not into products.
_STAYS_A_NUMBER = frozenset(OUTPUT_ROLES) - {"qkv"}
_LOG2_BITS = 4
# Of activations: in front of the rounding, and behind it.
OFFSETS = ("before", "after")


class Frozen(Quantizer):
    """A quantizer without parameters.

    Attributes:
        mode: `float` gives numbers on the grid, `integer` what products of codes take (`Coded`).
        name: of its site.
        form: computes the same in another way, as operators of a file format; takes what `forward` takes. None = as here.
    """

    form: Callable[[Tensor | None], Tensor] | None = None

    def __init__(self, spec: QuantSpec, axis: int | None, name: str) -> None:
        super().__init__(dataclasses.replace(spec, offsets="none"))
        self.axis, self.name, self.mode = axis, name, "float"

    def allocate(self, shape: torch.Size, device: torch.device) -> None:
        """Nothing: everything is there."""

    @property
    def gives_codes(self) -> bool:
        """True if the next forward pass gives `Coded`."""
        return self.mode == "integer" and self.spec.role not in _STAYS_A_NUMBER


class FrozenWeight(Frozen):
    """(codes + shift) * scale + after.

    Attributes:
        stored: codes of the weight, int8 or uint8, its shape.
        scale: step between two codes, (n,), of each row or one for all.
        shift: half a step for StatsQ, minus the zero point for affine grids; (n,) in codes, whole or half numbers.
        after: what bias correction adds to a row, (n,), or None.
    """

    stored: Tensor
    scale: Tensor
    shift: Tensor
    after: Tensor | None

    def __init__(self, spec: QuantSpec, axis: int | None, name: str, parts: tuple[Tensor, Tensor, Tensor, Tensor | None]) -> None:
        super().__init__(spec, axis, name)
        for key, value in zip(("stored", "scale", "shift", "after"), parts, strict=True):
            self.register_buffer(key, value)

    def forward(self, x: Tensor | None = None) -> Tensor:
        """The weight, float32, whatever `x` is."""
        ndim = self.stored.ndim
        y = (self.stored + view_along(self.shift, ndim, self.axis)) * view_along(self.scale, ndim, self.axis)
        return y if self.after is None else y + view_along(self.after, ndim, self.axis)

    def held(self) -> Tensor:
        """The weight, as codes where the mode says so."""
        if self.form is not None:
            return self.form(None)
        return self.coded() if self.gives_codes else self()  # type: ignore[return-value]

    def codes(self, x: Tensor | None = None) -> Tensor:
        """`stored`."""
        return self.stored

    def coded(self) -> Coded:
        """On a grid through zero: of StatsQ the odd numbers 2k+1, of half its step."""
        ndim = self.stored.ndim
        halves = bool((self.shift % 1 != 0).any())
        doubled = (self.stored + view_along(self.shift, ndim, self.axis)) * (2 if halves else 1)
        scale = view_along(self.scale / (2 if halves else 1), ndim, self.axis)
        after = None if self.after is None else view_along(self.after, ndim, self.axis)
        bound = int(((torch.tensor([self.lowest, self.highest]) + self.shift.cpu()[:, None]) * (2 if halves else 1)).abs().max())
        return Coded.of(doubled, scale, after, bound, self.name)

    @property
    def lowest(self) -> int:
        """Lowest code."""
        return -(2 ** (self.spec.bits - 1)) if self.stored.dtype == torch.int8 else 0

    @property
    def highest(self) -> int:
        """Highest code."""
        return self.lowest + 2**self.spec.bits - 1

    def extra_repr(self) -> str:
        """What is stored."""
        return f"{tuple(self.stored.shape)} codes of {self.spec.bits} bits, {self.scale.numel()} scales, axis={self.axis}"


class FrozenActivation(Frozen):
    """(clamp(round((x + a) / s + z), qmin, qmax) - z) * s + c.

    Attributes:
        scale: s, (n,), in the unit of the input.
        zero_point: z, (n,), whole numbers, or None = 0.
        before: a, over trailing dimensions, or None.
        after: c, likewise.
        bounds: lowest and highest code, int16, (2,): whether those of an image have a sign was found from data.
        qmin, qmax: the same as numbers.
    """

    bounds: Tensor

    scale: Tensor
    zero_point: Tensor | None
    before: Tensor | None
    after: Tensor | None

    def __init__(self, spec: QuantSpec, axis: int | None, name: str, bounds: tuple[int, int], **parts: Tensor | None) -> None:
        super().__init__(spec, axis, name)
        self.qmin, self.qmax = bounds
        self.register_buffer("bounds", torch.tensor(bounds, dtype=torch.int16))
        for key in ("scale", "zero_point", *OFFSETS):
            self.register_buffer(key, parts.get(key))

    def forward(self, x: Tensor) -> Tensor:
        """Numbers on the grid, float32 inside and the dtype of `x` outside; or `Coded`."""
        if self.form is not None:
            return self.form(x)
        if self.gives_codes:
            return self.coded(x)  # type: ignore[return-value]
        codes, step, zero = self.rounded(x)
        y = (codes if zero is None else codes - zero) * step
        return (y if self.after is None else y + self.after).to(x.dtype)

    def placed(self, shifted: Tensor) -> Tensor:
        """Where x + a is between the codes, before rounding, float32, the shape of x."""
        u, _, _ = self._coordinate(shifted)
        return u

    def codes(self, x: Tensor) -> Tensor:
        """Codes in [qmin, qmax], zero point included."""
        return self.rounded(x)[0].to(code_dtype(self.qmin, self.qmax))

    def coded(self, x: Tensor) -> Coded:
        """Codes without the zero point."""
        codes, step, zero = self.rounded(x)
        lowest = 0 if zero is None else int(zero.min())
        highest = 0 if zero is None else int(zero.max())
        bound = max(abs(self.qmin - highest), abs(self.qmax - lowest))
        return Coded.of(codes if zero is None else codes - zero, step, self.after, bound, self.name)

    def rounded(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Codes as float32, step and zero point that broadcast against them."""
        u, step, zero = self._coordinate(x.float() if self.before is None else x.float() + self.before)
        return u.round().clamp(self.qmin, self.qmax), step, zero

    def _coordinate(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        step = view_along(self.scale, x.ndim, self.axis)
        zero = None if self.zero_point is None else view_along(self.zero_point, x.ndim, self.axis)
        u = x / step
        return u if zero is None else u + zero, step, zero

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.qmin, self.qmax = (int(n) for n in self.bounds)


class FrozenLog2(Frozen):
    """Powers of two; as codes, whole multiples of the smallest one."""

    def __init__(self, quantizer: Quantizer, name: str) -> None:
        super().__init__(quantizer.spec, None, name)
        self.quantizer = quantizer

    def forward(self, x: Tensor) -> Tensor:
        """2^-k, or `Coded`."""
        y: Tensor = self.quantizer(x)
        if not self.gives_codes:
            return y
        if self.spec.bits > _LOG2_BITS:
            raise TypeError(
                f"{self.name}: powers of two of {self.spec.bits} bits are no integers of 32 bits; must be from 2 to {_LOG2_BITS}"
            )
        places = 2**self.spec.bits - 1
        return Coded.of(y.float() * 2**places, torch.tensor(2.0**-places, device=x.device), None, 2**places, self.name)  # type: ignore[return-value]

    def codes(self, x: Tensor) -> Tensor:
        """The exponents."""
        return self.quantizer.codes(x)


def set_mode(net: nn.Module, mode: str) -> nn.Module:
    """Compute quantized products of a frozen net on numbers (`float`) or on codes (`integer`)."""
    for module in net.modules():
        if isinstance(module, Frozen):
            module.mode = mode
    return net
