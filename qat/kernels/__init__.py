"""LSQ and StatsQ in the form that is fastest where the tensors are: what quantizers call.

A few lines of C++ on a CPU, Triton on CUDA, and for everything else and under `torch.compile`, which fuses them itself, the plain tensor
operations of `qat.functional`. All forms give the same bits forward; sums in gradients differ by rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qat.errors import UsageError
from qat.functional.lsq import CodeRange, LSQFunction, LsqGradients, all_gradients
from qat.functional.statsq import StatsQFunction
from qat.functional.ste import in_dtype
from qat.kernels import cpu, gpu, reference
from qat.kernels.rows import PLAIN

CHOICES = ("auto", "triton", "off")
_choice = "auto"


def use(choice: str) -> None:
    """Choose kernels for this process: `auto`, `triton` = auto, but those of CUDA or an error, `off` = plain tensor operations.

    Raises:
        UsageError: an unknown choice, or Triton is not there.
    """
    global _choice  # noqa: PLW0603  (like torch's number of threads)
    if choice not in CHOICES:
        raise UsageError(f"kernels={choice!r}: must be one of {', '.join(CHOICES)}")
    if choice == "triton" and not gpu.available():
        raise UsageError("kernels='triton': Triton or CUDA is not there; here it must be one of auto, off")
    _choice = choice


def _backend(x: Tensor) -> str:
    if _choice == "off" or torch.compiler.is_compiling():
        return "reference"
    # What stands for a tensor, as under `FakeTensorMode`, is not asked whether kernels run: the answer is kept.
    if type(x) not in PLAIN:
        return "reference"
    if x.is_cuda and (_choice == "triton" or gpu.available()):
        return "gpu"
    return "cpu" if x.device.type == "cpu" else "reference"


def lsq_forward(  # noqa: PLR0913  (a quantizer, and what is wanted of it)
    x: Tensor,
    scale: Tensor,
    before: Tensor | None,
    after: Tensor | None,
    codes: CodeRange,
    *,
    sign: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`reference.lsq_forward`, rounded to `dtype`."""
    backend, found = _backend(x), None
    if backend == "cpu":
        found = cpu.lsq_forward(x.float(), scale, before, after, codes, sign)
    elif backend == "gpu":
        found = gpu.lsq_forward(x, scale, before, after, codes, sign=sign, dtype=dtype)
    return in_dtype(reference.lsq_forward(x, scale, before, after, codes, sign=sign) if found is None else found, dtype)


def lsq_backward(  # noqa: PLR0913, PLR0917  (what else comes out of the one pass over memory is up to the caller)
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    before: Tensor | None,
    codes: CodeRange,
    *,
    sign: Tensor | None = None,
    after_shape: torch.Size | None = None,
    out: Tensor | None = None,
    dequantized: torch.dtype | None = None,
    after: Tensor | None = None,
) -> LsqGradients:
    """Gradients of `lsq_forward`.

    Args:
        grad: gradient of its result.
        x: as in the forward pass.
        scale: as in the forward pass.
        before: as in the forward pass.
        codes: as in the forward pass.
        sign: as in the forward pass.
        after_shape: the shape of the offset after it, if its gradient is wanted.
        out: takes the gradient of `x`; may be `grad`. None = new, in the dtype of `x`.
        dequantized: the dtype in which to give the result of `lsq_forward` as well; None = not.
        after: the offset after it; only for `dequantized`.
    """
    backend = _backend(x)
    if backend == "cpu":
        place = torch.empty(x.shape, dtype=torch.float32, device="cpu") if out is None or out.dtype != torch.float32 else out
        wanted = cpu.Wanted(before is not None, after_shape, dequantized is not None, after)
        extras = cpu.lsq_backward(grad.float(), x.float(), scale, before, codes, sign, place, wanted)
        if extras is not None:
            of_scale, of_before, of_after, made = extras
            of_before = of_before if before is None or of_before is None else of_before.view(before.shape)
            of_after = of_after if after_shape is None or of_after is None else of_after.view(after_shape)
            of_x = place.to(x.dtype) if out is None else place if place is out else out.copy_(place)
            return LsqGradients(of_x, of_scale, of_before, of_after, made if made is None else made.to(dequantized))
    elif backend == "gpu":
        found = gpu.lsq_backward(
            grad, x, scale, before, codes, sign=sign, after_shape=after_shape, out=out, dequantized=dequantized, after=after
        )
        if found is not None:
            return found
    gradients = reference.lsq_backward(grad, x, scale, before, codes, sign=sign, after_shape=after_shape)
    gradients = gradients._replace(x=gradients.x.to(x.dtype) if out is None else out.copy_(gradients.x))
    if dequantized is None:
        return gradients
    return gradients._replace(dequantized=lsq_forward(x, scale, before, after, codes, sign=sign, dtype=dequantized))


def statsq_forward(w: Tensor, scale: Tensor, bits: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """`reference.statsq_forward`, rounded to `dtype`."""
    backend, found = _backend(w), None
    if backend == "cpu":
        found = cpu.statsq_forward(w.float(), scale, bits)
    elif backend == "gpu":
        found = gpu.statsq_forward(w, scale, bits, dtype)
    return in_dtype(reference.statsq_forward(w, scale, bits) if found is None else found, dtype)


def probs_backward(  # noqa: PLR0913  (as above)
    grad: Tensor,
    probs: Tensor,
    scale: Tensor,
    codes: CodeRange,
    factor: float,
    *,
    out: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.probs_backward`, and the quantized probabilities in `dtype`.

    `out` takes the gradient of the scores and may be `grad`; None = new, float32.
    """
    backend = _backend(probs)
    out = torch.empty(probs.shape, dtype=torch.float32, device=probs.device) if out is None else out
    if backend == "cpu":
        place = out if out.dtype == torch.float32 else torch.empty(probs.shape, dtype=torch.float32, device="cpu")
        extras = cpu.probs_backward(grad.float(), probs.float(), scale, codes, factor, place)
        if extras is not None:
            return place if place is out else out.copy_(place), extras[0], extras[1].to(dtype)
    elif backend == "gpu":
        found = gpu.probs_backward(grad, probs, scale, codes, factor, out, dtype)
        if found is not None:
            return found
    grad_scores, of_scale = reference.probs_backward(grad, probs, scale, codes, factor)
    dequantized = lsq_forward(probs, scale, None, None, codes, dtype=dtype)
    return out.copy_(grad_scores), of_scale, dequantized


class _LSQ(LSQFunction):
    @staticmethod
    def forward(
        x: Tensor, scale: Tensor, before: Tensor | None, after: Tensor | None, sign: Tensor | None, codes: CodeRange, grad_factor: float
    ) -> Tensor:
        return lsq_forward(x, scale, before, after, codes, sign=sign, dtype=x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # What is differentiated once more has to be made of operations that autograd knows.
        plain = torch.is_grad_enabled() or torch.compiler.is_compiling()
        return all_gradients(ctx, grad, reference.lsq_backward if plain else lsq_backward)


def lsq(  # noqa: PLR0913  (what `qat.functional.lsq` takes)
    x: Tensor,
    scale: Tensor,
    codes: CodeRange,
    *,
    grad_factor: float = 1.0,
    before: Tensor | None = None,
    after: Tensor | None = None,
    sign: Tensor | None = None,
) -> Tensor:
    """`qat.functional.lsq`."""
    return _LSQ.apply(x, scale, before, after, sign, codes, grad_factor)


class _StatsQ(StatsQFunction):
    @staticmethod
    def forward(w: Tensor, scale: Tensor, bits: int) -> Tensor:
        return statsq_forward(w, scale, bits, w.dtype)


def statsq(w: Tensor, scale: Tensor, bits: int) -> Tensor:
    """`qat.functional.statsq_with_scale`."""
    return _StatsQ.apply(w, scale, bits)


__all__ = [
    "CHOICES",
    "CodeRange",
    "LsqGradients",
    "lsq",
    "lsq_backward",
    "lsq_forward",
    "probs_backward",
    "statsq",
    "statsq_forward",
    "use",
]
