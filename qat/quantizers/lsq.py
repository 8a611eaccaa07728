"""LSQ, the quantizer with learned step sizes, as a module.

Papers: arXiv 1902.08153 (LSQ), 2302.02210 (OFQ, for the dimensions along which step sizes differ).
Deviations: docs/deviations.md#lsq.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qat import kernels
from qat.functional.affine import code_range
from qat.functional.lsq import (
    SCALE_FLOOR,
    CodeRange,
    Quantize,
    lsq_codes,
    lsq_init_scale,
    min_reliable_step,
    mse_init_scale,
)
from qat.kernels import LSQParams
from qat.quantizers.grid import UniformGrid
from qat.quantizers.quantizer import Quantizer
from qat.quantizers.registry import register
from qat.spec import QuantSpec


@register("lsq")
def build_lsq(spec: QuantSpec) -> Quantizer:
    """Build `LSQ`, or `AutoSignLSQ` if the sign is found from data."""
    if spec.signed is None:
        return AutoSignLSQ(spec)
    return LSQ(spec)


# Minimum number of values for which the search for a step size uses a kernel. Such a tensor does
# not fit in a cache, so one pass over the tensor is faster than one pass for each operation.
MIN_KERNEL_VALUES = 2**20


def _fake_quantize(x: Tensor, scale: Tensor, codes: CodeRange) -> Tensor:
    return kernels.lsq(x, LSQParams(scale, None, None, None, codes, 1.0))


def search_kernel(x: Tensor) -> Quantize | None:
    """A kernel with which the search for a step size may quantize `x`.

    Returns None for small tensors and for devices other than a CPU. The search then uses the
    reference implementation.
    """
    if x.device.type == "cpu" and x.numel() >= MIN_KERNEL_VALUES:
        return _fake_quantize
    return None


def running_mean(state: dict[str, Any], value: Tensor) -> Tensor:
    """The mean of `value` and earlier calls' values; updates the mean and the count in `state`."""
    count = state.get("n", 0) + 1
    mean = value if count == 1 else state["mean"] + (value - state["mean"]) / count
    state["n"] = count
    state["mean"] = mean
    return mean


class LSQ(Quantizer):
    """Quantizer with a learned step size, absolute or relative to its initial value (`spec.steps`).

    Attributes:
        scale: step size, (n,), one per slice along the axis (n = 1 without an axis), in the unit of
            the input; NaN until initialized. A parameter if step sizes are absolute, else computed
            from `start` and `change`.
        start: s0 of `qat.functional.relative_step`, (n,), the initial step size; None if step sizes
            are absolute.
        change: t of `relative_step`, (n,), the learned parameter; None if step sizes are absolute.
        min_reliable: u of `relative_step`: an initial step size below it says little about the one
            that is needed. 0 for weights, because all their values are known before training.
        grad_factor: factor on the gradient of `scale`. For activations, a trainer may set
            1/sqrt(world size x accumulated batches): LSQ's 1/sqrt(qmax * m) then counts the
            elements of the global batch (docs/deviations.md#lsq).
    """

    def __init__(self, spec: QuantSpec) -> None:
        super().__init__(spec)
        self.grad_factor = 1.0
        # `register_parameter` can fail for a new name that is also a property of the class.
        self._parameters["scale"] = None
        # s0 and t of `relative_step`, under the names that checkpoints store.
        self.start: Tensor
        self.register_buffer("start", None)
        self.register_parameter("change", None)
        self.min_reliable = 0.0 if spec.role in {"weight", "qk"} else min_reliable_step(spec.qmax)

    @property
    def scale(self) -> Tensor:
        """Step size, None before `allocate`. A relative step size stays positive."""
        if self.change is None:
            return self._parameters["scale"]
        return kernels.relative_step(self.start, self.change, self.min_reliable)

    def allocate(self, shape: torch.Size, device: torch.device) -> None:
        """Create the step sizes, filled with NaN."""
        super().allocate(shape, device)
        unset_steps = self.nan_tensor(shape, device)
        if self.spec.steps == "relative":
            self.start = unset_steps
            self.change = nn.Parameter(torch.zeros_like(unset_steps))
        else:
            self.register_parameter("scale", nn.Parameter(unset_steps))

    @torch.no_grad()
    def set_scale(self, values: Tensor) -> None:
        """Set the step sizes to `values` (n,); relative step sizes start again from these values.

        The initial value of a relative step size is at least 1/64 of `min_reliable`, and at least
        twice the floor of step sizes.
        """
        if self.change is None:
            super().set_scale(values)
            return
        lowest = max(self.min_reliable / 64, 2 * self.code_range.floor)
        self.start.copy_(values.clamp(min=lowest))
        self.change.zero_()

    def calibrate(self, x: Tensor, state: dict[str, Any]) -> None:
        """Add a batch to `state`; set the step size to the mean `initial_scale` of all batches."""
        step = self.initial_scale(x, self.spec.qmin, self.spec.qmax)
        self.set_scale(running_mean(state, step))

    def initial_scale(self, x: Tensor, qmin: int, qmax: int) -> Tensor:
        """Initial step size (n,) for codes in [qmin, qmax], by the rule `spec.step_init`."""
        if self.spec.step_init == "lsq":
            return lsq_init_scale(x, qmin, qmax, self.axis)
        return mse_init_scale(x, qmin, qmax, self.axis, search_kernel(x))

    @property
    def code_range(self) -> CodeRange:
        """Range of codes of the spec, and the axis; a forward with a `sign` may use other codes."""
        return CodeRange(self.spec.qmin, self.spec.qmax, self.axis)

    @property
    def sign(self) -> Tensor | None:
        """One number, above 0 for a signed grid. Returns None if the spec fixes the sign."""
        return None

    def forward(self, x: Tensor) -> Tensor:
        """`qat.functional.lsq` of `x` with the learned step size."""
        return kernels.lsq(x, self._params())

    def quantize_shifted(self, x: Tensor, before: Tensor, after: Tensor | None) -> Tensor:
        """`qat.functional.lsq` with offsets; `x` is the only activation saved for backward.

        A subclass with another `forward` uses the implementation of `Quantizer` instead.
        """
        if type(self).forward is not LSQ.forward:
            return super().quantize_shifted(x, before, after)
        return kernels.lsq(x, self._params()._replace(before=before, after=after))

    def fused_params(self) -> LSQParams | None:
        """Step size and codes. Returns None before `allocate`, or if the codes depend on a sign."""
        params = self._params()
        if params.scale is None or params.sign is not None:
            return None
        return params

    def _params(self) -> LSQParams:
        return LSQParams(self.scale, None, None, self.sign, self.code_range, self.grad_factor)

    def codes(self, x: Tensor) -> Tensor:
        """`lsq_codes` with the learned step size."""
        return lsq_codes(x, self.scale, self.spec.qmin, self.spec.qmax, self.axis)

    def grid(self, x: Tensor | None = None) -> UniformGrid:
        """Multiples of the learned step size."""
        return self._grid(self.spec.qmin, self.spec.qmax)

    def _grid(self, qmin: int, qmax: int) -> UniformGrid:
        return UniformGrid(
            qmin=qmin,
            qmax=qmax,
            step=self.scale.detach().float().clamp(min=SCALE_FLOOR),
            axis=self.axis,
        )


class AutoSignLSQ(LSQ):
    """LSQ for images, with signed codes if the calibration data have values below `NEGATIVE`.

    Attributes:
        signed: 1.0 or 0.0, NaN until initialized. It is a buffer, so every checkpoint contains it,
            and a forward reads it without waiting for the device.
    """

    # Threshold of OFQ's code: codes are signed if an image has a value below it.
    NEGATIVE = -1e-5

    def __init__(self, spec: QuantSpec) -> None:
        super().__init__(spec)
        self.bounds_by_sign = {
            signed: code_range(spec.bits, signed=signed) for signed in (True, False)
        }
        self.signed: Tensor
        self.register_buffer("signed", torch.tensor(torch.nan))

    def allocate(self, shape: torch.Size, device: torch.device) -> None:
        """Create the step sizes, filled with NaN, and move the sign to the device."""
        super().allocate(shape, device)
        self.signed = self.signed.to(device)

    def calibrate(self, x: Tensor, state: dict[str, Any]) -> None:
        """Find the sign from the smallest value of all batches, and set the step size.

        With `step_init="lsq"`, the step size of a batch is 2 * mean|x| / sqrt(qmax) for either
        sign, as in OFQ's code for images.
        """
        lowest = x.detach().amin().float()
        if "lowest" in state:
            lowest = torch.minimum(lowest, state["lowest"])
        state["lowest"] = lowest
        signed = bool(lowest < self.NEGATIVE)
        self.set_scale(self._mean_steps(x, state)[signed])
        self.signed.fill_(float(signed))

    def _mean_steps(self, x: Tensor, state: dict[str, Any]) -> dict[bool, Tensor]:
        """The mean step size of all batches for each sign, as a later batch may change the sign."""
        steps = {}
        if self.spec.step_init == "lsq":
            # As in OFQ, the step size is 2 mean|x| / sqrt(qmax) for both signs; `lsq_init_scale`
            # would double it for unsigned codes. With bounds -1 and 1, it is 2 mean|x|.
            twice_mean_abs = running_mean(state, lsq_init_scale(x, -1, 1, self.axis))
            for signed, (_, qmax) in self.bounds_by_sign.items():
                steps[signed] = twice_mean_abs / qmax**0.5
            return steps
        for signed, bounds in self.bounds_by_sign.items():
            sign_state = state.setdefault(f"signed={signed}", {})
            steps[signed] = running_mean(sign_state, self.initial_scale(x, *bounds))
        return steps

    @property
    def code_range(self) -> CodeRange:
        """Range of the signed codes, and the axis.

        `CodeRange.bounds` switches to the unsigned codes unless `sign` is above 0.
        """
        return CodeRange(*self.bounds_by_sign[True], self.axis)

    @property
    def sign(self) -> Tensor:
        """The buffer `signed`."""
        return self.signed

    def codes(self, x: Tensor) -> Tensor:
        """Codes within the bounds of the calibrated sign, int16."""
        signed_codes = lsq_codes(x, self.scale, *self.bounds_by_sign[True], self.axis)
        unsigned_codes = lsq_codes(x, self.scale, *self.bounds_by_sign[False], self.axis)
        return torch.where(
            self.signed > 0, signed_codes.to(torch.int16), unsigned_codes.to(torch.int16)
        )

    def grid(self, x: Tensor | None = None) -> UniformGrid:
        """Multiples of the learned step size, within the bounds of the calibrated sign."""
        return self._grid(*self.bounds_by_sign[bool(self.signed > 0)])
