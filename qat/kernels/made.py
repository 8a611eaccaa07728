"""What quantizers of activations often have before them, with its backward pass."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Made(NamedTuple):
    """How the input of a quantizer was made of another tensor x.

    Attributes:
        kind: `norm` = LayerNorm over the last dimension, `none` or `tanh` = GELU with this approximation, empty = it is x itself.
        eps: of the LayerNorm.
    """

    kind: str = ""
    eps: float = 0.0

    def forward(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, ...]:
        """What is quantized, the bits of torch's modules, and what `backward` wants of it."""
        if self.kind == "norm":
            return torch.native_layer_norm(x, x.shape[-1:], weight, bias, self.eps)
        return (F.gelu(x, approximate=self.kind) if self.kind else x,)

    def backward(
        self, grad: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, *kept: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Gradients of x, weight and bias from that of what was made, which may be written to; it has the dtype of x."""
        if self.kind == "norm":
            wanted = [True, weight is not None, bias is not None]
            return torch.ops.aten.native_layer_norm_backward(grad, x, x.shape[-1:], *kept, weight, bias, wanted)
        return torch.ops.aten.gelu_backward.grad_input(grad, x, approximate=self.kind, grad_input=grad), None, None
