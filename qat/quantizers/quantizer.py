"""Interface of quantizers: allocate scales, calibrate them, fake-quantize, and return codes."""

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

# Methods that describe the rounding, and for each the methods on which the description depends.
_DEPENDS_ON = {
    "grid": {"forward", "codes"},
    "fused_params": {"forward", "quantize_shifted", "codes", "scale_of"},
}


class Quantizer(nn.Module, ABC):
    """Maps a tensor to its low-bit grid.

    A subclass implements `forward` and `codes`; to store scales, also `allocate` and `calibrate`.
    Without `grid`, tensors can be neither frozen nor exported, and reports say less about them.
    From conversion on, stored scales have their final shape; they are NaN until initialized. The
    set of parameters therefore never changes, and a quantizer that was not initialized returns NaN
    instead of plausible numbers (with `qat.model.scales.guard`, calls of the net raise an error).

    Args:
        spec: how the tensor is quantized.
    """

    # True if scales belong to blocks along the dimension over which a matrix product sums. Queries
    # and keys are then split into heads (B, h, N, d) before the quantizer, so that no block extends
    # across heads.
    in_blocks = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Reset an inherited `grid` or `fused_params` if the class overrides what it depends on.

        Otherwise the inherited method would describe the rounding of the base class.
        """
        super().__init_subclass__(**kwargs)
        for description, rounding in _DEPENDS_ON.items():
            for base in cls.__mro__:
                if description in vars(base):
                    break
                # Check `base`, not only `cls`: a mixin may override them.
                if not rounding.isdisjoint(vars(base)):
                    setattr(cls, description, getattr(Quantizer, description))
                    break

    def __init__(self, spec: QuantSpec) -> None:
        super().__init__()
        self.spec = spec
        self.axis = spec.axis

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize `x`: move the values to the grid; shape and dtype stay unchanged."""

    def quantize_shifted(self, x: Tensor, before: Tensor, after: Tensor | None) -> Tensor:
        """q(x + before) + after, with offsets over the trailing dimensions of `x`.

        Computed in float32; the result may have the dtype of `x`.
        """
        y = self(x.float() + before.float())
        if after is None:
            return y
        return y + after.float()

    @abstractmethod
    def codes(self, x: Tensor) -> Tensor:
        """Integer codes of `x`, in the shape of `x`."""

    def grid(self, x: Tensor | None = None) -> Grid | None:
        """Codes and the values that they stand for.

        Args:
            x: the tensor to quantize; quantizers that compute their step sizes in every forward
                need it.

        Returns:
            The grid. None if the quantizer has no codes or does not describe them, or, for some
            quantizers, if `x` is None.
        """
        return None

    def fused_params(self) -> LSQParams | WeightParams | None:
        """Parameters with which one autograd Function computes the quantizer and a matrix product.

        Returns:
            The parameters. None if the quantizer cannot be fused; it then runs before the product.
        """
        return None

    @property
    def is_float(self) -> bool:
        """True for the identity."""
        return self.spec.bits == FLOAT_BITS

    def allocate(self, shape: torch.Size, device: torch.device) -> None:
        """Choose the axis of the scales for inputs of `shape` (any batch size).

        Subclasses that store scales also create them here, filled with NaN.

        There is one scale for the tensor if a negative axis selects the batch dimension, because a
        scale per image of a batch would be meaningless, or if `shape` is too short for the axis. A
        feature map of more than three dimensions also has one scale if `map_scales` is "tensor".
        """
        axis = self.spec.axis
        is_batch_axis = axis is not None and axis < 0 and axis + len(shape) <= 0
        may_be_map = self.spec.role in {"input", "output", "residual"}  # scores are (B, h, N, M)
        is_feature_map = may_be_map and len(shape) > 3
        if is_batch_axis or (is_feature_map and self.spec.map_scales == "tensor"):
            self.axis = None

    def share_scale(self) -> None:
        """Use one scale, for a tensor whose size along the axis varies. `allocate` must follow."""
        self.axis = None

    def calibrate(self, x: Tensor, state: dict[str, Any]) -> None:
        """Add a batch to `state` and set the scales, if any, from all batches in `state`."""

    @torch.no_grad()
    def set_scale(self, values: Tensor) -> None:
        """Replace the stored scales; `values` has the shape of `scale`."""
        self.scale.copy_(values)  # type: ignore[operator]

    def stored_weight(self) -> Tensor | None:
        """The quantized weight. Returns None unless it is stored in place of a float weight."""
        return None

    @property
    def num_stored_scales(self) -> int:
        """Number of scales that are stored with the net, not computed in each forward."""
        scale = getattr(self, "scale", None)
        if scale is None:
            return 0
        return scale.numel()

    def num_scales(self, shape: torch.Size) -> int:
        """Number of scales of a tensor of `shape`: the size along the axis, or 1 without one."""
        if self.axis is None or self.axis < -len(shape):
            return 1
        return shape[self.axis]

    def nan_tensor(self, shape: torch.Size, device: torch.device) -> Tensor:
        """A tensor (n,) of NaNs, n = `num_scales(shape)`."""
        return torch.full((self.num_scales(shape),), torch.nan, device=device)

    def extra_repr(self) -> str:
        """The spec as text, with the axis that is in use."""
        spec = self.spec
        sign = {True: "signed", False: "unsigned", None: "sign from data"}[spec.signed]
        return f"{spec.quantizer}, bits={spec.bits}, {sign}, axis={self.axis}, role={spec.role}"


class Float(Quantizer):
    """The identity, so that callers treat float tensors like quantized ones."""

    def forward(self, x: Tensor) -> Tensor:
        """`x` itself."""
        return x

    def codes(self, x: Tensor) -> Tensor:
        """Raise an error: a float tensor has no codes.

        Raises:
            TypeError: always.
        """
        raise TypeError(f"the float quantizer of role {self.spec.role!r} has no integer codes")
