"""Checkpoints of the paper's own code (nbasyl/OFQ 7ed37d1): same logits, in a net of ours.

Their state dicts hold latent weights, LSQ steps and offsets under names of their own, and neither bits nor the number of heads.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from qat.errors import UsageError
from qat.interop.fill import LIKELY_BITS, fill, likely_act_bits, mergings_with_bias
from qat.interop.layout import OfqLayout, is_ofq, read_layout
from qat.interop.names import DEAD
from qat.model.biases import grow_biases
from qat.model.checkpoint import Checkpoint, read_checkpoint
from qat.model.convert import convert
from qat.spec import QuantRecipe, recipe

__all__ = ["OfqNet", "is_ofq", "load_ofq_checkpoint", "net_from_ofq"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OfqNet:
    """A net read from a file of the authors.

    Attributes:
        net: quantized, scales filled, in eval mode.
        model: its timm name.
        notes: what a person should be told, a line each.
    """

    net: nn.Module
    model: str
    notes: list[str] = field(default_factory=list)


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
    origin = f"ckpt={str(checkpoint.path)!r}"
    layout = read_layout(checkpoint.state, origin)
    if qkr is not None and qkr != layout.qkr:
        has = "attn.q and attn.k (qkr=True)" if layout.qkr else "attn.qkv (qkr=False)"
        raise UsageError(f"qkr={qkr}: {origin} holds {has}")
    name, kwargs = _constructor(layout, model, origin)
    wanted = _recipe(checkpoint.args, layout, bits, act_bits, origin)
    net = _built(name, kwargs, origin)
    grow_biases(net, mergings_with_bias(net, checkpoint.state))
    convert(net, wanted, input_size=layout.input_size)
    fill(net, checkpoint.state, layout, origin)
    return OfqNet(net.eval(), name, _notes(net, checkpoint.state, origin, wanted))


def _built(name: str, kwargs: dict[str, Any], origin: str) -> nn.Module:
    try:
        net: nn.Module = timm.create_model(name, **kwargs)
    except (TypeError, ValueError, AssertionError, RuntimeError, ArithmeticError) as error:
        raise UsageError(f"{origin}: its shapes are those of no {name} ({' '.join(str(error).split())})") from error
    return net


def _constructor(layout: OfqLayout, model: str | None, origin: str) -> tuple[str, dict[str, Any]]:
    """Timm name and arguments; the widths of `model` have to be those of the file."""
    if model is None:
        if layout.model is None:
            raise UsageError(f"{origin}: width {layout.kwargs['embed_dim']} is of no DeiT known here; give model='timm name'")
        return layout.model, layout.kwargs
    if not timm.is_model(model):
        raise UsageError(f"model={model!r}: timm has no such model; the file looks like {layout.model!r}")
    with torch.device("meta"):
        base = timm.create_model(model)
    family = SwinTransformer if layout.swin else VisionTransformer
    same = isinstance(base, family) and base.embed_dim == layout.kwargs["embed_dim"] and hasattr(base, "dist_token") == layout.distilled
    if not same:
        raise UsageError(f"model={model!r}: the weights of {origin} are not of its shape; they look like {layout.model!r}")
    kwargs = layout.kwargs
    if not (layout.qkr or layout.swin):
        kwargs = {**kwargs, "num_heads": base.blocks[0].attn.num_heads}  # type: ignore[union-attr, index]
    return model, kwargs


def _recipe(args: Mapping[str, Any] | None, layout: OfqLayout, bits: int | None, act_bits: int | None, origin: str) -> QuantRecipe:
    """The recipe that the file was trained with.

    Raises:
        UsageError: neither the arguments nor the file say the bits, or both do and differ.
    """
    # Their script writes the bits of a quantized teacher over the student's before it saves.
    said = {} if args is None or args.get("quant_teacher") else args
    weights = _settled("bits", bits, said.get("wq_bitw"), origin)
    if weights is None:
        raise UsageError(f"bits=None: {origin} does not say its bits, and no tensor tells them; give bits= (ckpt_bits= in a command)")
    acts = _settled("act_bits", act_bits, said.get("aq_bitw"), origin)
    # In a Swin the authors' rule of a step per position meets (B, H, W, C): there it is one per column.
    columns = {"map_scales": "column"} if layout.swin else {}
    return recipe("ofq" if layout.qkr else "ofq_noqkr", bits=weights, act_bits=acts, steps="absolute", **columns)


def _settled(setting: str, given: int | None, said: Any, origin: str) -> int | None:
    if given is not None and isinstance(said, int) and given != said:
        raise UsageError(f"{setting}={given}: {origin} was trained with {said}, as its own arguments say")
    return said if given is None and isinstance(said, int) else given


def _notes(net: nn.Module, state: Mapping[str, Tensor], origin: str, used: QuantRecipe) -> list[str]:
    notes = [f"weights, steps and offsets of {origin}, read as {used.name} W{used.bits}A{used.act_bits}"]
    dead = [name for name in state if DEAD.search(name)]
    if dead:
        notes.append(f"left out, without effect on any output: {', '.join(dead)}")
    likely, mean = likely_act_bits(net)
    if used.act_bits in LIKELY_BITS and likely != used.act_bits:
        notes.append(f"warning: activation steps of {mean:.2f} on average would fit {likely} bits better than {used.act_bits}")
    return notes
