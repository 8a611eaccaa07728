"""Placement `fqvit` in Swin: window attention with its biases, both sums of a block, patch merging. Source: FQ-ViT, arXiv 2111.13824."""

from __future__ import annotations

from timm.models.swin_transformer import PatchMerging, SwinTransformerBlock, WindowAttention
from torch import Tensor, nn

from qat.nn.attention import add_window_mask
from qat.nn.fqvit import FqAttention
from qat.nn.quant_module import shallow_cast
from qat.nn.swap_registry import Swap, SwapContext, register_swap
from qat.nn.swin import _RelativeBias


class FqWindowAttention(FqAttention, _RelativeBias):
    """Window attention; the table of biases and the biased scores have quantizers of their own."""

    def __init__(self, attention: WindowAttention, context: SwapContext) -> None:
        super().__init__(attention, context)
        self.take_table(attention)
        self.table_quantizer = context.act("output")
        self.biased_quantizer = context.act("scores")

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map (B*windows, N, C) to the same shape; the mask (windows, N, N) is that of a cyclic shift."""
        q, k, v = self.quantized_qkv(x)
        scores = self.scores_quantizer(q @ k.transpose(-2, -1) * self.scale)
        biases = self.table_quantizer(self.relative_position_bias_table)[self.relative_position_index].permute(2, 0, 1)
        return self.attend(add_window_mask(self.biased_quantizer(scores + biases), mask), v, x)


class FqSwinBlock(SwinTransformerBlock):
    """Block with quantizers after its MLP and after both sums; made by `shallow_cast`."""

    residual1_quantizer: nn.Module
    mlp_quantizer: nn.Module
    residual2_quantizer: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) to the same shape."""
        x = self.residual1_quantizer(x + self.drop_path1(self._attn(self.norm1(x))))
        tokens = x.flatten(1, 2)
        out = self.residual2_quantizer(tokens + self.drop_path2(self.mlp_quantizer(self.mlp(self.norm2(tokens)))))
        return out.view_as(x)


class FqPatchMerging(PatchMerging):
    """Patch merging with a quantizer after it; made by `shallow_cast`."""

    output_quantizer: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) to (B, H/2, W/2, C_out)."""
        out: Tensor = self.output_quantizer(super().forward(x))
        return out


@register_swap(WindowAttention, "fqvit")
def swap_attention(module: WindowAttention, context: SwapContext) -> Swap:
    """Window attention."""
    return Swap(FqWindowAttention(module, context))


@register_swap(SwinTransformerBlock, "fqvit")
def swap_block(module: nn.Module, context: SwapContext) -> Swap:
    """Block of Swin."""
    made = shallow_cast(FqSwinBlock, module)
    made.residual1_quantizer, made.mlp_quantizer, made.residual2_quantizer = (context.act(r) for r in ("residual", "output", "residual"))
    return Swap(made)


@register_swap(PatchMerging, "fqvit")
def swap_merging(module: nn.Module, context: SwapContext) -> Swap:
    """Patch merging."""
    made = shallow_cast(FqPatchMerging, module)
    made.output_quantizer = context.act("output")
    return Swap(made)
