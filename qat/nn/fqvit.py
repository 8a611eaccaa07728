"""Placement `fqvit`: quantizers also after layers, on scores and on the residual stream.

The input quantizer of the next Linear quantizes the outputs of norms, attention heads and GELUs.
Source: FQ-ViT, arXiv 2111.13824.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import timm.layers as timm_layers
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.swin_transformer import PatchMerging, SwinTransformerBlock, WindowAttention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from qat.errors import UsageError
from qat.functional.int_layer_norm import integer_layer_norm
from qat.nn.attention import ScoredAttention, split_heads
from qat.nn.linear import QuantLinear
from qat.nn.quant_module import shallow_cast
from qat.nn.score_terms import RelativeBias, add_window_mask
from qat.nn.swap_registry import Swap, SwapContext, register_swap
from qat.nn.vit import apply_mask
from qat.quantizers import Affine

# The axis for one scale per token.
TOKEN_AXIS = -2


class IntegerLayerNorm(nn.LayerNorm):
    """LayerNorm in integer arithmetic between two quantizers.

    Attributes:
        outer_quantizers: the quantizers before and after the norm, which are children of other
            modules; affine or frozen.
    """

    outer_quantizers: tuple[Affine, Affine]

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., C) to multiples of the step size of the quantizer after the norm.

        While `convert` creates the scales, the norm computes in float.
        """
        before, after = self.outer_quantizers
        if after.scale is None:
            return self.in_float(x)
        weight = x.new_ones(x.shape[-1]) if self.weight is None else self.weight
        bias = x.new_zeros(x.shape[-1]) if self.bias is None else self.bias
        return integer_layer_norm(x, before.scale, after.scale, weight, bias).to(x.dtype)

    def in_float(self, x: Tensor) -> Tensor:
        """LayerNorm in float."""
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


def make_norm(norm: nn.Module, context: SwapContext) -> nn.Module:
    """`norm`, or an `IntegerLayerNorm` for a LayerNorm if the recipe has `layernorm=integer`."""
    if context.recipe.layernorm == "integer" and isinstance(norm, nn.LayerNorm):
        return shallow_cast(IntegerLayerNorm, norm)
    return norm


class FqAttention(ScoredAttention):
    """Attention with quantizers after `qkv`, on scores and probabilities, and after `proj`."""

    def __init__(self, attention: Any, context: SwapContext) -> None:
        super().__init__(attention, context)
        self.qkv = attention.qkv
        self.v_quantizer = nn.Identity()  # type: ignore[assignment]
        self.qkv_quantizer = context.act("qkv")
        self.scores_quantizer = context.act("scores")
        self.output_quantizer = context.act("output")

    def quantized_qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantized queries and keys (B, h, N, d), and quantized values (B, N, h*d)."""
        q, k, v = self.qkv_quantizer(self.qkv(x)).chunk(3, dim=-1)
        return split_heads(q, self.num_heads), split_heads(k, self.num_heads), v

    def attend(self, scores: Tensor, v: Tensor, x: Tensor) -> Tensor:
        """Compute `attend` of the base class, and quantize its output (B, N, C_out)."""
        return self.output_quantizer(super().attend(scores, v, x))


class FqVitAttention(FqAttention):
    """Quantized `timm.layers.Attention`."""

    def __init__(self, attention: timm_layers.Attention, context: SwapContext) -> None:
        super().__init__(attention, context)
        self.q_norm = attention.q_norm
        self.k_norm = attention.k_norm

    def forward(  # timm's signature
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,  # noqa: FBT001, FBT002
    ) -> Tensor:
        """Map (B, N, C) to (B, N, C_out)."""
        q, k, v = self.quantized_qkv(x)
        scores = (self.q_norm(q) @ self.k_norm(k).transpose(-2, -1)).mul_(self.scale)
        scores = self.scores_quantizer(scores)
        return self.attend(apply_mask(scores, attn_mask, is_causal=is_causal), v, x)


class FqBlock(Block):
    """A `Block` with quantizers after the MLP and both residual sums; made by `shallow_cast`."""

    residual1_quantizer: nn.Module
    mlp_quantizer: nn.Module
    residual2_quantizer: nn.Module

    def forward(  # timm's signature
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,  # noqa: FBT001, FBT002
    ) -> Tensor:
        """Map (B, N, C) to the same shape."""
        attended = self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)
        x = self.residual1_quantizer(x + self.drop_path1(self.ls1(attended)))
        mlp_out = self.mlp_quantizer(self.mlp(self.norm2(x)))
        return self.residual2_quantizer(x + self.drop_path2(self.ls2(mlp_out)))


class _FqOutput(nn.Module):
    """Mixin that quantizes the output of the base class that is listed after it.

    Instances of subclasses are made by `shallow_cast`.
    """

    output_quantizer: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """The output of the module, quantized."""
        out: Tensor = self.output_quantizer(super().forward(x))
        return out


class FqPatchEmbed(_FqOutput, timm_layers.PatchEmbed):
    """`PatchEmbed` with quantized output: (B, I, H, W) to (B, N, C), or to another `output_fmt`."""


class FqPatchMerging(_FqOutput, PatchMerging):
    """Patch merging with a quantized output: (B, H, W, C) to (B, ceil(H/2), ceil(W/2), C_out)."""


class FqHead(_FqOutput, QuantLinear):
    """A classifier with quantized logits: (..., in) to (..., classes)."""


class FqNet(VisionTransformer):
    """A ViT with quantizers of joined tokens, any position embedding, and the final embedding."""

    def add_quantizers(self, context: SwapContext) -> None:
        """Add the quantizers that belong to the model itself."""
        self.tokens_quantizer = context.act("output")
        has_positions = self.pos_embed is not None
        self.positions_quantizer = context.act("output") if has_positions else nn.Identity()
        self.embedding_quantizer = context.act("residual")

    def _pos_embed(self, x: Tensor) -> Tensor:
        """Join prefix tokens and patches (B, N, C), add any positions in timm's order, quantize."""
        tokens = []
        for name in ("cls_token", "dist_token", "reg_token"):
            token = getattr(self, name, None)
            if token is not None:
                tokens.append(token.expand(x.shape[0], -1, -1))
        positions = None if self.pos_embed is None else self.positions_quantizer(self.pos_embed)
        if positions is not None and self.no_embed_class:
            x = x + positions
        x = self.tokens_quantizer(torch.cat([*tokens, x], dim=1))
        if positions is not None and not self.no_embed_class:
            x = x + positions
        return self.pos_drop(self.embedding_quantizer(x))

    def connect_norms(self) -> None:
        """Give each integer norm the quantizers before and after the norm.

        Raises:
            UsageError: one of these quantizers is not affine, or has scales that integer norms do
                not support.
        """
        for name, norm, before, after in self._norms():
            if not isinstance(norm, IntegerLayerNorm):
                continue
            if not (_is_affine(before) and _is_affine(after)):
                raise UsageError(
                    f"ptq.layernorm='integer': must be float, because {name} does not have affine "
                    "quantizers on both sides"
                )
            spec_before = before.spec  # type: ignore[attr-defined]
            spec_after = after.spec  # type: ignore[attr-defined]
            # The norm sums over the channels of a token, so their scales must be equal, or one
            # scale times powers of two. `integer_layer_norm` takes no scale per token.
            has_token_scales = TOKEN_AXIS in {spec_before.axis, spec_after.axis}
            can_sum = spec_before.axis is None or spec_before.observer == "ptf"
            if has_token_scales or not can_sum:
                raise UsageError(
                    f"ptq.layernorm='integer': before {name}, there must be one scale, or one for "
                    "each channel with ptq.residual_observer=ptf; after it, no scale per token"
                )
            norm.outer_quantizers = (before, after)  # type: ignore[assignment]

    def _norms(self) -> Iterator[tuple[str, nn.Module, object, object]]:
        """The norms of each `FqBlock` and the last norm: name, module, quantizers before and after.

        A quantizer is None if it is not known.
        """
        before: object = None
        if isinstance(self.norm_pre, nn.Identity):
            before = self.embedding_quantizer
        for i, block in enumerate(self.blocks):
            if not isinstance(block, FqBlock):
                before = None
                continue
            qkv = getattr(block.attn, "qkv", None)
            yield f"blocks.{i}.norm1", block.norm1, before, _input_quantizer(qkv)
            fc1 = getattr(block.mlp, "fc1", None)
            before = block.residual1_quantizer
            yield f"blocks.{i}.norm2", block.norm2, before, _input_quantizer(fc1)
            before = block.residual2_quantizer
        yield "norm", self.norm, before, _input_quantizer(self.head)


def _input_quantizer(layer: object) -> object:
    """The input quantizer of a layer. Returns None if the layer has no input quantizer."""
    return getattr(layer, "input_quantizer", None)


def _is_affine(quantizer: object) -> bool:
    """True for an affine quantizer, even if it is frozen."""
    return isinstance(quantizer, Affine) or getattr(quantizer, "zero_point", None) is not None


class FqDistilledNet(FqNet, VisionTransformerDistilled):
    """`FqNet` with a distillation token and two heads."""


@register_swap(VisionTransformer, "fqvit_net")
@register_swap(VisionTransformerDistilled, "fqvit_net")
def swap_net(module: VisionTransformer, context: SwapContext) -> Swap:
    """Add quantizers to the model in place; see `make_norm` for a norm directly before the head.

    Raises:
        UsageError: the model takes images of any size.
    """
    if module.dynamic_img_size:
        raise UsageError(
            "ptq.placement='fqvit': this model takes images of any size, but quantized positions "
            "need one size; must be inputs"
        )
    is_norm_before_head = module.global_pool == "token" and isinstance(module.fc_norm, nn.Identity)
    module.__class__ = FqDistilledNet if isinstance(module, VisionTransformerDistilled) else FqNet
    module.add_quantizers(context)  # type: ignore[operator]
    if not is_norm_before_head:
        return Swap(module)
    return Swap(module, children={"norm": make_norm(module.norm, context)})


@register_swap(nn.Linear, "fqvit")
def swap_linear(module: nn.Linear, context: SwapContext) -> Swap:
    """Quantize a Linear; for a head, also quantize the logits."""
    linear = QuantLinear(module, context.input_quantizer(), context.weight())
    if context.place == "head":
        return _add_output_quantizer(FqHead, linear, context)
    return Swap(linear)


class FqWindowAttention(RelativeBias, FqAttention):
    """Window attention, with quantizers for the table of biases and for the biased scores."""

    def __init__(self, attention: WindowAttention, context: SwapContext) -> None:
        super().__init__(attention, context)
        self.table_quantizer = context.act("output")
        self.biased_quantizer = context.act("scores")

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map (B*windows, N, C) to the same shape; see `add_window_mask` for the mask."""
        q, k, v = self.quantized_qkv(x)
        scores = self.scores_quantizer(q @ k.transpose(-2, -1) * self.scale)
        table = self.table_quantizer(self.relative_position_bias_table)
        bias = table[self.relative_position_index].permute(2, 0, 1)
        biased_scores = self.biased_quantizer(scores + bias)
        return self.attend(add_window_mask(biased_scores, mask), v, x)


class FqSwinBlock(SwinTransformerBlock):
    """A Swin block with quantizers after the MLP and residual sums; made by `shallow_cast`."""

    residual1_quantizer: nn.Module
    mlp_quantizer: nn.Module
    residual2_quantizer: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) to the same shape."""
        x = self.residual1_quantizer(x + self.drop_path1(self._attn(self.norm1(x))))
        tokens = x.flatten(1, 2)
        mlp_out = self.mlp_quantizer(self.mlp(self.norm2(tokens)))
        out = self.residual2_quantizer(tokens + self.drop_path2(mlp_out))
        return out.view_as(x)


@register_swap(timm_layers.Attention, "fqvit")
@register_swap(WindowAttention, "fqvit")
def swap_attention(module: Any, context: SwapContext) -> Swap:
    """Quantize attention or window attention."""
    if isinstance(module, WindowAttention):
        return Swap(FqWindowAttention(module, context))
    return Swap(FqVitAttention(module, context))


@register_swap(Block, "fqvit")
@register_swap(SwinTransformerBlock, "fqvit")
def swap_block(module: Block | SwinTransformerBlock, context: SwapContext) -> Swap:
    """Add quantizers to a block of ViT or Swin; see `make_norm` for its norms."""
    block: Any = shallow_cast(FqBlock if isinstance(module, Block) else FqSwinBlock, module)
    block.norm1 = make_norm(module.norm1, context)
    block.norm2 = make_norm(module.norm2, context)
    block.residual1_quantizer = context.act("residual")
    block.mlp_quantizer = context.act("output")
    block.residual2_quantizer = context.act("residual")
    return Swap(block)


@register_swap(timm_layers.PatchEmbed, "fqvit")
@register_swap(PatchMerging, "fqvit")
def swap_output(module: nn.Module, context: SwapContext) -> Swap:
    """Quantize the output of patch embedding or patch merging."""
    is_embedding = isinstance(module, timm_layers.PatchEmbed)
    return _add_output_quantizer(FqPatchEmbed if is_embedding else FqPatchMerging, module, context)


def _add_output_quantizer(cls: type[_FqOutput], module: nn.Module, context: SwapContext) -> Swap:
    """Cast the module to `cls`, and add an output quantizer."""
    cast = shallow_cast(cls, module)
    cast.output_quantizer = context.act("output")
    return Swap(cast)
