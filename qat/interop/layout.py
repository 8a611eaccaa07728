"""What net a file of the authors holds, read off the shapes of its tensors."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from qat.errors import UsageError

_DEIT_BY_WIDTH = {192: "tiny", 384: "small", 768: "base"}


@dataclass(frozen=True)
class OfqLayout:
    """Constructor of a net.

    Attributes:
        swin: Swin, else DeiT.
        distilled: with a distillation token and head.
        model: timm name that the widths belong to; None = none of the usual ones.
        kwargs: arguments of `timm.create_model` that the shapes tell.
        qkr: query-key reparameterization, or a stacked `qkv`.
        input_size: (channels, height, width) of its images.
    """

    swin: bool
    distilled: bool
    model: str | None
    kwargs: dict[str, Any]
    qkr: bool
    input_size: tuple[int, int, int]


def is_ofq(state: dict[str, Tensor]) -> bool:
    """True for weights that the authors' code has quantized."""
    return any(name.endswith("input_quant_fn.s") for name in state)


def read_layout(state: dict[str, Tensor], origin: str) -> OfqLayout:
    """The layout of the net in a file.

    Args:
        state: tensors under the authors' names, without wrapper prefixes.
        origin: how to call the file in messages.

    Raises:
        UsageError: these are not the weights of a DeiT or a Swin of theirs; names the tensor that is missing.
    """
    if not is_ofq(state):
        raise UsageError(f"{origin}: no tensor ends with input_quant_fn.s, so the paper's code did not write it; ckpt_format=timm?")
    try:
        return _swin(state) if "features.0.0.weight" in state else _deit(state)
    except KeyError as error:
        raise UsageError(f"{origin}: tensor {error.args[0]} is missing") from error


def _highest(state: dict[str, Tensor], pattern: str) -> int:
    """One more than the highest number that stands in a name."""
    return 1 + max((int(found[1]) for name in state if (found := re.match(pattern, name))), default=-1)


def _side(state: dict[str, Tensor], stem: str) -> int:
    """Height and width of the images: the offset map has one value per pixel."""
    return math.isqrt(state[f"{stem}.move_b4.bias"].numel())


def _deit(state: dict[str, Tensor]) -> OfqLayout:
    width, depth = state["cls_token"].shape[-1], _highest(state, r"blocks\.(\d+)\.")
    stem, side, first = state["patch_embed.proj.weight"], _side(state, "patch_embed.proj"), "blocks.0.attn"
    qkr = f"{first}.q.weight" in state
    if not qkr and f"{first}.qkv.weight" not in state:
        raise KeyError(f"{first}.q.weight")
    # Without QKR no shape tells the number of heads: DeiTs have 64 channels in each.
    heads = state[f"{first}.move_qkx_b4.bias"].numel() // width if qkr else max(width // 64, 1)
    size = _DEIT_BY_WIDTH.get(width)
    kwargs = {
        "img_size": side,
        "patch_size": stem.shape[-1],
        "in_chans": stem.shape[1],
        "num_classes": state["head.weight"].shape[0],
        "embed_dim": width,
        "depth": depth,
        "num_heads": heads,
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / width,
    }
    distilled = "dist_token" in state
    model = None if size is None else f"deit_{size}{'_distilled' if distilled else ''}_patch16_224"
    return OfqLayout(swin=False, distilled=distilled, model=model, kwargs=kwargs, qkr=qkr, input_size=(stem.shape[1], side, side))


def _swin(state: dict[str, Tensor]) -> OfqLayout:
    stem, side = state["features.0.0.weight"], _side(state, "features.0.0")
    stages = range(1, _highest(state, r"features\.(\d+)\."), 2)
    tables = [state[f"features.{s}.0.attn.relative_position_bias_table"] for s in stages]
    depths = tuple(_highest(state, rf"features\.{s}\.(\d+)\.attn\.") for s in stages)
    width, first = stem.shape[0], "features.1.0"
    model = "swin_base" if width == 128 else "swin_small" if max(depths) > 6 else "swin_tiny"
    kwargs = {
        "img_size": side,
        "patch_size": stem.shape[-1],
        "in_chans": stem.shape[1],
        "num_classes": state["head.weight"].shape[0],
        "embed_dim": width,
        "depths": depths,
        "num_heads": tuple(table.shape[1] for table in tables),
        "window_size": (math.isqrt(tables[0].shape[0]) + 1) // 2,
        "mlp_ratio": state[f"{first}.mlp.fc1.weight"].shape[0] / width,
        "drop_path_rate": 0.0,
    }
    qkr = f"{first}.attn.q.weight" in state
    return OfqLayout(
        swin=True, distilled=False, model=f"{model}_patch4_window7_224", kwargs=kwargs, qkr=qkr, input_size=(stem.shape[1], side, side)
    )
