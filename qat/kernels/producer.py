"""Operations that often precede an activation quantizer, with their backward passes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# Torch's names of the approximations, by `Producer.kind`.
GELU_APPROXIMATIONS = {"gelu": "none", "gelu_tanh": "tanh"}


class Producer(NamedTuple):
    """The operation that computed the input of a quantizer from another tensor x.

    Attributes:
        kind: `norm` = LayerNorm over the last dimension; `gelu` = GELU; `gelu_tanh` = GELU with
            torch's `tanh` approximation; `scores` = softmax over the last dimension in float32;
            `softmax` = x is the result of a softmax, and gradients are with respect to the scores;
            empty = no operation, so the quantizer's input is x itself.
        eps: eps of a LayerNorm.
        factor: for both kinds of softmax, the factor by which the scores were multiplied before the
            softmax; gradients are with respect to the unscaled scores.
    """

    kind: str = ""
    eps: float = 0.0
    factor: float = 1.0

    @property
    def needs_recompute(self) -> bool:
        """True if the input of the quantizer must be computed from x."""
        return self.kind not in {"", "softmax"}

    def forward(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, ...]:
        """The quantizer's input, followed by tensors for `backward`.

        The quantizer's input is bit-identical to the result of torch's operation.
        """
        if self.kind == "norm":
            return torch.native_layer_norm(x, x.shape[-1:], weight, bias, self.eps)
        if self.kind == "scores":
            probs = x.softmax(-1, dtype=torch.float32)
            return probs, probs
        if self.kind in GELU_APPROXIMATIONS:
            return (F.gelu(x, approximate=GELU_APPROXIMATIONS[self.kind]),)
        return (x,)

    def backward(
        self, grad: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, *saved: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Gradients of x (for a softmax, of the unscaled scores), and of weight and bias or None.

        Args:
            grad: gradient of the quantizer's input, for a LayerNorm or GELU in the dtype of `x`;
                may be overwritten.
            x: the input of `forward`.
            weight: weight of the LayerNorm, or None.
            bias: bias of the LayerNorm, or None.
            saved: the results of `forward` after the first one.
        """
        if self.kind == "norm":
            needs_grad = [True, weight is not None, bias is not None]
            return torch.ops.aten.native_layer_norm_backward(
                grad, x, x.shape[-1:], *saved, weight, bias, needs_grad
            )
        if self.kind in GELU_APPROXIMATIONS:
            grad_x = torch.ops.aten.gelu_backward.grad_input(
                grad, x, approximate=GELU_APPROXIMATIONS[self.kind], grad_input=grad
            )
            return grad_x, None, None
        if not self.kind:
            return grad, None, None
        probs = saved[0] if saved else x
        grad_scores = (grad - (grad * probs).sum(-1, keepdim=True)) * probs * self.factor
        return grad_scores, None, None
