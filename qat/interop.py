"""Load checkpoints of the paper's own code (nbasyl/OFQ 7ed37d1) as models with the same logits.

The state dicts of these checkpoints contain latent weights, LSQ step sizes and offsets under other
names. They state neither the bit-widths nor, for DeiT without QKR, the number of heads; everything
else follows from the names and shapes of tensors.
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
from qat.model.foreign_weights import add_biases
from qat.model.scales import check_finite
from qat.spec import recipe

# Offsets that the authors' files have and our models do not: an offset after the quantizer of keys
# or, with QKR, of the product that replaces keys, only shifts whole rows of the softmax.
_UNUSED_OFFSETS = re.compile(r"(move_qkx_aft|move_k_aft)\.bias$")

# Patterns of our names, and the authors' names; the first match counts. `read_checkpoint` has
# already given Swin's layers timm's names.
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
# Without QKR, the authors' files have one offset of 3C values before the quantizers of q, k and v;
# with QKR, only v has such an offset.
_STACKED_OFFSET = re.compile(r"attn\.([qkv])_quantizer\.offset_before$")


@dataclass(frozen=True)
class OfqNet:
    """A model from a file of the authors' code.

    Attributes:
        net: the quantized model with scales, in eval mode.
        model: timm name of the model.
        note: a line for the user about the file and its bits.
    """

    net: nn.Module
    model: str
    note: str


def is_ofq(state: Mapping[str, Tensor]) -> bool:
    """True if weights come from a quantized model of the authors' code."""
    return any(name.endswith("input_quant_fn.s") for name in state)


def load_ofq_checkpoint(
    path: str | os.PathLike[str],
    model: str | None = None,
    bits: int | None = None,
    act_bits: int | None = None,
    *,
    qkr: bool | None = None,
) -> nn.Module:
    """Load a checkpoint of OFQ's own code: DeiT or Swin, of any depth, with or without QKR.

    Args:
        path: a `.pth.tar` file of the paper's training script, or a plain state dict. Nothing in
            the file is executed.
        model: timm name of the model; None = the shapes of tensors determine it, with 64 channels
            per head in a DeiT without QKR.
        bits: bits of the weights in blocks, which tensors do not reveal; None = as in the
            training arguments in the file, unless the teacher was quantized.
        act_bits: bits of the activations; None = as in the training arguments in the file, or else
            `bits`.
        qkr: whether the model uses query-key reparameterization; None = the file decides.

    Returns:
        The quantized model in eval mode.

    Raises:
        UsageError: the file cannot be read or is not such a checkpoint; a tensor is missing,
            unknown, not finite or has the wrong shape; neither the file nor `bits` states the bits;
            the model was not trained with GELU; or an argument contradicts the file.
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
    """Do the work of `load_ofq_checkpoint` for a file that has already been read."""
    origin = f"ckpt={str(checkpoint.path)!r}"
    state = checkpoint.state
    if not is_ofq(state):
        raise UsageError(
            f"{origin}: no tensor ends with input_quant_fn.s, so OFQ's own code did not write it; "
            "if it contains plain timm weights, set ckpt_format=timm"
        )
    is_swin = any(name.endswith("relative_position_bias_table") for name in state)
    family = "Swin" if is_swin else "DeiT"
    try:
        name, kwargs, has_qkr = _swin_arguments(state) if is_swin else _deit_arguments(state)
    except KeyError as error:
        raise UsageError(f"{origin}: tensor {error.args[0]} is missing") from error
    except (IndexError, ValueError, ArithmeticError) as error:
        raise UsageError(f"{origin}: the shapes do not match any {family} ({error})") from error
    if qkr is not None and qkr != has_qkr:
        layers = "attn.q and attn.k" if has_qkr else "attn.qkv"
        raise UsageError(f"qkr={qkr}: must be {has_qkr}; {origin} contains {layers}")
    if model is not None and model != name:
        named_model = _check_model(model, name, kwargs, state, is_swin=is_swin, origin=origin)
        if not has_qkr and not is_swin:
            # The number of heads cannot be inferred from shapes.
            kwargs["num_heads"] = named_model.blocks[0].attn.num_heads  # type: ignore[union-attr, index]
        name = model
    activation = (checkpoint.args or {}).get("act_layer", "gelu")
    if activation != "gelu":
        raise UsageError(f"{origin}: was trained with act_layer={activation!r}; must be 'gelu'")
    weight_bits, input_bits = _bits(checkpoint, bits, act_bits, origin)
    # For Swin's maps (B, H, W, C), the authors' code has one step size per column.
    map_scales = {"map_scales": "column"} if is_swin else {}
    quant_recipe = recipe(
        "ofq" if has_qkr else "ofq_noqkr",
        bits=weight_bits,
        act_bits=input_bits,
        steps="absolute",
        **map_scales,
    )
    image_size = kwargs["img_size"]
    try:
        check_net(name, kwargs, state, [(image_size, image_size)])
        net: nn.Module = timm.create_model(name, **kwargs)
    except (TypeError, ValueError, AssertionError, RuntimeError, ArithmeticError) as error:
        raise UsageError(f"{origin}: the shapes do not match any {name} ({error})") from error
    _add_merging_biases(net, state)
    convert(net, quant_recipe, input_size=(kwargs["in_chans"], image_size, image_size))
    _load_tensors(net, state, qkr=has_qkr, origin=origin)
    check_finite(net, origin, unset=True)
    bits_text = f"W{quant_recipe.bits}A{quant_recipe.act_bits}"
    note = f"weights, step sizes and offsets of {origin}, read as {quant_recipe.name} {bits_text}"
    num_unused = sum(bool(_UNUSED_OFFSETS.search(tensor_name)) for tensor_name in state)
    if num_unused:
        note += f"; {num_unused} offsets that change no output are left out"
    return OfqNet(net.eval(), name, note)


def _bits(
    checkpoint: Checkpoint, bits: int | None, act_bits: int | None, origin: str
) -> tuple[int, int | None]:
    """Bits of weights and activations: as the file states, or else `bits` and `act_bits`.

    If there was a quantized teacher, the file's bits are ignored: the authors' script overwrites
    the student's bits with the teacher's before saving.
    """
    args = checkpoint.args
    if args is None or args.get("quant_teacher"):
        args = {}
    for setting, value, key in (("bits", bits, "wq_bitw"), ("act_bits", act_bits, "aq_bitw")):
        if value is not None and args.get(key, value) != value:
            raise UsageError(
                f"{setting}={value}: {origin} was trained with {args[key]}, "
                "according to the arguments in the file"
            )
    weight_bits = args.get("wq_bitw", bits)
    if weight_bits is None:
        raise UsageError(
            f"bits=None: {origin} does not state the student's bits, nor do its tensors; "
            "set bits= (ckpt_bits= in a command)"
        )
    return weight_bits, args.get("aq_bitw", act_bits)


def _add_merging_biases(net: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Add the biases that the file has in patch mergings, where timm's models have none."""
    names = []
    for name, _ in net.named_modules():
        if name.endswith("reduction") and f"{name}.bias" in state:
            names.append(name)
    add_biases(net, names)


def _check_model(
    model: str,
    likely_name: str,
    kwargs: Mapping[str, Any],
    state: Mapping[str, Tensor],
    *,
    is_swin: bool,
    origin: str,
) -> nn.Module:
    """Build the model that the user named, on the meta device.

    Raises:
        UsageError: timm has no such model, or its family, its width or the presence of a
            distillation token differs from the file.
    """
    with torch.device("meta"):
        named_model = timm.create_model(model) if timm.is_model(model) else None
    family = SwinTransformer if is_swin else VisionTransformer
    is_distilled = "dist_token" in state
    if (
        not isinstance(named_model, family)
        or named_model.embed_dim != kwargs["embed_dim"]
        or hasattr(named_model, "dist_token") != is_distilled
    ):
        raise UsageError(
            f"model={model!r}: the weights of {origin} do not fit it; "
            f"they look like {likely_name!r}"
        )
    return named_model


def _count_modules(state: Mapping[str, Tensor], pattern: str) -> int:
    """Number of numbered modules: one more than the highest number that `pattern` finds."""
    numbers = []
    for name in state:
        if match := re.match(pattern, name):
            numbers.append(int(match[1]))
    return 1 + max(numbers, default=-1)


def _image_side(state: Mapping[str, Tensor]) -> int:
    """Height and width of images, from the map of offsets, which has one number per pixel."""
    return math.isqrt(state["patch_embed.proj.move_b4.bias"].numel())


def _deit_arguments(state: Mapping[str, Tensor]) -> tuple[str, dict[str, Any], bool]:
    """Timm name, arguments of `timm.create_model`, and whether the model has QKR."""
    width = state["cls_token"].shape[-1]
    attention = "blocks.0.attn"
    has_qkr = f"{attention}.q.weight" in state
    if not has_qkr and f"{attention}.qkv.weight" not in state:
        raise KeyError(f"{attention}.q.weight")
    if has_qkr:
        num_heads = state[f"{attention}.move_qkx_b4.bias"].numel() // width
    else:
        # The number of heads cannot be inferred from shapes, but all DeiTs have 64 channels per
        # head.
        num_heads = max(width // 64, 1)
    kwargs = {
        "img_size": _image_side(state),
        "patch_size": state["patch_embed.proj.weight"].shape[-1],
        "in_chans": state["patch_embed.proj.weight"].shape[1],
        "num_classes": state["head.weight"].shape[0],
        "embed_dim": width,
        "depth": _count_modules(state, r"blocks\.(\d+)\."),
        "num_heads": num_heads,
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / width,
    }
    size = {192: "tiny", 384: "small"}.get(width, "base")
    distilled = "_distilled" if "dist_token" in state else ""
    return f"deit_{size}{distilled}_patch16_224", kwargs, has_qkr


def _swin_arguments(state: Mapping[str, Tensor]) -> tuple[str, dict[str, Any], bool]:
    """Timm name, arguments of `timm.create_model`, and whether the model has QKR."""
    stem = state["patch_embed.proj.weight"]
    width = stem.shape[0]
    first_block = "layers.0.blocks.0"
    depths = []
    tables = []
    for stage in range(_count_modules(state, r"layers\.(\d+)\.")):
        depths.append(_count_modules(state, rf"layers\.{stage}\.blocks\.(\d+)\.attn\."))
        tables.append(state[f"layers.{stage}.blocks.0.attn.relative_position_bias_table"])
    kwargs = {
        "img_size": _image_side(state),
        "patch_size": stem.shape[-1],
        "in_chans": stem.shape[1],
        "num_classes": state["head.fc.weight"].shape[0],
        "embed_dim": width,
        "depths": tuple(depths),
        "num_heads": tuple(table.shape[1] for table in tables),
        "window_size": (math.isqrt(tables[0].shape[0]) + 1) // 2,
        "mlp_ratio": state[f"{first_block}.mlp.fc1.weight"].shape[0] / width,
        "drop_path_rate": 0.0,
    }
    size = "small" if max(depths) > 6 else "tiny"
    if width == 128:
        size = "base"
    has_qkr = f"{first_block}.attn.q.weight" in state
    return f"swin_{size}_patch4_window7_224", kwargs, has_qkr


def _authors_name(name: str, *, qkr: bool) -> tuple[str, int | None]:
    """The authors' name for our tensor, and which third of the authors' tensor ours is.

    The third is None if ours is the whole tensor.
    """
    stacked = _STACKED_OFFSET.search(name)
    if stacked:
        prefix = name[: stacked.start()] + "attn."
        if qkr:
            return prefix + "move_v_b4.bias", None
        return prefix + "move_qkv_b4.bias", "qkv".index(stacked[1])
    for pattern, replacement in _NAMES:
        renamed, num_matches = re.subn(pattern, replacement, name)
        if num_matches:
            return renamed, None
    return name, None


def _load_tensors(net: nn.Module, state: Mapping[str, Tensor], *, qkr: bool, origin: str) -> None:
    """Load the authors' tensors into a model; the authors store maps and scalars as flat tensors.

    Offsets that change no output are ignored, and so is StatsQ's `clip_val` if it is 2.

    Raises:
        UsageError: a tensor is missing, has the wrong shape, or has no counterpart in the model.
    """
    tensors = {}
    used_names = set()
    for name, our_tensor in net.state_dict().items():
        authors_name, third = _authors_name(name, qkr=qkr)
        if authors_name not in state:
            raise UsageError(f"{origin}: tensor {authors_name} is missing")
        tensor = state[authors_name]
        shape = our_tensor.shape if third is None else torch.Size((3 * our_tensor.numel(),))
        if tensor.numel() != shape.numel() or (tensor.ndim > 1 and tensor.shape != shape):
            raise UsageError(
                f"{origin}: {authors_name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}"
            )
        tensor = tensor.reshape(shape)
        tensors[name] = tensor if third is None else tensor.chunk(3)[third]
        used_names.add(authors_name)
    for name in sorted(state.keys() - used_names):
        is_clip_of_two = name.endswith("clip_val") and bool((state[name] == 2).all())
        if not is_clip_of_two and not _UNUSED_OFFSETS.search(name):
            raise UsageError(
                f"{origin}: tensor {name} has no counterpart in the model; "
                "must be an unchanged DeiT or Swin checkpoint of OFQ's own code"
            )
    net.load_state_dict(tensors)
