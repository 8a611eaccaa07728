"""Weights of a net fake-quantized with other step sizes or at other widths; for a while, bit-exactly undone."""

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
from qat.ptq.runner import patched
from qat.quantizers import Quantizer, UniformGrid, build_quantizer
from qat.spec import PRESETS, QuantRecipe, QuantSpec
from qat.utils.validate import FLOAT_BITS, HIGHEST_BITS

log = logging.getLogger(__name__)
STEPS_FROM = ("own", "mse")


@torch.no_grad()
def requantized(
    quantizer: Quantizer,
    weight: Tensor,
    *,
    bits: int | None = None,
    steps_from: str = "own",
    resize: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """A weight, fake-quantized otherwise than its quantizer does; by default in the same way, to the last bit.

    Args:
        quantizer: of the weight, with evenly spaced values; only read.
        weight: the float master (out, ...), what the quantizer is called with.
        bits: width, 2 to 8; 32 = the float weight; None = the quantizer's.
        steps_from: where step sizes come from: the quantizer's `own` rule (at its own width: those in force), or `mse`, the range of each
            slice shrunk to the least squared error (not for half steps, whose rule is their own).
        resize: makes the step sizes used of those. The range of codes stays, so that values beyond it are clamped as in deployment.

    Returns:
        The shape and dtype of `weight`.
    """
    if bits == FLOAT_BITS:
        return weight
    if bits not in {None, quantizer.spec.bits}:
        quantizer = type(quantizer)(dataclasses.replace(quantizer.spec, bits=bits))
        quantizer.allocate(weight.shape, weight.device)
        quantizer.calibrate(weight, {})
    grid = cast(UniformGrid, quantizer.grid(weight))
    if steps_from == "mse" and not grid.is_half_step:
        step, zero = affine_scale(
            weight, quantizer.spec.bits, signed=grid.qmin < 0, axis=grid.axis, method="mse"
        )
        grid = dataclasses.replace(grid, step=step, zero_point=zero)
    if resize is not None:
        grid = dataclasses.replace(grid, step=resize(grid.step))
    y = grid.dequantize(grid.to_code_coordinates(weight).round().clamp(grid.qmin, grid.qmax))
    if quantizer.spec.bias_correction:
        y = correct_mean_and_std(y, weight.float(), grid.axis or 0)
    return y.to(weight.dtype)


def nearest_power_of_two(x: Tensor) -> Tensor:
    """2^round(log2 x) of non-negative numbers, exactly; 0 stays 0."""
    mantissa, exponent = torch.frexp(x)
    rounded = torch.where(mantissa >= 0.5**0.5, exponent, exponent - 1)
    return torch.where(x > 0, torch.ldexp(torch.ones_like(x), rounded), x)


@dataclass(frozen=True)
class WeightSite:
    """A weight whose quantization can be changed.

    Attributes:
        name: of the module that owns it.
        place: `stem`, `block` or `head`.
        quantizer: what the net calls.
        rule: what `requantized` reads: the quantizer, or for a float weight one with symmetric codes.
        bits: in force, 32 = float.
        shape: of the weight, (out, ...).
    """

    name: str
    place: str
    quantizer: Quantizer
    rule: Quantizer
    bits: int
    shape: torch.Size


def weight_sites(
    net: nn.Module, input_size: tuple[int, int, int], float_axis: int | None = 0
) -> tuple[nn.Module, list[WeightSite]]:
    """The weights of a net, quantized or not; one whose quantizer has no grid of evenly spaced values is named in the log.

    Args:
        net: quantized with scales filled, or float; stays as it is.
        input_size: of its images.
        float_axis: dimension of float weights that gets step sizes of its own when they are quantized, None = one for the tensor.

    Returns:
        What to evaluate, the net itself or of a net without quantizers a twin that shares its tensors; its weights.
    """
    if conversion_of(net) is None:
        shared = {id(t): t for t in (*net.parameters(), *net.buffers())}
        identities = QuantRecipe(
            **PRESETS["fp"]
        )  # unlike qat.recipe("fp"), which leaves a net untouched
        net = convert(copy.deepcopy(net, shared), identities, input_size=input_size).eval()
    places, found = stem_and_heads(net), []
    symmetric = build_quantizer(
        QuantSpec("weight", "minmax_dynamic", HIGHEST_BITS, axis=float_axis)
    )
    for site in (site for site in iter_quantizers(net) if site.is_weight):
        quantizer, weight = site.quantizer, site.latent().detach()
        if quantizer.is_float or isinstance(quantizer.grid(weight), UniformGrid):
            rule, bits = (
                (symmetric, FLOAT_BITS) if quantizer.is_float else (quantizer, quantizer.spec.bits)
            )
            found.append(
                WeightSite(
                    site.layer, places.get(site.layer, "block"), quantizer, rule, bits, weight.shape
                )
            )
        else:
            log.warning(
                "%s: its quantizer has no uniform grid; this weight is left unchanged", site.name
            )
    return net, found


def is_float(sites: Sequence[WeightSite]) -> bool:
    """True if no weight is quantized."""
    return all(site.bits == FLOAT_BITS for site in sites)


def in_blocks(sites: Sequence[WeightSite]) -> list[WeightSite]:
    """Weights of blocks, those that a quantized net leaves in float not among them."""
    return [
        site
        for site in sites
        if site.place == "block" and (site.bits != FLOAT_BITS or is_float(sites))
    ]


def changed(sites: Sequence[WeightSite], **change: Any) -> AbstractContextManager[None]:
    """While it lasts these weights are `requantized` with a change; no tensor of the net is touched."""
    return patched({
        site.quantizer: functools.partial(requantized, site.rule, **change) for site in sites
    })
