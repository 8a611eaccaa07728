"""Learnable offsets before and after any quantizer. Source: OFQ, arXiv 2302.02210."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from qat.kernels import LSQParams
from qat.quantizers.grid import Grid
from qat.quantizers.quantizer import Quantizer


class Shifted(Quantizer):
    """Quantizer q(x + a) + c with learned offsets, which fit the grid of q to the input.

    Attributes:
        quantizer: the quantizer q.
        offset_before: a, over the last `spec.offset_ndim` dimensions of the input, in the unit of
            the input; see `QuantRecipe.offset_init`. Flat, because timm exempts 1-D parameters from
            weight decay, even where nothing calls the `no_weight_decay` of the model.
        offset_after: c, like a; None if the spec has `offsets="before"`, as for keys, where it
            would not change the softmax.
        offset_shape: shape of the dimensions with offsets.
    """

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__(quantizer.spec)
        self.quantizer = quantizer
        self.in_blocks = quantizer.in_blocks
        self.register_parameter("offset_before", None)
        self.register_parameter("offset_after", None)

    def allocate(self, shape: torch.Size, device: torch.device) -> None:
        """Create offsets of zero, and the state of the inner quantizer."""
        self.quantizer.allocate(shape, device)
        self.axis = self.quantizer.axis
        self.offset_shape = shape[len(shape) - self.spec.offset_ndim :]
        size = self.offset_shape.numel()
        self.offset_before = nn.Parameter(torch.zeros(size, device=device))
        if self.spec.offsets == "both":
            self.offset_after = nn.Parameter(torch.zeros(size, device=device))

    @property
    def before(self) -> Tensor:
        """The offset a in the shape `offset_shape`."""
        return self.offset_before.view(self.offset_shape)

    @property
    def after(self) -> Tensor | None:
        """The offset c in the shape `offset_shape`, or None."""
        if self.offset_after is None:
            return None
        return self.offset_after.view(self.offset_shape)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Also load offsets that older checkpoints store as maps instead of vectors."""
        for name in ("offset_before", "offset_after"):
            offset = state_dict.get(prefix + name)
            if offset is not None:
                state_dict[prefix + name] = offset.flatten()
        super()._load_from_state_dict(state_dict, prefix, *args)

    def share_scale(self) -> None:
        """Use one scale for the inner quantizer."""
        self.quantizer.share_scale()
        self.axis = None

    def calibrate(self, x: Tensor, state: dict[str, Any]) -> None:
        """Calibrate the inner quantizer on the shifted input.

        With `offset_init="minimum"`, the first batch sets the offsets of unsigned codes.
        """
        is_first_batch = "quantizer" not in state
        if is_first_batch and self.spec.offset_init == "minimum" and self.spec.signed is False:
            self._shift_minimum_to_zero(x)
        inner_state = state.setdefault("quantizer", {})
        self.quantizer.calibrate(self._add_offset(x.detach(), self.before.detach()), inner_state)

    @torch.no_grad()
    def _shift_minimum_to_zero(self, x: Tensor) -> None:
        """Set the offsets so that the lowest value of `x`, if it is negative, becomes code 0."""
        minimum = x.float().min().clamp(max=0)
        self.offset_before.copy_(-minimum)
        if self.offset_after is not None:
            self.offset_after.copy_(minimum)

    def forward(self, x: Tensor) -> Tensor:
        """q(x + a) + c in float32, returned in the dtype of `x`."""
        return self.quantizer.quantize_shifted(x, self.before, self.after).to(x.dtype)

    def fused_params(self) -> LSQParams | None:
        """Parameters of the inner quantizer, with offsets.

        Returns None if the inner quantizer has no LSQ parameters for fusing, or if the offsets
        differ by position.
        """
        params = self.quantizer.fused_params()
        if not isinstance(params, LSQParams) or self.spec.offset_ndim != 1:
            return None
        return params._replace(before=self.offset_before, after=self.offset_after)

    def codes(self, x: Tensor) -> Tensor:
        """Codes of x + a."""
        return self.quantizer.codes(self._add_offset(x, self.before))

    def grid(self, x: Tensor | None = None) -> Grid | None:
        """Grid of the inner quantizer, if any, with the offsets."""
        if x is not None:
            x = self._add_offset(x, self.before)
        grid = self.quantizer.grid(x)
        if grid is None:
            return None
        return dataclasses.replace(
            grid,
            before=self._detached(self.before),
            after=self._detached(self.after),
        )

    @staticmethod
    def _detached(offset: Tensor | None) -> Tensor | None:
        """An offset in float32 without gradient."""
        if offset is None:
            return None
        return offset.detach().float()

    @staticmethod
    def _add_offset(x: Tensor, offset: Tensor) -> Tensor:
        """The sum x + a in float32, as in `forward`; half precision could change codes."""
        return x.float() + offset.float()

    @property
    def num_stored_scales(self) -> int:
        """Number of stored scales of the inner quantizer."""
        return self.quantizer.num_stored_scales

    def extra_repr(self) -> str:
        """The setting `offsets` as text; the inner quantizer prints its own settings."""
        return f"offsets={self.spec.offsets}"
