"""Placement `fqvit`: quantizers also after a layer, on scores and on the residual stream. Source: FQ-ViT, arXiv 2111.13824.

What leaves a norm, an attention's values or GELU enters a Linear next, whose input quantizer does it.
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
from qat.nn.attention import RelativeBias, ScoredAttention, add_window_mask, split_heads
from qat.nn.linear import QuantLinear
from qat.nn.quant_module import shallow_cast
from qat.nn.swap_registry import Swap, SwapContext, register_swap
from qat.nn.vit import masked
from qat.quantizers import Affine

# A scale for each position.
TOKENS = -2


class IntegerLayerNorm(nn.LayerNorm):
    """LayerNorm in integer arithmetic, between the quantizer before it and the one after it.

    Attributes:
        between: these two, affine or their frozen form; they belong to other modules.
    """

    between: tuple[Affine, Affine]

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., C) to multiples of the step size after it."""
        before, after = self.between
        if after.scale is None:  # while `convert` finds out how many scales there are
            return self.in_float(x)
        weight = x.new_ones(x.shape[-1]) if self.weight is None else self.weight
        bias = x.new_zeros(x.shape[-1]) if self.bias is None else self.bias
        return integer_layer_norm(x, before.scale, after.scale, weight, bias).to(x.dtype)

    def in_float(self, x: Tensor) -> Tensor:
        """The norm that it stands for."""
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


def wanted_norm(norm: nn.Module, context: SwapContext) -> nn.Module:
    """The norm itself, or its integer form where the recipe has `layernorm=integer`."""
    integer = context.recipe.layernorm == "integer" and isinstance(norm, nn.LayerNorm)
    return shallow_cast(IntegerLayerNorm, norm) if integer else norm


class FqAttention(ScoredAttention):
    """What leaves `qkv` has one quantizer, and there are two more, for the scores and for what leaves `proj`."""

    def __init__(self, attention: Any, context: SwapContext) -> None:
        super().__init__(attention, context)
        self.qkv = attention.qkv
        self.v_quantizer = nn.Identity()  # type: ignore[assignment]
        self.qkv_quantizer = context.act("qkv")
        self.scores_quantizer = context.act("scores")
        self.output_quantizer = context.act("output")

    def quantized_qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys (B, h, N, d), values (B, N, h*d)."""
        q, k, v = self.qkv_quantizer(self.qkv(x)).chunk(3, dim=-1)
        return split_heads(q, self.num_heads), split_heads(k, self.num_heads), v

    def attend(self, scores: Tensor, v: Tensor, x: Tensor) -> Tensor:
        """The base's, quantized."""
        return self.output_quantizer(super().attend(scores, v, x))


class FqVitAttention(FqAttention):
    """`timm.layers.Attention`."""

    def __init__(self, attention: timm_layers.Attention, context: SwapContext) -> None:
        super().__init__(attention, context)
        self.q_norm, self.k_norm = attention.q_norm, attention.k_norm

    def forward(  # timm's signature
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,  # noqa: FBT001, FBT002
    ) -> Tensor:
        """Map (B, N, C) to (B, N, C_out)."""
        q, k, v = self.quantized_qkv(x)
        scores = self.scores_quantizer(
            (self.q_norm(q) @ self.k_norm(k).transpose(-2, -1)).mul_(self.scale)
        )
        return self.attend(masked(scores, attn_mask, is_causal=is_causal), v, x)


class FqBlock(Block):
    """`Block` with quantizers after its MLP and after both sums; made by `shallow_cast`."""

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
        return self.residual2_quantizer(
            x + self.drop_path2(self.ls2(self.mlp_quantizer(self.mlp(self.norm2(x)))))
        )


class _FqOutput(nn.Module):
    """To be named before a module that has a quantizer after it; made by `shallow_cast`."""

    output_quantizer: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """What the module makes of `x`, quantized."""
        out: Tensor = self.output_quantizer(super().forward(x))
        return out


class FqPatchEmbed(_FqOutput, timm_layers.PatchEmbed):
    """`PatchEmbed`: (B, I, H, W) to (B, N, C), or what else timm makes of it."""


class FqPatchMerging(_FqOutput, PatchMerging):
    """Patch merging: (B, H, W, C) to (B, H/2, W/2, C_out)."""


class FqHead(_FqOutput, QuantLinear):
    """A classifier with quantized logits: (..., in) to (..., classes)."""


class FqNet(VisionTransformer):
    """The net itself: quantizers after the joined tokens, the position embedding, and their sum."""

    def add_quantizers(self, context: SwapContext) -> None:
        """Put the quantizers beside timm's modules."""
        self.tokens_quantizer = context.act("output")
        self.positions_quantizer = (
            nn.Identity() if self.pos_embed is None else context.act("output")
        )
        self.embedding_quantizer = context.act("residual")

    def _pos_embed(self, x: Tensor) -> Tensor:
        found = (
            getattr(self, name, None) for name in ("cls_token", "dist_token", "reg_token")
        )  # in timm's order
        tokens = [token.expand(x.shape[0], -1, -1) for token in found if token is not None]
        positions = None if self.pos_embed is None else self.positions_quantizer(self.pos_embed)
        if positions is not None and self.no_embed_class:
            x = x + positions
        x = self.tokens_quantizer(torch.cat([*tokens, x], dim=1))
        if positions is not None and not self.no_embed_class:
            x = x + positions
        return self.pos_drop(self.embedding_quantizer(x))

    def connect(self) -> None:
        """Tell each integer norm what stands on both sides of it.

        Raises:
            UsageError: one of them is no affine quantizer, or has scales that integers cannot sum over.
        """
        for name, norm, before, after in self._norms():
            if not isinstance(norm, IntegerLayerNorm):
                continue
            if not all(
                isinstance(one, Affine) or getattr(one, "zero_point", None) is not None
                for one in (before, after)
            ):
                raise UsageError(
                    f"ptq.layernorm='integer': {name} has no affine quantizer on both sides; here it must be float"
                )
            first, last = before.spec, after.spec  # type: ignore[attr-defined]
            # It sums over the channels of a token: their scales before it are one, or powers of two of it.
            if TOKENS in {first.axis, last.axis} or (
                first.axis is not None and first.observer != "ptf"
            ):
                need = "one scale, or one for each channel by ptq.residual_observer=ptf"
                raise UsageError(
                    f"ptq.layernorm='integer': {name} needs {need} before it, and none for each token after it"
                )
            norm.between = (before, after)  # type: ignore[assignment]

    def _norms(self) -> Iterator[tuple[str, nn.Module, object, object]]:
        """Name and module of each norm, and what stands before it and after it; None where that is no quantizer known here."""
        before: object = (
            self.embedding_quantizer if isinstance(self.norm_pre, nn.Identity) else None
        )
        for i, block in enumerate(self.blocks):
            if not isinstance(block, FqBlock):
                before = None
                continue
            yield (
                f"blocks.{i}.norm1",
                block.norm1,
                before,
                getattr(getattr(block.attn, "qkv", None), "input_quantizer", None),
            )
            first = getattr(block.mlp, "fc1", None)
            yield (
                f"blocks.{i}.norm2",
                block.norm2,
                block.residual1_quantizer,
                getattr(first, "input_quantizer", None),
            )
            before = block.residual2_quantizer
        yield "norm", self.norm, before, getattr(self.head, "input_quantizer", None)


class FqDistilledNet(FqNet, VisionTransformerDistilled):
    """With a distillation token and two heads."""


@register_swap(VisionTransformer, "fqvit_net")
@register_swap(VisionTransformerDistilled, "fqvit_net")
def swap_net(module: VisionTransformer, context: SwapContext) -> Swap:
    """The net stays the object it is and learns where its own quantizers are.

    Raises:
        UsageError: its position embedding follows the size of the image.
    """
    if module.dynamic_img_size:
        raise UsageError(
            "ptq.placement='fqvit': this model takes images of any size, and positions are quantized; here it must be inputs"
        )
    ends_in_token = module.global_pool == "token" and isinstance(module.fc_norm, nn.Identity)
    module.__class__ = FqDistilledNet if isinstance(module, VisionTransformerDistilled) else FqNet
    module.add_quantizers(context)  # type: ignore[operator]
    return Swap(
        module, children={"norm": wanted_norm(module.norm, context)} if ends_in_token else {}
    )


@register_swap(nn.Linear, "fqvit")
def swap_linear(module: nn.Linear, context: SwapContext) -> Swap:
    """A Linear; the logits of a head are quantized."""
    made = QuantLinear(module, context.input_quantizer(), context.weight())
    return _with_output(FqHead, made, context) if context.place == "head" else Swap(made)


class FqWindowAttention(RelativeBias, FqAttention):
    """Window attention; the table of biases and the biased scores have quantizers of their own."""

    def __init__(self, attention: WindowAttention, context: SwapContext) -> None:
        super().__init__(attention, context)
        self.table_quantizer = context.act("output")
        self.biased_quantizer = context.act("scores")

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map (B*windows, N, C) to the same shape; the mask (windows, N, N) is that of a cyclic shift."""
        q, k, v = self.quantized_qkv(x)
        scores = self.scores_quantizer(q @ k.transpose(-2, -1) * self.scale)
        biases = self.table_quantizer(self.relative_position_bias_table)[
            self.relative_position_index
        ].permute(2, 0, 1)
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
        out = self.residual2_quantizer(
            tokens + self.drop_path2(self.mlp_quantizer(self.mlp(self.norm2(tokens))))
        )
        return out.view_as(x)


@register_swap(timm_layers.Attention, "fqvit")
@register_swap(WindowAttention, "fqvit")
def swap_attention(module: Any, context: SwapContext) -> Swap:
    """Attention and window attention."""
    return Swap(
        (FqWindowAttention if isinstance(module, WindowAttention) else FqVitAttention)(
            module, context
        )
    )


@register_swap(Block, "fqvit")
@register_swap(SwinTransformerBlock, "fqvit")
def swap_block(module: Block | SwinTransformerBlock, context: SwapContext) -> Swap:
    """Block of ViT or Swin."""
    made: Any = shallow_cast(FqBlock if isinstance(module, Block) else FqSwinBlock, module)
    made.norm1, made.norm2 = wanted_norm(module.norm1, context), wanted_norm(module.norm2, context)
    made.residual1_quantizer, made.mlp_quantizer, made.residual2_quantizer = (
        context.act(r) for r in ("residual", "output", "residual")
    )
    return Swap(made)


@register_swap(timm_layers.PatchEmbed, "fqvit")
@register_swap(PatchMerging, "fqvit")
def swap_output(module: nn.Module, context: SwapContext) -> Swap:
    """Patch embedding and patch merging."""
    return _with_output(
        FqPatchEmbed if isinstance(module, timm_layers.PatchEmbed) else FqPatchMerging,
        module,
        context,
    )


def _with_output(cls: type[_FqOutput], module: nn.Module, context: SwapContext) -> Swap:
    made = shallow_cast(cls, module)
    made.output_quantizer = context.act("output")
    return Swap(made)
