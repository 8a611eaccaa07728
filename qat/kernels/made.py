"""What quantizers of activations often have before them, with its backward pass."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Made(NamedTuple):
    """How the input of a quantizer was made of another tensor.

    Attributes:
        kind: `norm` = LayerNorm over the last dimension of x, `none` or `tanh` = GELU of x with this approximation, `scores` = softmax of
            x over it in float32, `softmax` = x itself, which is one, with gradients of what it was made of; empty = x itself.
        number: eps of the LayerNorm; what scores are multiplied by before the softmax.
    """

    kind: str = ""
    number: float = 0.0

    @property
    def is_other(self) -> bool:
        """Whether the input is another tensor than x."""
        return self.kind not in {"", "softmax"}

    def forward(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, ...]:
        """What is quantized, the bits of torch's modules, and what `backward` wants of it."""
        if self.kind == "norm":
            return torch.native_layer_norm(x, x.shape[-1:], weight, bias, self.number)
        if self.kind == "scores":
            return (x.softmax(-1, dtype=torch.float32),) * 2
        return (F.gelu(x, approximate=self.kind) if self.is_other else x,)

    def backward(
        self, grad: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, *kept: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Gradients of x, or scores, of weight and bias from that of what was made, which may be written to; it has the dtype of x."""
        if self.kind == "norm":
            wanted = [True, weight is not None, bias is not None]
            return torch.ops.aten.native_layer_norm_backward(
                grad, x, x.shape[-1:], *kept, weight, bias, wanted
            )
        if self.kind in {"none", "tanh"}:
            return (
                torch.ops.aten.gelu_backward.grad_input(
                    grad, x, approximate=self.kind, grad_input=grad
                ),
                None,
                None,
            )
        probs = kept[0] if kept else x
        return (
            (grad - (grad * probs).sum(-1, keepdim=True)) * probs * self.number
            if self.kind
            else grad,
            None,
            None,
        )
