"""Quantized Swin: window attention, and MLPs whose input is a feature map.

timm's block pads and shifts the map before the attention, so scales per token belong to positions
inside a window. Source: OFQ, arXiv 2302.02210.
"""

from __future__ import annotations

import timm.layers as timm_layers
from timm.models.swin_transformer import SwinTransformerBlock, WindowAttention
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from torch import Tensor

from qat.kernels.fused import can_fuse, unflattened
from qat.nn.attention import QuantAttention
from qat.nn.attention_swaps import register_attention
from qat.nn.linear import swap_mlp
from qat.nn.qkr_attention import QkrAttention
from qat.nn.quant_module import shallow_cast
from qat.nn.score_terms import RelativeBias, add_window_mask
from qat.nn.swap_registry import Swap, SwapContext, register_swap


class QuantWindowAttention(RelativeBias, QuantAttention):
    """Quantized window attention without query-key reparameterization (`attention=standard`)."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map (B*windows, N, C) to the same shape; see `add_window_mask` for the mask."""
        qkv = self.qkv(x)
        out = self.compute_fused(qkv, self.scale, self.position_bias(), mask)
        if out is None:
            q, k, v = qkv.chunk(3, dim=-1)
            scores = self.scores(*self.to_heads(q, k)) * self.scale + self.position_bias()
            out = self.weigh_values(add_window_mask(scores, mask), v)
        return self.project(out, x)


class QkrWindowAttention(RelativeBias, QkrAttention):
    """Quantized window attention with query-key reparameterization (`attention=qkr`)."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map (B*windows, N, C) to the same shape; see `add_window_mask` for the mask."""
        out = self.compute_fused(x, self.scale, self.position_bias(), mask)
        if out is None:
            x_q = self.input_quantizer(x)
            scores = self.scores(x_q) * self.scale + self.position_bias()
            out = self.weigh_values(add_window_mask(scores, mask), self.v(x_q))
        return self.project(out, x)

    def timm_weights(self) -> dict[str, Tensor]:
        """Tensors of the base class, and the table of biases."""
        table = self.relative_position_bias_table.detach()
        return super().timm_weights() | {"relative_position_bias_table": table}


class MapMlp(timm_layers.Mlp):
    """timm's `Mlp` on tokens (B, H*W, C) viewed as a map (B, H, W, C); made by `shallow_cast`.

    Attributes:
        columns: W; 0 = view the tokens as one row, because no scale depends on the column.
    """

    columns: int

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H*W, C) to (B, H*W, C_out)."""
        map_size = (-1, self.columns) if self.columns else (1, -1)
        x_map = unflattened(x, 1, map_size) if can_fuse(x) else x.unflatten(1, map_size)
        return super().forward(x_map).flatten(1, 2)


register_swap(MapMlp, "linear")(swap_mlp)


register_attention(WindowAttention, QuantWindowAttention, QkrWindowAttention)


@register_swap(SwinTransformerBlock, "linear")
@register_swap(SwinTransformerV2Block, "linear")
def swap_block(module: SwinTransformerBlock | SwinTransformerV2Block, context: SwapContext) -> Swap:
    """Keep the block, but let `mlp` view its flat tokens as a feature map; see `MapMlp`."""
    mlp = shallow_cast(MapMlp, module.mlp)
    mlp.columns = 0
    if context.recipe.map_scales == "column":
        _, mlp.columns = timm_layers.to_2tuple(module.input_resolution)
    return Swap(module, children={"mlp": mlp})
