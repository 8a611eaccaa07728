"""LSQ as a module. Papers: arXiv 1902.08153 (LSQ), 2302.02210 (OFQ's granularities). Deviations: docs/deviations.md#lsq."""

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
    least_unit,
    lsq_codes,
    lsq_init_scale,
    mse_init_scale,
)
from qat.kernels import LSQParams
from qat.quantizers.grid import UniformGrid
from qat.quantizers.quantizer import Quantizer
from qat.quantizers.registry import register
from qat.spec import QuantSpec


@register("lsq")
def build_lsq(spec: QuantSpec) -> Quantizer:
    """LSQ, or `AutoSignLSQ` where the sign is found from the data."""
    return LSQ(spec) if spec.signed is not None else AutoSignLSQ(spec)


# From so many values on, which no cache holds, one pass over them is faster than one for each operation.
MANY_VALUES = 2**20


def _on_grid(x: Tensor, scale: Tensor, codes: CodeRange) -> Tensor:
    return kernels.lsq(x, LSQParams(scale, None, None, None, codes, 1.0))


def fast_form(x: Tensor) -> Quantize | None:
    """How the search of a step quantizes `x`; None = by the formula."""
    return _on_grid if x.device.type == "cpu" and x.numel() >= MANY_VALUES else None


def running_mean(state: dict[str, Any], value: Tensor) -> Tensor:
    """Mean of the values handed in so far; `state` remembers it under `mean` and their number under `n`."""
    state["n"] = state.get("n", 0) + 1
    state["mean"] = (
        value if state["n"] == 1 else state["mean"] + (value - state["mean"]) / state["n"]
    )
    return state["mean"]


class LSQ(Quantizer):
    """Learned step size, absolute or relative to its start (`spec.steps`).

    Attributes:
        scale: step size in force, (n,) with one per slice along the axis, in the unit of the input; NaN until initialised. A parameter
            where steps are absolute.
        start: s0, where a relative step began, (n,); None where steps are absolute.
        change: t of `qat.functional.relative_step`, (n,), which is what is learned of a relative step; None where steps are absolute.
        unit: u of it: 0 for weights, which are there from the beginning.
        grad_factor: factor on the gradient of `scale`. A trainer sets 1/sqrt(world size x accumulation) on activations, so that
            LSQ's 1/sqrt(qmax * m) counts the elements of the global batch (docs/deviations.md#lsq).
    """

    def __init__(self, spec: QuantSpec) -> None:
        super().__init__(spec)
        self.grad_factor = 1.0
        self._parameters["scale"] = (
            None  # where the property finds it; `register_parameter` refuses names that a class has
        )
        self.start: Tensor
        self.register_buffer("start", None)
        self.register_parameter("change", None)
        self.unit = 0.0 if spec.role in {"weight", "qk"} else least_unit(spec.qmax)

    @property
    def scale(self) -> Tensor:
        """See above; a relative step stays above zero whatever an optimizer does, and changes in proportion to its size."""
        if self.change is None:
            return self._parameters["scale"]
        return kernels.relative_step(self.start, self.change, self.unit)

    def allocate(self, shape: torch.Size, device: torch.device) -> None:
        """One NaN step per slice along the axis."""
        super().allocate(shape, device)
        steps = self.nan_tensor(shape, device)
        if self.spec.steps == "relative":
            self.start, self.change = steps, nn.Parameter(torch.zeros_like(steps))
        else:
            self.register_parameter("scale", nn.Parameter(steps))

    @torch.no_grad()
    def set_scale(self, values: Tensor) -> None:
        """Put steps (n,) in force, from where a relative one begins anew; that of an activation is a 64th of `unit` at least."""
        if self.change is None:
            super().set_scale(values)
        else:
            self.start.copy_(values.clamp(min=max(self.unit / 64, 2 * SCALE_FLOOR)))
            self.change.zero_()

    def calibrate(self, x: Tensor, state: dict[str, Any]) -> None:
        """Step = `initial_scale`, averaged over the batches in `state`."""
        self.set_scale(running_mean(state, self.initial_scale(x, self.spec.qmin, self.spec.qmax)))

    def initial_scale(self, x: Tensor, qmin: int, qmax: int) -> Tensor:
        """Where learning begins with codes in [qmin, qmax], by the rule of the spec: (n,), in the unit of `x`."""
        if self.spec.step_init == "lsq":
            return lsq_init_scale(x, qmin, qmax, self.axis)
        return mse_init_scale(x, qmin, qmax, self.axis, fast_form(x))

    @property
    def code_range(self) -> CodeRange:
        """Codes and axis; of as many codes from 0 up where `sign` says so."""
        return CodeRange(self.spec.qmin, self.spec.qmax, self.axis)

    @property
    def sign(self) -> Tensor | None:
        """None = the grid has the sign that the spec names; else one number, above 0 for a signed grid."""
        return None

    def forward(self, x: Tensor) -> Tensor:
        """`qat.functional.lsq` on the learned step."""
        return kernels.lsq(x, self._params())

    def shifted(self, x: Tensor, before: Tensor, after: Tensor | None) -> Tensor:
        """`qat.functional.lsq` between two offsets, of which only the input is kept for backward."""
        if type(self).forward is not LSQ.forward:
            return super().shifted(x, before, after)
        return kernels.lsq(x, self._params()._replace(before=before, after=after))

    def operand(self) -> LSQParams | None:
        """Step and codes, where these do not depend on a sign."""
        found = self._params()
        return None if found.scale is None or found.sign is not None else found

    def _params(self) -> LSQParams:
        return LSQParams(self.scale, None, None, self.sign, self.code_range, self.grad_factor)

    def codes(self, x: Tensor) -> Tensor:
        """`lsq_codes` on the learned step."""
        return lsq_codes(x, self.scale, self.spec.qmin, self.spec.qmax, self.axis)

    def grid(self, x: Tensor | None = None) -> UniformGrid:
        """Through zero, on the learned step."""
        return self._grid(self.spec.qmin, self.spec.qmax)

    def _grid(self, qmin: int, qmax: int) -> UniformGrid:
        return UniformGrid(
            qmin=qmin,
            qmax=qmax,
            step=self.scale.detach().float().clamp(min=SCALE_FLOOR),
            axis=self.axis,
        )


class AutoSignLSQ(LSQ):
    """LSQ for images: signed or unsigned as the calibration data are.

    Attributes:
        signed: 1.0 or 0.0, NaN until initialised. A buffer and not a Python flag: it is in every checkpoint, and a forward
            reads it without waiting for the device.
    """

    # The reference calls an image signed once a value is below this.
    NEGATIVE = -1e-5

    def __init__(self, spec: QuantSpec) -> None:
        super().__init__(spec)
        self.bounds = {signed: code_range(spec.bits, signed=signed) for signed in (True, False)}
        self.signed: Tensor
        self.register_buffer("signed", torch.tensor(torch.nan))

    def allocate(self, shape: torch.Size, device: torch.device) -> None:
        """One NaN step per slice along the axis; the sign goes to the same device."""
        super().allocate(shape, device)
        self.signed = self.signed.to(device)

    def calibrate(self, x: Tensor, state: dict[str, Any]) -> None:
        """Sign from the smallest value seen; LSQ's step from factor 2 whatever the sign (the reference's rule for images)."""
        lowest = torch.minimum(
            x.detach().amin().float(), state.get("lowest", torch.tensor(torch.inf, device=x.device))
        )
        state["lowest"] = lowest
        signed = bool(lowest < self.NEGATIVE)
        self.set_scale(self._step(x, state)[signed])
        self.signed.fill_(float(signed))

    def _step(self, x: Tensor, state: dict[str, Any]) -> dict[bool, Tensor]:
        """The step so far for either sign, as a later batch may need the other."""
        if self.spec.step_init == "lsq":
            # With bounds -1 and 1 this is twice the mean magnitude.
            twice_mean_abs = running_mean(state, lsq_init_scale(x, -1, 1, self.axis))
            return {signed: twice_mean_abs / qmax**0.5 for signed, (_, qmax) in self.bounds.items()}
        return {
            signed: running_mean(
                state.setdefault(f"signed={signed}", {}), self.initial_scale(x, *bounds)
            )
            for signed, bounds in self.bounds.items()
        }

    @property
    def code_range(self) -> CodeRange:
        """The signed codes."""
        return CodeRange(*self.bounds[True], self.axis)

    @property
    def sign(self) -> Tensor:
        """`signed`."""
        return self.signed

    def codes(self, x: Tensor) -> Tensor:
        """Codes with the bounds of the sign that was found, int16."""
        signed, unsigned = (
            lsq_codes(x, self.scale, *self.bounds[s], self.axis).to(torch.int16)
            for s in (True, False)
        )
        return torch.where(self.signed > 0, signed, unsigned)

    def grid(self, x: Tensor | None = None) -> UniformGrid:
        """With the bounds of the sign that was found."""
        return self._grid(*self.bounds[bool(self.signed > 0)])
