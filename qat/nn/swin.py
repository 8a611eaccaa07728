"""Quantized Swin: window attention, and MLPs that see their input as a map. Source: OFQ, arXiv 2302.02210.

Padding and the cyclic shift come before the attention, in timm's block; scales are per position inside a window.
"""

from __future__ import annotations

import timm.layers as timm_layers
from timm.models.swin_transformer import SwinTransformerBlock, WindowAttention
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from torch import Tensor

from qat.kernels.fused import can_fuse, unflattened
from qat.nn.attention import (
    QkrAttention,
    QuantAttention,
    RelativeBias,
    add_window_mask,
    register_attention,
)
from qat.nn.linear import hint_mlp
from qat.nn.quant_module import shallow_cast
from qat.nn.swap_registry import Swap, SwapContext, register_swap


class QuantWindowAttention(RelativeBias, QuantAttention):
    """Standard window attention."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map (B*windows, N, C) to the same shape; the mask (windows, N, N) is that of a cyclic shift."""
        qkv = self.qkv(x)
        out = self.fused(qkv, self.scale, self.position_bias(), mask)
        if out is not None:
            return self.project(out, x)
        q, k, v = qkv.chunk(3, dim=-1)
        scores = self.scores(*self.heads(q, k)) * self.scale
        return self.attend(add_window_mask(scores + self.position_bias(), mask), v, x)


class QkrWindowAttention(RelativeBias, QkrAttention):
    """Query-key reparameterization inside each window."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map (B*windows, N, C) to the same shape; the mask (windows, N, N) is that of a cyclic shift."""
        out = self.fused(x, self.scale, self.position_bias(), mask)
        if out is not None:
            return self.project(out, x)
        xq = self.input_quantizer(x)
        scores = self.scores(xq) * self.scale + self.position_bias()
        return self.attend(add_window_mask(scores, mask), self.v(xq), x)

    def timm_weights(self) -> dict[str, Tensor]:
        """The base's tensors and the table."""
        return super().timm_weights() | {
            "relative_position_bias_table": self.relative_position_bias_table.detach()
        }


class MapMlp(timm_layers.Mlp):
    """timm's `Mlp` on the tokens of a map, seen as the map they are: (B, H*W, C) is worked on as (B, H, W, C); made by `shallow_cast`.

    Attributes:
        columns: W, or 0 = one row of any length, where nothing depends on the shape of the map.
    """

    columns: int

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H*W, C) to (B, H*W, C_out)."""
        grid = (-1, self.columns) if self.columns else (1, -1)
        seen = unflattened(x, 1, grid) if can_fuse(x) else x.unflatten(1, grid)
        return super().forward(seen).flatten(1, 2)


register_swap(MapMlp, "linear")(hint_mlp)


register_attention(WindowAttention, QuantWindowAttention, QkrWindowAttention)


@register_swap(SwinTransformerBlock, "linear")
@register_swap(SwinTransformerV2Block, "linear")
def see_map(module: SwinTransformerBlock | SwinTransformerV2Block, context: SwapContext) -> Swap:
    """The block stays; its `mlp`, to which timm hands a flattened map, learns the map's shape."""
    mlp = shallow_cast(MapMlp, module.mlp)
    mlp.columns = (
        timm_layers.to_2tuple(module.input_resolution)[1]
        if context.recipe.map_scales == "column"
        else 0
    )
    return Swap(module, children={"mlp": mlp})
