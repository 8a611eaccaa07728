"""Checkpoints of the paper's own code (nbasyl/OFQ 7ed37d1): same logits, in a net of ours.

Their state dicts hold latent weights, LSQ step sizes and offsets under names of their own, and neither bits nor, without QKR, the number of
heads: shapes tell the rest.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from qat.errors import UsageError
from qat.model.bounds import check_net
from qat.model.checkpoint import Checkpoint, read_checkpoint
from qat.model.convert import convert
from qat.model.foreign_weights import grow_biases
from qat.model.scales import check_finite
from qat.spec import recipe

# In their files and nowhere here: an offset after the key or the product shifts whole softmax rows, and StatsQ's clip_val is always 2.
_DEAD = re.compile(r"(move_qkx_aft|move_k_aft)\.bias$")

# Our names and theirs: the first pattern that is found in a name of ours decides. Swin's layers have timm's names once the file is read.
_NAMES = (
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
# Without QKR one offset of 3C values stands before q, k and v; with it, v alone has one.
_STACKED_OFFSET = re.compile(r"attn\.([qkv])_quantizer\.offset_before$")


@dataclass(frozen=True)
class OfqNet:
    """A net read from a file of the authors: quantized, scales filled, in eval mode; its timm name; what it was read as, in a line."""

    net: nn.Module
    model: str
    note: str


def is_ofq(state: Mapping[str, Tensor]) -> bool:
    """True for weights that the authors' code has quantized."""
    return any(name.endswith("input_quant_fn.s") for name in state)


def load_ofq_checkpoint(
    path: str | os.PathLike[str],
    model: str | None = None,
    bits: int | None = None,
    act_bits: int | None = None,
    *,
    qkr: bool | None = None,
) -> nn.Module:
    """A net of ours from a checkpoint of the paper's code: DeiT or Swin, any depth and class count, with or without QKR.

    Args:
        path: a `.pth.tar` of its training script, or a state dict alone. Nothing in it is executed.
        model: timm name; None = as the widths say.
        bits: of the weights in blocks; None = as the training arguments in the file say. No tensor tells them.
        act_bits: of the activations; None = as the arguments in the file say, or `bits` where they do not.
        qkr: query-key reparameterization; None = as the file has it.

    Returns:
        The quantized net in eval mode.

    Raises:
        UsageError: not such a file, a tensor is missing or has another shape, or an argument contradicts the file.
    """
    return net_from_ofq(read_checkpoint(path, fmt="ofq"), model, bits, act_bits, qkr=qkr).net


def net_from_ofq(
    checkpoint: Checkpoint,
    model: str | None = None,
    bits: int | None = None,
    act_bits: int | None = None,
    *,
    qkr: bool | None = None,
) -> OfqNet:
    """As `load_ofq_checkpoint`, from a file that is in memory."""
    origin, state = f"ckpt={str(checkpoint.path)!r}", checkpoint.state
    if not is_ofq(state):
        raise UsageError(
            f"{origin}: no tensor ends with input_quant_fn.s, so the paper's code did not write it; ckpt_format=timm?"
        )
    swin = any(name.endswith("relative_position_bias_table") for name in state)
    try:
        name, kwargs, has_qkr = _swin(state) if swin else _deit(state)
    except KeyError as error:
        raise UsageError(f"{origin}: tensor {error.args[0]} is missing") from error
    except (IndexError, ValueError, ArithmeticError) as error:
        raise UsageError(
            f"{origin}: its shapes are those of no {'Swin' if swin else 'DeiT'} ({error})"
        ) from error
    if qkr is not None and qkr != has_qkr:
        has = "attn.q and attn.k (qkr=True)" if has_qkr else "attn.qkv (qkr=False)"
        raise UsageError(f"qkr={qkr}: {origin} holds {has}")
    if model is not None and model != name:
        kwargs |= _heads_of(
            model,
            name,
            kwargs,
            swin=swin,
            qkr=has_qkr,
            distilled="dist_token" in state,
            origin=origin,
        )
        name = model

    # Their script writes the bits of a quantized teacher over the student's before it saves.
    said = (
        {} if checkpoint.args is None or checkpoint.args.get("quant_teacher") else checkpoint.args
    )
    for setting, given, key in (("bits", bits, "wq_bitw"), ("act_bits", act_bits, "aq_bitw")):
        if given is not None and said.get(key, given) != given:
            raise UsageError(
                f"{setting}={given}: {origin} was trained with {said[key]}, as its own arguments say"
            )
    weight_bits, input_bits = said.get("wq_bitw", bits), said.get("aq_bitw", act_bits)
    if weight_bits is None:
        raise UsageError(
            f"bits=None: {origin} does not state its bits, and its tensors do not show them; set bits= (ckpt_bits= in a command)"
        )
    # In a Swin the authors' rule of a step size per position meets (B, H, W, C): there it is one per column.
    columns = {"map_scales": "column"} if swin else {}
    used = recipe(
        "ofq" if has_qkr else "ofq_noqkr",
        bits=weight_bits,
        act_bits=input_bits,
        steps="absolute",
        **columns,
    )
    try:
        check_net(name, kwargs, state, [(kwargs["img_size"], kwargs["img_size"])])
        net: nn.Module = timm.create_model(name, **kwargs)
    except (TypeError, ValueError, AssertionError, RuntimeError, ArithmeticError) as error:
        raise UsageError(
            f"{origin}: its shapes are those of no {name} ({' '.join(str(error).split())})"
        ) from error
    # The authors' Linear always has a bias, timm's patch mergings have none.
    grow_biases(
        net, [n for n, _ in net.named_modules() if n.endswith("reduction") and f"{n}.bias" in state]
    )
    convert(net, used, input_size=(kwargs["in_chans"], kwargs["img_size"], kwargs["img_size"]))
    _fill(net, state, qkr=has_qkr, origin=origin)
    check_finite(net, origin, unset=True)
    dead = sum(bool(_DEAD.search(one)) for one in state)
    note = f"weights, step sizes and offsets of {origin}, read as {used.name} W{used.bits}A{used.act_bits}"
    return OfqNet(
        net.eval(),
        name,
        note + (f"; {dead} offsets that change no output are left out" if dead else ""),
    )


def _heads_of(
    model: str,
    likely: str,
    kwargs: Mapping[str, Any],
    *,
    swin: bool,
    qkr: bool,
    distilled: bool,
    origin: str,
) -> dict[str, int]:
    """The number of heads of a model given by name, where no shape tells it; its width has to be that of the file."""
    with torch.device("meta"):
        base = timm.create_model(model) if timm.is_model(model) else None
    family = SwinTransformer if swin else VisionTransformer
    if (
        not isinstance(base, family)
        or base.embed_dim != kwargs["embed_dim"]
        or hasattr(base, "dist_token") != distilled
    ):
        raise UsageError(
            f"model={model!r}: the weights of {origin} do not fit it; they look like {likely!r}"
        )
    return {} if qkr or swin else {"num_heads": base.blocks[0].attn.num_heads}  # type: ignore[union-attr, index]


def _highest(state: Mapping[str, Tensor], pattern: str) -> int:
    """One more than the highest number that stands in a name."""
    return 1 + max(
        (int(found[1]) for name in state if (found := re.match(pattern, name))), default=-1
    )


def _side(state: Mapping[str, Tensor]) -> int:
    """Height and width of the images: the offset map has one value per pixel."""
    return math.isqrt(state["patch_embed.proj.move_b4.bias"].numel())


def _deit(state: Mapping[str, Tensor]) -> tuple[str, dict[str, Any], bool]:
    """Timm name, arguments of `timm.create_model`, and whether it has QKR."""
    width, first = state["cls_token"].shape[-1], "blocks.0.attn"
    qkr = f"{first}.q.weight" in state
    if not qkr and f"{first}.qkv.weight" not in state:
        raise KeyError(f"{first}.q.weight")
    kwargs = {
        "img_size": _side(state),
        "patch_size": state["patch_embed.proj.weight"].shape[-1],
        "in_chans": state["patch_embed.proj.weight"].shape[1],
        "num_classes": state["head.weight"].shape[0],
        "embed_dim": width,
        "depth": _highest(state, r"blocks\.(\d+)\."),
        # Without QKR no shape tells the number of heads: DeiTs have 64 channels in each.
        "num_heads": state[f"{first}.move_qkx_b4.bias"].numel() // width
        if qkr
        else max(width // 64, 1),
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / width,
    }
    size = {192: "tiny", 384: "small"}.get(width, "base")
    return f"deit_{size}{'_distilled' if 'dist_token' in state else ''}_patch16_224", kwargs, qkr


def _swin(state: Mapping[str, Tensor]) -> tuple[str, dict[str, Any], bool]:
    stem = state["patch_embed.proj.weight"]
    stages = range(_highest(state, r"layers\.(\d+)\."))
    tables = [state[f"layers.{s}.blocks.0.attn.relative_position_bias_table"] for s in stages]
    depths = tuple(_highest(state, rf"layers\.{s}\.blocks\.(\d+)\.attn\.") for s in stages)
    width, first = stem.shape[0], "layers.0.blocks.0"
    kwargs = {
        "img_size": _side(state),
        "patch_size": stem.shape[-1],
        "in_chans": stem.shape[1],
        "num_classes": state["head.fc.weight"].shape[0],
        "embed_dim": width,
        "depths": depths,
        "num_heads": tuple(table.shape[1] for table in tables),
        "window_size": (math.isqrt(tables[0].shape[0]) + 1) // 2,
        "mlp_ratio": state[f"{first}.mlp.fc1.weight"].shape[0] / width,
        "drop_path_rate": 0.0,
    }
    model = "swin_base" if width == 128 else "swin_small" if max(depths) > 6 else "swin_tiny"
    return f"{model}_patch4_window7_224", kwargs, f"{first}.attn.q.weight" in state


def _their_name(name: str, *, qkr: bool) -> tuple[str, int | None]:
    """Where the tensor called `name` in our state dict is in theirs, and which third of it; None = all of it."""
    if offset := _STACKED_OFFSET.search(name):
        prefix = name[: offset.start()] + "attn."
        return (
            (prefix + "move_v_b4.bias", None)
            if qkr
            else (prefix + "move_qkv_b4.bias", "qkv".index(offset[1]))
        )
    for pattern, theirs in _NAMES:
        renamed, hits = re.subn(pattern, theirs, name)
        if hits:
            return renamed, None
    return name, None


def _fill(net: nn.Module, state: Mapping[str, Tensor], *, qkr: bool, origin: str) -> None:
    """Load their tensors strictly: what the net does not take must be dead."""
    found, taken = {}, set()
    for name, own in net.state_dict().items():
        theirs, third = _their_name(name, qkr=qkr)
        if theirs not in state:
            raise UsageError(f"{origin}: tensor {theirs} is missing")
        tensor, shape = (
            state[theirs],
            own.shape if third is None else torch.Size((3 * own.numel(),)),
        )
        # Maps and single numbers are flat there.
        if tensor.numel() != shape.numel() or (tensor.ndim > 1 and tensor.shape != shape):
            raise UsageError(
                f"{origin}: {theirs} has shape {tuple(tensor.shape)}, expected {tuple(shape)}"
            )
        found[name] = (
            tensor.reshape(shape) if third is None else tensor.reshape(shape).chunk(3)[third]
        )
        taken.add(theirs)
    for name in state.keys() - taken:
        if not (
            _DEAD.search(name) or (name.endswith("clip_val") and bool((state[name] == 2).all()))
        ):
            raise UsageError(f"{origin}: nothing in the model corresponds to {name}")
    net.load_state_dict(found)
