"""Checkpoints of the paper's own code (nbasyl/OFQ 7ed37d1): same logits, in a net of ours.

Their state dicts hold latent weights, LSQ step sizes and offsets under names of their own, and neither bits nor, without QKR, the number of
heads: shapes tell the rest.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from qat.errors import UsageError
from qat.model.biases import grow_biases
from qat.model.checkpoint import Checkpoint, read_checkpoint
from qat.model.convert import convert
from qat.spec import QuantRecipe, recipe

log = logging.getLogger(__name__)

# In their files and nowhere here: an offset after the key or the product shifts whole softmax rows, StatsQ's clip_val is always 2, and timm
# makes the index of a window itself.
_DEAD = re.compile(r"(move_qkx_aft|move_k_aft)\.bias$")
_CONSTANT = re.compile(r"clip_val$")
_WINDOW_INDEX = re.compile(r"relative_position_index$")
_DEIT_BY_WIDTH = {192: "tiny", 384: "small", 768: "base"}

# Our names and theirs: the first pattern that is found in a name of ours decides.
_Names = tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...]
_QUANTIZERS: _Names = (
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
_SWIN: _Names = (
    (r"^patch_embed\.proj\.", "features.0.0."),
    (r"^patch_embed\.norm\.", "features.0.2."),
    # Torchvision counts stages and mergings alike: 1 = first stage, 2 = the merging before the second.
    (r"^layers\.(\d+)\.blocks\.", lambda found: f"features.{2 * int(found[1]) + 1}."),
    (r"^layers\.(\d+)\.downsample\.", lambda found: f"features.{2 * int(found[1])}."),
    (r"^head\.fc\.", "head."),
)


@dataclass(frozen=True)
class OfqNet:
    """A net read from a file of the authors: quantized, scales filled, in eval mode; its timm name; notes for a person, a line each."""

    net: nn.Module
    model: str
    notes: list[str] = field(default_factory=list)


def is_ofq(state: Mapping[str, Tensor]) -> bool:
    """True for weights that the authors' code has quantized."""
    return any(name.endswith("input_quant_fn.s") for name in state)


def load_ofq_checkpoint(
    path: str | os.PathLike[str], model: str | None = None, bits: int | None = None, act_bits: int | None = None, *, qkr: bool | None = None
) -> nn.Module:
    """A net of ours from a checkpoint of the paper's code: DeiT or Swin, any depth and class count, with or without QKR.

    Args:
        path: a `.pth.tar` of its training script, or a state dict alone. Nothing in it is executed.
        model: timm name; None = as the widths say.
        bits: of the weights in blocks; None = as the training arguments in the file say. No tensor tells them.
        act_bits: of the activations; None = as the arguments in the file say, or `bits` where they do not.
        qkr: query-key reparameterization; None = as the file has it.

    Returns:
        The quantized net in eval mode; what was left out of the file is logged.

    Raises:
        UsageError: not such a file, a tensor is missing or has another shape, or an argument contradicts the file.
    """
    done = net_from_ofq(read_checkpoint(path, fmt="ofq"), model, bits, act_bits, qkr=qkr)
    for note in done.notes:
        log.info("%s", note)
    return done.net


def net_from_ofq(
    checkpoint: Checkpoint, model: str | None = None, bits: int | None = None, act_bits: int | None = None, *, qkr: bool | None = None
) -> OfqNet:
    """As `load_ofq_checkpoint`, from a file that is in memory."""
    origin, state = f"ckpt={str(checkpoint.path)!r}", checkpoint.state
    if not is_ofq(state):
        raise UsageError(f"{origin}: no tensor ends with input_quant_fn.s, so the paper's code did not write it; ckpt_format=timm?")
    swin = "features.0.0.weight" in state
    try:
        name, kwargs, has_qkr = _swin(state) if swin else _deit(state)
    except KeyError as error:
        raise UsageError(f"{origin}: tensor {error.args[0]} is missing") from error
    if qkr is not None and qkr != has_qkr:
        has = "attn.q and attn.k (qkr=True)" if has_qkr else "attn.qkv (qkr=False)"
        raise UsageError(f"qkr={qkr}: {origin} holds {has}")
    if model is not None and model != name:
        kwargs |= _heads_of(model, name, kwargs, swin=swin, qkr=has_qkr, distilled="dist_token" in state, origin=origin)
        name = model
    if name is None:
        raise UsageError(f"{origin}: width {kwargs['embed_dim']} is of no DeiT known here; give model='timm name'")

    # Their script writes the bits of a quantized teacher over the student's before it saves.
    said = {} if checkpoint.args is None or checkpoint.args.get("quant_teacher") else checkpoint.args
    weight_bits, input_bits = (
        _settled("bits", bits, said.get("wq_bitw"), origin),
        _settled("act_bits", act_bits, said.get("aq_bitw"), origin),
    )
    if weight_bits is None:
        raise UsageError(f"bits=None: {origin} does not say its bits, and no tensor tells them; give bits= (ckpt_bits= in a command)")
    # In a Swin the authors' rule of a step size per position meets (B, H, W, C): there it is one per column.
    columns = {"map_scales": "column"} if swin else {}
    used: QuantRecipe = recipe("ofq" if has_qkr else "ofq_noqkr", bits=weight_bits, act_bits=input_bits, steps="absolute", **columns)
    try:
        net: nn.Module = timm.create_model(name, **kwargs)
    except (TypeError, ValueError, AssertionError, RuntimeError, ArithmeticError) as error:
        raise UsageError(f"{origin}: its shapes are those of no {name} ({' '.join(str(error).split())})") from error
    # The authors' Linear always has a bias, timm's patch mergings have none.
    mergings = [n for n, module in net.named_modules() if isinstance(module, nn.Linear) and n.endswith("reduction")]
    grow_biases(net, [n for n in mergings if _their_name(f"{n}.bias", swin=True, qkr=True)[0] in state])
    convert(net, used, input_size=(kwargs["in_chans"], kwargs["img_size"], kwargs["img_size"]))
    _fill(net, state, swin=swin, qkr=has_qkr, origin=origin)
    notes = [f"weights, step sizes and offsets of {origin}, read as {used.name} W{used.bits}A{used.act_bits}"]
    if dead := [n for n in state if _DEAD.search(n)]:
        notes.append(f"left out, without effect on any output: {', '.join(dead)}")
    return OfqNet(net.eval(), name, notes)


def _heads_of(
    model: str, likely: str | None, kwargs: Mapping[str, Any], *, swin: bool, qkr: bool, distilled: bool, origin: str
) -> dict[str, int]:
    """The number of heads of a model given by name, where no shape tells it; its width has to be that of the file."""
    if not timm.is_model(model):
        raise UsageError(f"model={model!r}: timm has no such model; the file looks like {likely!r}")
    with torch.device("meta"):
        base = timm.create_model(model)
    family = SwinTransformer if swin else VisionTransformer
    if not isinstance(base, family) or base.embed_dim != kwargs["embed_dim"] or hasattr(base, "dist_token") != distilled:
        raise UsageError(f"model={model!r}: the weights of {origin} are not of its shape; they look like {likely!r}")
    return {} if qkr or swin else {"num_heads": base.blocks[0].attn.num_heads}  # type: ignore[union-attr, index]


def _settled(setting: str, given: int | None, said: Any, origin: str) -> int | None:
    if given is not None and isinstance(said, int) and given != said:
        raise UsageError(f"{setting}={given}: {origin} was trained with {said}, as its own arguments say")
    return said if given is None and isinstance(said, int) else given


def _highest(state: Mapping[str, Tensor], pattern: str) -> int:
    """One more than the highest number that stands in a name."""
    return 1 + max((int(found[1]) for name in state if (found := re.match(pattern, name))), default=-1)


def _side(state: Mapping[str, Tensor], stem: str) -> int:
    """Height and width of the images: the offset map has one value per pixel."""
    return math.isqrt(state[f"{stem}.move_b4.bias"].numel())


def _deit(state: Mapping[str, Tensor]) -> tuple[str | None, dict[str, Any], bool]:
    """Timm name (None = none of the usual widths), arguments of `timm.create_model`, and whether it has QKR."""
    width, first = state["cls_token"].shape[-1], "blocks.0.attn"
    qkr = f"{first}.q.weight" in state
    if not qkr and f"{first}.qkv.weight" not in state:
        raise KeyError(f"{first}.q.weight")
    kwargs = {
        "img_size": _side(state, "patch_embed.proj"),
        "patch_size": state["patch_embed.proj.weight"].shape[-1],
        "in_chans": state["patch_embed.proj.weight"].shape[1],
        "num_classes": state["head.weight"].shape[0],
        "embed_dim": width,
        "depth": _highest(state, r"blocks\.(\d+)\."),
        # Without QKR no shape tells the number of heads: DeiTs have 64 channels in each.
        "num_heads": state[f"{first}.move_qkx_b4.bias"].numel() // width if qkr else max(width // 64, 1),
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / width,
    }
    size = _DEIT_BY_WIDTH.get(width)
    return size and f"deit_{size}{'_distilled' if 'dist_token' in state else ''}_patch16_224", kwargs, qkr


def _swin(state: Mapping[str, Tensor]) -> tuple[str | None, dict[str, Any], bool]:
    stem = state["features.0.0.weight"]
    stages = range(1, _highest(state, r"features\.(\d+)\."), 2)
    tables = [state[f"features.{s}.0.attn.relative_position_bias_table"] for s in stages]
    depths = tuple(_highest(state, rf"features\.{s}\.(\d+)\.attn\.") for s in stages)
    width, first = stem.shape[0], "features.1.0"
    kwargs = {
        "img_size": _side(state, "features.0.0"),
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
    model = "swin_base" if width == 128 else "swin_small" if max(depths) > 6 else "swin_tiny"
    return f"{model}_patch4_window7_224", kwargs, f"{first}.attn.q.weight" in state


def _their_name(name: str, *, swin: bool, qkr: bool) -> tuple[str, int | None]:
    """Where the tensor called `name` in our state dict is in theirs, and which third of it; None = all of it."""
    if swin:
        name = _renamed(name, _SWIN)
    offset = _STACKED_OFFSET.search(name)
    if offset is None:
        return _renamed(name, _QUANTIZERS), None
    prefix = name[: offset.start()] + "attn."
    return (prefix + "move_v_b4.bias", None) if qkr else (prefix + "move_qkv_b4.bias", "qkv".index(offset[1]))


def _renamed(name: str, table: _Names) -> str:
    for pattern, theirs in table:
        renamed, hits = re.subn(pattern, theirs, name)
        if hits:
            return renamed
    return name


def _fill(net: nn.Module, state: Mapping[str, Tensor], *, swin: bool, qkr: bool, origin: str) -> None:
    """Load their tensors strictly: what the net does not take must be dead, or what it has by itself."""
    found, taken = {}, set()
    for name, own in net.state_dict().items():
        theirs, third = _their_name(name, swin=swin, qkr=qkr)
        if theirs not in state:
            raise UsageError(f"{origin}: tensor {theirs} is missing")
        tensor, shape = state[theirs], own.shape if third is None else torch.Size((3 * own.numel(),))
        # Maps and single numbers are flat there.
        if tensor.numel() != shape.numel() or (tensor.ndim > 1 and tensor.shape != shape):
            raise UsageError(f"{origin}: {theirs} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")
        found[name] = tensor.reshape(shape) if third is None else tensor.reshape(shape).chunk(3)[third]
        taken.add(theirs)
    indices = [index.flatten() for name, index in net.named_buffers() if _WINDOW_INDEX.search(name)]
    for name, tensor in state.items():
        is_default = _CONSTANT.search(name) and bool((tensor == 2).all())
        is_index = _WINDOW_INDEX.search(name) and any(torch.equal(tensor.flatten(), index) for index in indices)
        if name not in taken and not (_DEAD.search(name) or is_default or is_index):
            raise UsageError(f"{origin}: nothing in the net corresponds to {name}")
    net.load_state_dict(found)
