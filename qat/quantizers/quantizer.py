"""What every quantizer does: allocate its state, calibrate it from data, fake-quantize, return codes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from qat.kernels import LSQParams
from qat.kernels.fused import WeightParams
from qat.quantizers.grid import Grid
from qat.spec import QuantSpec
from qat.utils.validate import FLOAT_BITS


class Quantizer(nn.Module, ABC):
    """Maps a tensor to its low-bit grid.

    A subclass implements `forward` and `codes`, and `grid`, without which its tensors can neither be frozen nor exported and reports
    say less of them; one with scales also `allocate` and `calibrate`. Scales exist in their final
    shape, filled with NaN, from conversion on: the parameter set never changes afterwards, and a quantizer that was not initialised
    yields NaN instead of plausible numbers (its net raises: `qat.model.scales.guard`).

    Args:
        spec: how the tensor is quantized.
    """

    # Whether values that a product sums share a scale: heads, over which none does, are then apart from each other (B, h, N, d).
    in_blocks = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Who rounds in a way of its own has a grid and an operand of its own: those of a class that it inherits from might be wrong."""
        super().__init_subclass__(**kwargs)
        for told, *rounding in (
            ("grid", "forward", "codes"),
            ("operand", "forward", "shifted", "codes", "scale_of"),
        ):
            # The first class that says something of it may be a mixin.
            if told not in next(
                names for base in cls.__mro__ if (names := vars(base)).keys() & {told, *rounding}
            ):
                setattr(cls, told, getattr(Quantizer, told))

    def __init__(self, spec: QuantSpec) -> None:
        super().__init__()
        self.spec = spec
        self.axis = spec.axis

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize `x`: same shape and dtype, values on the grid."""

    def shifted(self, x: Tensor, before: Tensor, after: Tensor | None) -> Tensor:
        """q(x + a) + c in float32, for offsets a and c over the trailing dimensions of `x`."""
        y = self(x.float() + before.float())
        return y if after is None else y + after.float()

    @abstractmethod
    def codes(self, x: Tensor) -> Tensor:
        """Integer codes of `x`, same shape."""

    def grid(self, x: Tensor | None = None) -> Grid | None:
        """Where the values lie.

        Args:
            x: the tensor, which a quantizer reads that finds its steps anew in every forward.

        Returns:
            None for a quantizer without codes, of which nothing is known, or one that would have to read `x`.
        """
        return None

    def operand(self) -> LSQParams | WeightParams | None:
        """What a product needs to be one Function with the quantizer; None = the quantizer runs before it, which is as right."""
        return None

    @property
    def is_float(self) -> bool:
        """True for the identity."""
        return self.spec.bits == FLOAT_BITS

    def allocate(self, shape: torch.Size, device: torch.device) -> None:
        """Create the state for inputs of `shape` (any batch size), scales filled with NaN.

        A negative axis that would meet the batch dimension gives way to one scale for the tensor: a scale per image of a batch
        means nothing. So does the axis of an input that is a feature map (B, H, W, C), unless the spec wants its columns apart.
        """
        meets_batch = (
            self.spec.axis is not None and self.spec.axis < 0 and self.spec.axis + len(shape) == 0
        )
        is_map = self.spec.role == "input" and len(shape) > 3
        if meets_batch or (is_map and self.spec.map_scales == "tensor"):
            self.axis = None

    def share_scale(self) -> None:
        """Give up the axis: the tensor comes in several lengths. Holds for the next `allocate`."""
        self.axis = None

    def calibrate(self, x: Tensor, state: dict[str, Any]) -> None:
        """Fold one more batch into `state` and set the scales from all batches in it."""

    @torch.no_grad()
    def set_scale(self, values: Tensor) -> None:
        """Put scales in force in place of those that are stored; the shape of `scale`."""
        self.scale.copy_(values)  # type: ignore[operator]

    def held(self) -> Tensor | None:
        """The quantized weight, where the quantizer keeps it in place of a float master."""
        return None

    @property
    def n_scales(self) -> int:
        """Number of scales that are stored with the net."""
        scale = getattr(self, "scale", None)
        return 0 if scale is None else scale.numel()

    def n_groups(self, shape: torch.Size) -> int:
        """Number of scales that a tensor of `shape` needs, stored or recomputed."""
        return 1 if self.axis is None else shape[self.axis]

    def nan_tensor(self, shape: torch.Size, device: torch.device) -> Tensor:
        """One NaN per scale."""
        return torch.full((self.n_groups(shape),), torch.nan, device=device)

    def extra_repr(self) -> str:
        """The spec and the axis in force."""
        kind = {True: "signed", False: "unsigned", None: "sign from data"}[self.spec.signed]
        return f"{self.spec.quantizer}, bits={self.spec.bits}, {kind}, axis={self.axis}, role={self.spec.role}"


class Float(Quantizer):
    """Returns its input: float is a quantizer too, so that no caller asks for the number of bits."""

    def forward(self, x: Tensor) -> Tensor:
        """`x` itself."""
        return x

    def codes(self, x: Tensor) -> Tensor:
        """A float tensor has no codes.

        Raises:
            TypeError: always.
        """
        raise TypeError(f"the float quantizer of role {self.spec.role!r} has no integer codes")
