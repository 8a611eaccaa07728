"""Freeze a model: replace float weights by integer codes, and fold offsets into biases."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn

from qat.errors import UsageError
from qat.functional.affine import correct_mean_and_std
from qat.model.convert import conversion_of
from qat.model.frozen import (
    OFFSETS,
    FrozenActivation,
    FrozenBlocks,
    FrozenFp8,
    FrozenFp8Activation,
    FrozenNonuniform,
    FrozenWeight,
    is_frozen,
)
from qat.model.scales import assert_ready
from qat.model.sites import Site, iter_quantizers
from qat.nn import FqNet, QkrAttention, hf_models
from qat.nn.linear import QuantLinear
from qat.nn.quant_module import QuantModule
from qat.nn.swin import QuantWindowAttention
from qat.nn.vit import QuantVitAttention
from qat.quantizers import BlockFloat, Fp8Grid, Quantizer, UniformGrid
from qat.utils.probing import copy_net

NOT_PLAIN_MESSAGE = (
    "is pruned or parametrized; must have plain weights: "
    "prune.remove and remove_parametrizations of torch.nn.utils keep the values"
)
# Attentions in which only norms, if any, change the output of `qkv` before the quantizers.
DIRECT_ATTENTIONS = (QuantVitAttention, QuantWindowAttention)


def freeze(net: nn.Module) -> nn.Module:
    """Return a copy of a quantized model with integer codes in place of float weights.

    Parameters of the copy cannot be trained. A weight becomes codes with the scales of its
    quantizer; a code k of StatsQ, SEQ or DoReFa means (k + 1/2) * step size. With query-key
    reparameterization, the folded matrix becomes codes. If an offset c after the
    quantizer of a linear layer's input has one number per channel, it becomes part of the layer's
    bias (W c). In attentions of ViT and Swin, offsets before the quantizers of queries, keys and
    values become part of the bias of the layer that computes them; if a norm changes queries or
    keys, or with query-key reparameterization, only offsets before the quantizers of values do.
    Of the other offsets in quantizers of activations, only those that are zero are removed.

    Args:
        net: a converted model whose scales are all set; it is not changed.

    Returns:
        The frozen model, in float32 and evaluation mode. `qat.iter_quantizers` finds its
        quantizers, whose `codes()` returns the codes of a weight.

    Raises:
        UsageError: the model is in float or already frozen, a scale was never set, a quantizer
            cannot be frozen, or the weight of a quantized layer is computed from other tensors
            (pruning, parametrizations).
    """
    if conversion_of(net) is None:
        raise UsageError(
            "freeze: the model is not quantized; "
            "convert and train it first, or load a quantized checkpoint"
        )
    if is_frozen(net):
        raise UsageError("freeze: the model is already frozen")
    assert_ready(net)
    # Transformers' own `float` method refuses quantized models.
    frozen = freeze_structure(nn.Module.float(copy_net(net)))
    if hf_models(frozen):
        frozen.save_pretrained = _refuse_to_save  # type: ignore[assignment]
    nonzero = {name for name, tensor in frozen.state_dict().items() if tensor.any()}
    prune_offsets(frozen, nonzero)
    return frozen


def _refuse_to_save(*_: object, **__: object) -> None:
    raise UsageError(
        "save_pretrained: the model is frozen; use qat.save, which writes its integer codes"
    )


def can_recover_weights(net: nn.Module) -> bool:
    """True unless freezing may have lost weights or biases; codes count as weights.

    With QKR, only the folded matrix is left. If the model still has some offsets, others may have
    been folded into biases and cannot be separated from them.
    """
    for quantizer in _frozen_activations(net):
        if quantizer.before is not None or quantizer.after is not None:
            return False
    if not is_frozen(net):
        return True
    return not any(isinstance(module, QkrAttention) for module in net.modules())


@torch.no_grad()
def freeze_structure(net: nn.Module) -> nn.Module:
    """Freeze a model in place; scales may still be NaN, to be loaded from a file afterwards."""
    net.eval().requires_grad_(requires_grad=False)
    for site in list(iter_quantizers(net)):
        setattr(site.owner, site.name.rpartition(".")[2], _freeze_quantizer(site))
    for module in net.modules():
        if isinstance(module, QuantModule):
            _drop_float_weights(module)
    for module in net.modules():
        _fold_offsets(module)
    if isinstance(net, FqNet):
        net.connect_norms()
    return net


def prune_offsets(net: nn.Module, names: Collection[str]) -> None:
    """Remove the offsets that are not in `names`: files leave out offsets that are zero."""
    for name, module in net.named_modules():
        if not isinstance(module, FrozenActivation):
            continue
        for offset in OFFSETS:
            if f"{name}.{offset}" not in names:
                setattr(module, offset, None)


def _frozen_activations(net: nn.Module) -> Iterator[FrozenActivation]:
    return (module for module in net.modules() if isinstance(module, FrozenActivation))


def _freeze_quantizer(site: Site) -> Quantizer:
    """The frozen version of a site's quantizer; a float quantizer is returned unchanged."""
    quantizer = site.quantizer
    if quantizer.is_float:
        return quantizer
    weight = site.latent().detach() if site.is_weight else None
    if weight is not None:
        _check_plain(site)
    grid = quantizer.grid(weight)
    if isinstance(grid, UniformGrid):
        if weight is None:
            return FrozenActivation(quantizer.spec, site.name, grid)
        return _freeze_weight(site, grid, weight)
    if weight is not None and isinstance(quantizer, BlockFloat):
        return FrozenBlocks(quantizer, site.name, weight)
    if isinstance(grid, Fp8Grid):
        if weight is None:
            return FrozenFp8Activation(quantizer, site.name)
        parts = (quantizer.codes(weight), grid.scales, None, None)
        return FrozenFp8(quantizer.spec, grid.axis, site.name, parts)
    if grid is None or weight is not None or grid.before is not None:
        name = quantizer.spec.quantizer
        raise UsageError(
            f"freeze: {site.name} uses quantizer {name}, which cannot be frozen; "
            "use a quantizer whose `grid()` returns a UniformGrid"
        )
    return FrozenNonuniform(quantizer, site.name)


def _check_plain(site: Site) -> None:
    names = {"q_weight", "k_weight"} if site.role == "qk" else {"weight"}
    if not names <= site.owner._parameters.keys():
        raise UsageError(f"freeze: {site.layer} {NOT_PLAIN_MESSAGE}")


def _freeze_weight(site: Site, grid: UniformGrid, weight: Tensor) -> FrozenWeight:
    spec = site.quantizer.spec
    codes = site.quantizer.codes(weight).to(torch.int8 if grid.qmin < 0 else torch.uint8)
    scale = grid.step.clone()
    shift = torch.zeros_like(grid.step) - grid.zero_point
    axis = grid.axis
    after = None
    if grid.after is not None:
        axis = axis or 0
        after = _row_offsets(site.name, grid.after.detach().float().expand_as(weight), axis)
        scale = scale.expand(len(after)).clone()
        shift = shift.expand(len(after)).clone()
    frozen = FrozenWeight(spec, axis, site.name, (codes, scale, shift, after))
    return _fold_bias_correction(frozen, weight) if spec.bias_correction else frozen


def _row_offsets(name: str, offsets: Tensor, axis: int) -> Tensor:
    rows = offsets.movedim(axis, 0).flatten(1)
    if (rows != rows[:, :1]).any():
        raise UsageError(
            f"freeze: {name} has an offset after its quantizer that differs within a row; "
            "must be one for each row"
        )
    return rows[:, 0].clone()


def _fold_bias_correction(frozen: FrozenWeight, weight: Tensor) -> FrozenWeight:
    """Fold bias correction, an affine map of each row, into the row's scale and `after`."""
    axis = frozen.axis or 0
    dequantized = frozen()
    rows = dequantized.movedim(axis, 0).flatten(1)
    corrected = correct_mean_and_std(dequantized, weight, axis).movedim(axis, 0).flatten(1)
    centered = rows - rows.mean(1, keepdim=True)
    mean = corrected.mean(1, keepdim=True)
    # The factor of the map, by least squares.
    sum_of_squares = centered.square().sum(1)
    covariance = ((corrected - mean) * centered).sum(1)
    ratio = torch.where(sum_of_squares > 0, covariance / sum_of_squares, 1.0)
    num_rows = len(rows)
    parts = (
        frozen.stored,
        frozen.scale.expand(num_rows) * ratio,
        frozen.shift.expand(num_rows).clone(),
        corrected.mean(1) - ratio * rows.mean(1),
    )
    return FrozenWeight(frozen.spec, axis, frozen.name, parts)


def _drop_float_weights(module: QuantModule) -> None:
    if isinstance(module, QkrAttention):
        if isinstance(module.qk_quantizer, FrozenWeight):
            module.fold_bias()
            for name in ("q_weight", "k_weight", "q_bias"):
                setattr(module, name, None)
    elif isinstance(module.weight_quantizer, FrozenWeight):
        # Keep an empty weight, because timm's models read the device and dtype of a layer's weight.
        empty = module.latent("weight").new_empty(0)
        del module.weight
        module.register_buffer("weight", empty, persistent=False)


def _fold_offsets(module: nn.Module) -> None:
    """Fold offsets before and after linear layers into biases, as `freeze` describes."""
    if isinstance(module, QuantLinear) and isinstance(module.input_quantizer, FrozenActivation):
        offset = module.input_quantizer.after
        if offset is not None and offset.shape == (module.in_features,):
            _add_to_bias(module, slice(None), module.quantized_weight("weight").float() @ offset)
            module.input_quantizer.after = None
    if isinstance(module, QkrAttention) and isinstance(module.v, QuantLinear):
        _fold_offset_before(module.v_quantizer, module.v, slice(None))
    if type(module) in DIRECT_ATTENTIONS and isinstance(module.qkv, QuantLinear):
        size = module.qkv.out_features // 3
        if isinstance(module.q_norm, nn.Identity) and isinstance(module.k_norm, nn.Identity):
            _fold_offset_before(module.q_quantizer, module.qkv, slice(0, size))
            _fold_offset_before(module.k_quantizer, module.qkv, slice(size, 2 * size))
        _fold_offset_before(module.v_quantizer, module.qkv, slice(2 * size, 3 * size))


def _fold_offset_before(quantizer: object, linear: QuantLinear, rows: slice) -> None:
    if isinstance(quantizer, FrozenActivation) and quantizer.before is not None:
        _add_to_bias(linear, rows, quantizer.before)
        quantizer.before = None


def _add_to_bias(linear: QuantLinear, rows: slice, summand: Tensor) -> None:
    if linear.bias is None:
        bias = torch.zeros(linear.out_features, device=summand.device)
    else:
        bias = linear.bias.detach().float().clone()
    bias[rows] += summand
    linear.bias = nn.Parameter(bias, requires_grad=False)
