"""Fake-quantize weights of a model with other step sizes or bits inside a `with` block.

After the block, the model is unchanged, bit for bit.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from qat.functional.affine import correct_mean_and_std
from qat.functional.observers import affine_scale
from qat.model.convert import conversion_of, convert, stem_and_heads
from qat.model.sites import iter_quantizers
from qat.ptq.runner import Forward, patch_forwards
from qat.quantizers import Quantizer, UniformGrid, build_quantizer
from qat.spec import PRESETS, QuantRecipe, QuantSpec
from qat.utils.validate import FLOAT_BITS, MAX_BITS

log = logging.getLogger(__name__)
STEPS_FROM = ("own", "mse")


@torch.no_grad()
def requantize(
    quantizer: Quantizer,
    weight: Tensor,
    *,
    bits: int | None = None,
    steps_from: str = "own",
    resize: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Fake-quantize a weight with other settings; the defaults repeat what its quantizer does.

    Args:
        quantizer: quantizer with a uniform grid; it is not changed.
        weight: latent float weight (out, ...) that the model passes to the quantizer.
        bits: 2 to 8; 32 = the float weight; None = the quantizer's own bits.
        steps_from: `own` computes step sizes by the quantizer's rule, and keeps the current step
            sizes if the bits do not change. `mse` shrinks the range of each slice until the squared
            error is smallest; grids with half steps still use the quantizer's rule.
        resize: function that maps the step sizes of `steps_from` to others; None = no change. The
            range of codes is kept, so values outside the range are clamped, as in deployment.

    Returns:
        The fake-quantized weight, with the shape and dtype of `weight`.
    """
    if bits == FLOAT_BITS:
        return weight
    if bits not in {None, quantizer.spec.bits}:
        quantizer = type(quantizer)(dataclasses.replace(quantizer.spec, bits=bits))
        quantizer.allocate(weight.shape, weight.device)
        quantizer.calibrate(weight, {})
    grid = cast(UniformGrid, quantizer.grid(weight))
    if steps_from == "mse" and not grid.is_half_step:
        step, zero_point = affine_scale(
            weight, quantizer.spec.bits, signed=grid.qmin < 0, axis=grid.axis, method="mse"
        )
        grid = dataclasses.replace(grid, step=step, zero_point=zero_point)
    if resize is not None:
        grid = dataclasses.replace(grid, step=resize(grid.step))
    dequantized = grid.dequantize(grid.codes(weight))
    if quantizer.spec.bias_correction:
        dequantized = correct_mean_and_std(dequantized, weight.float(), grid.axis or 0)
    return dequantized.to(weight.dtype)


def nearest_power_of_two(x: Tensor) -> Tensor:
    """Nearest power of two on a logarithmic scale, for x of at least 0; 0 stays 0."""
    mantissa, exponent = torch.frexp(x)
    # In float64, because float32 would round sqrt(1/2) down.
    rounded_exponent = torch.where(mantissa.double() >= 0.5**0.5, exponent, exponent - 1)
    return torch.where(x > 0, torch.ldexp(torch.ones_like(x), rounded_exponent), x)


@dataclass(frozen=True)
class WeightSite:
    """A weight whose quantization can be changed.

    Attributes:
        name: name of the weight's module.
        place: `stem`, `head`, or `block` for any other part of the model.
        quantizer: the quantizer that the model calls.
        requantizer: the quantizer that `requantize` uses. Equal to `quantizer`, except for a float
            weight, where it is a quantizer with symmetric codes.
        bits: current bits; 32 = float.
        shape: shape of the weight, (out, ...).
    """

    name: str
    place: str
    quantizer: Quantizer
    requantizer: Quantizer
    bits: int
    shape: torch.Size


def weight_sites(
    net: nn.Module, input_size: tuple[int, int, int], float_axis: int | None = 0
) -> tuple[nn.Module, list[WeightSite]]:
    """List the weights of a model, quantized or not.

    Weights whose quantizer has no uniform grid are left out, with a warning in the log.

    Args:
        net: a float model, or a quantized model whose scales are set; not changed.
        input_size: (channels, height, width) of the images.
        float_axis: dimension along which step sizes differ if a float weight is quantized; None =
            one step size for the whole tensor.

    Returns:
        The model to evaluate, and its weights. If `net` has no quantizers, the model to evaluate is
        a converted copy that shares the tensors of `net`.
    """
    if conversion_of(net) is None:
        shared_tensors = {id(t): t for t in (*net.parameters(), *net.buffers())}
        # qat.recipe("fp") would add no quantizers at all; this recipe adds float ones.
        identity_recipe = QuantRecipe(**PRESETS["fp"])
        net = convert(
            copy.deepcopy(net, shared_tensors), identity_recipe, input_size=input_size
        ).eval()
    symmetric_spec = QuantSpec("weight", "minmax_dynamic", MAX_BITS, axis=float_axis)
    symmetric_quantizer = build_quantizer(symmetric_spec)
    place_of = stem_and_heads(net)
    weights = []
    for site in iter_quantizers(net):
        if not site.is_weight:
            continue
        weight = site.latent().detach()
        requantizer = site.quantizer
        bits = requantizer.spec.bits
        if requantizer.is_float:
            requantizer = symmetric_quantizer
            bits = FLOAT_BITS
        elif not isinstance(requantizer.grid(weight), UniformGrid):
            log.warning(
                "%s: this quantizer has no uniform grid; the weight is left unchanged", site.name
            )
            continue
        weights.append(
            WeightSite(
                name=site.layer,
                place=place_of.get(site.layer, "block"),
                quantizer=site.quantizer,
                requantizer=requantizer,
                bits=bits,
                shape=weight.shape,
            )
        )
    return net, weights


def all_float(sites: Sequence[WeightSite]) -> bool:
    """True if all of these weights are in float."""
    return all(site.bits == FLOAT_BITS for site in sites)


def block_weights(sites: Sequence[WeightSite]) -> list[WeightSite]:
    """Weights besides stem and heads, without those that a quantized model leaves in float."""
    blocks = [site for site in sites if site.place == "block"]
    if all_float(sites):
        return blocks
    return [site for site in blocks if site.bits != FLOAT_BITS]


def requantize_weights(sites: Sequence[WeightSite], **change: Any) -> AbstractContextManager[None]:
    """Requantize weights inside a `with` block; no tensor is modified.

    `change` contains arguments of `requantize`.
    """
    forwards: dict[nn.Module, Forward] = {}
    for site in sites:
        forwards[site.quantizer] = functools.partial(requantize, site.requantizer, **change)
    return patch_forwards(forwards)
