"""Our names of tensors, and the authors'. Source: state dicts written by nbasyl/OFQ 7ed37d1."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

# In their files and nowhere here. An offset behind the key or the product shifts whole softmax rows: it is dead.
DEAD = re.compile(r"(move_qkx_aft|move_k_aft)\.bias$")
# StatsQ's clip_val is always 2; timm makes the index of a window itself.
CONSTANT = re.compile(r"clip_val$")
WINDOW_INDEX = re.compile(r"relative_position_index$")

# The first pattern that is found in a name of ours decides.
_QUANTIZERS: tuple[tuple[str, str], ...] = (
    (r"attn\.input_quantizer\.offset_before$", "attn.quant_x_4_qkv.move_b4.bias"),
    (r"attn\.input_quantizer\.offset_after$", "attn.quant_x_4_qkv.move_aft.bias"),
    (r"attn\.input_quantizer\.quantizer\.scale$", "attn.quant_x_4_qkv.input_quant_fn.s"),
    (r"attn\.k_quantizer\.scale$", "attn.quan_a_qkx_fn.s"),
    (r"attn\.product_offset$", "attn.move_qkx_b4.bias"),
    (r"attn\.probs_quantizer\.scale$", "attn.quan_a_softmax_fn.s"),
    (r"attn\.([qkv])_quantizer\.quantizer\.scale$", r"attn.quan_a_\1_fn.s"),
    (r"attn\.([qv])_quantizer\.offset_after$", r"attn.move_\1_aft.bias"),
    (r"attn\.([qk])_weight$", r"attn.\1.weight"),
    (r"input_quantizer\.offset_before$", "move_b4.bias"),
    (r"input_quantizer\.offset_after$", "move_aft.bias"),
    (r"input_quantizer\.quantizer\.scale$", "input_quant_fn.s"),
    (r"input_quantizer\.quantizer\.signed$", "input_quant_fn.signed"),
    (r"weight_quantizer\.scale$", "lsqw_fn.s"),
)
# Without QKR one offset of 3C values stands in front of q, k and v; with it, v alone has one.
_STACKED_OFFSET = re.compile(r"attn\.([qkv])_quantizer\.offset_before$")

_SWIN: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (r"^patch_embed\.proj\.", "features.0.0."),
    (r"^patch_embed\.norm\.", "features.0.2."),
    # Torchvision counts stages and mergings alike: 1 = first stage, 2 = the merging in front of the second.
    (r"^layers\.(\d+)\.blocks\.", lambda found: f"features.{2 * int(found[1]) + 1}."),
    (r"^layers\.(\d+)\.downsample\.", lambda found: f"features.{2 * int(found[1])}."),
    (r"^head\.fc\.", "head."),
)


@dataclass(frozen=True)
class Place:
    """Where a tensor of ours is in a file of theirs.

    Attributes:
        name: their name.
        third: which third of their tensor it is; None = all of it.
    """

    name: str
    third: int | None = None


def place_of(name: str, *, swin: bool, qkr: bool) -> Place:
    """Where the tensor that is called `name` in our state dict is in theirs."""
    if swin:
        name = _first_hit(name, _SWIN)
    offset = _STACKED_OFFSET.search(name)
    if offset is None:
        return Place(_first_hit(name, _QUANTIZERS))
    prefix = name[: offset.start()] + "attn."
    return Place(prefix + "move_v_b4.bias") if qkr else Place(prefix + "move_qkv_b4.bias", "qkv".index(offset[1]))


def _first_hit(name: str, table: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...]) -> str:
    for pattern, theirs in table:
        renamed, hits = re.subn(pattern, theirs, name)
        if hits:
            return renamed
    return name
