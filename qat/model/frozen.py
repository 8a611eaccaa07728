"""The deployable form of a quantized net: integer codes and fixed grids; the float masters are gone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qat.errors import UsageError
from qat.functional.affine import correct_mean_and_std
from qat.functional.block_floats import block_float_codes
from qat.functional.packing import pack_pairs
from qat.functional.ste import check_fit, code_dtype, view_along
from qat.model.convert import conversion_of
from qat.model.scales import assert_ready
from qat.model.sites import Site, iter_quantizers
from qat.nn import FqNet, QkrAttention
from qat.nn.linear import QuantLinear
from qat.nn.quant_module import QuantModule
from qat.nn.swin import QuantWindowAttention
from qat.nn.vit import QuantVitAttention
from qat.quantizers import BlockFloat, FloatGrid, Grid, Quantizer, UniformGrid
from qat.spec import QuantSpec
from qat.utils.probing import copied

# Of activations: added before the rounding, and after it.
OFFSETS = ("before", "after")
NOT_PLAIN = "is pruned or parametrized; must have plain weights: prune.remove and remove_parametrizations of torch.nn.utils keep the values"


class Frozen(Quantizer):
    """A quantizer without parameters.

    Attributes:
        name: of its site.
        in_graph: takes what `forward` takes and gives what products of an exported graph take; None except while a graph is written.
    """

    in_graph: Callable[[Any], Any] | None = None

    def __init__(self, spec: QuantSpec, axis: int | None, name: str) -> None:
        super().__init__(dataclasses.replace(spec, offsets="none"))
        self.axis, self.name = axis, name


class FrozenWeight(Frozen):
    """(codes + shift) * scale + after.

    Attributes:
        stored: codes of the weight, int8 or uint8, its shape.
        scale: step size, (n,), of each row or one for all.
        shift: 1/2 for StatsQ, minus the zero point for affine grids; (n,) in codes, whole or half numbers.
        after: what is added to a row, by bias correction or by the quantizer, (n,), or None.
    """

    stored: Tensor
    scale: Tensor
    shift: Tensor
    after: Tensor | None

    def __init__(
        self,
        spec: QuantSpec,
        axis: int | None,
        name: str,
        parts: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    ) -> None:
        super().__init__(spec, axis, name)
        for key, value in zip(("stored", "scale", "shift", "after"), parts, strict=True):
            self.register_buffer(key, value)

    def forward(self, x: Tensor | None = None) -> Tensor:
        """The weight, float32, whatever `x` is."""
        return self.grid().dequantize(self.stored)

    def held(self) -> Tensor:
        """The weight."""
        return self() if self.in_graph is None else self.in_graph(None)

    def codes(self, x: Tensor | None = None) -> Tensor:
        """`stored`."""
        return self.stored

    def grid(self, x: Tensor | None = None) -> Grid:
        """Of the float weight that is gone."""
        lowest = -(2 ** (self.spec.bits - 1)) if self.stored.dtype == torch.int8 else 0
        highest = lowest + 2**self.spec.bits - 1
        after = None if self.after is None else view_along(self.after, self.stored.ndim, self.axis)
        return UniformGrid(
            qmin=lowest,
            qmax=highest,
            step=self.scale,
            zero_point=-self.shift,
            axis=self.axis,
            after=after,
        )


class FrozenBlocks(FrozenWeight):
    """Floats in blocks.

    Attributes:
        stored: codes of the weight, bits of E2M1 or E4M3, uint8, its shape.
        scale: bytes of the scales of blocks, E4M3 or E8M0, uint8; blocks are the last dimension.
        per_tensor_scale: what E4M3 scales are multiplied with, a scalar in float32; None where they are powers of two.
    """

    in_blocks = True
    per_tensor_scale: Tensor | None
    like: Tensor

    def __init__(self, quantizer: BlockFloat, name: str, weight: Tensor) -> None:
        codes, factors, t = block_float_codes(weight.movedim(quantizer.dim, -1), quantizer.form)
        self.scale_dtype = torch.float8_e8m0fnu if t is None else torch.float8_e4m3fn
        scale = factors.to(self.scale_dtype).view(torch.uint8)
        super().__init__(
            quantizer.spec,
            quantizer.axis,
            name,
            (codes.movedim(-1, quantizer.dim).contiguous(), scale, None, None),
        )
        self.register_buffer("per_tensor_scale", t)
        self.register_buffer("like", weight.new_empty(0), persistent=False)  # of the net's dtype
        self.empty = quantizer.grid()

    def held(self) -> Tensor:
        """The weight, in the dtype of the net."""
        return self().to(self.like.dtype)

    def grid(self, x: Tensor | None = None) -> FloatGrid:
        """Of the float weight that is gone."""
        factors = self.scale.view(self.scale_dtype).float().movedim(-1, self.empty.dim)
        return dataclasses.replace(self.empty, factors=factors, tensor_scale=self.per_tensor_scale)

    def packed(self) -> dict[str, Tensor]:
        """What torchao's `MXTensor` and `NVFP4Tensor` hold: `qdata`, two E2M1 codes a byte, `scale`, `per_tensor_scale`."""
        codes = self.stored.movedim(self.empty.dim, -1)
        qdata = (
            pack_pairs(codes)
            if self.spec.bits == 4
            else codes.contiguous().view(torch.float8_e4m3fn)
        )
        found = {"qdata": qdata, "scale": self.scale.view(self.scale_dtype)}
        return (
            found
            if self.per_tensor_scale is None
            else found | {"per_tensor_scale": self.per_tensor_scale}
        )


class FrozenActivation(Frozen):
    """(clamp(round((x + a) / s + z), qmin, qmax) - z) * s + c.

    Attributes:
        scale: s, (n,), in the unit of the input.
        zero_point: z, (n,), whole or half numbers, or None = 0.
        before: a, over trailing dimensions, or None.
        after: c, over trailing dimensions, or None.
        bounds: lowest and highest code, int16, (2,): calibration finds whether those of an image have a sign.
        qmin, qmax: the same as numbers.
    """

    bounds: Tensor

    scale: Tensor
    zero_point: Tensor | None
    before: Tensor | None
    after: Tensor | None

    def __init__(self, spec: QuantSpec, name: str, grid: UniformGrid) -> None:
        super().__init__(spec, grid.axis, name)
        self.qmin, self.qmax = grid.qmin, grid.qmax
        self.register_buffer("bounds", torch.tensor([grid.qmin, grid.qmax], dtype=torch.int16))
        zero = grid.zero_point
        if not isinstance(zero, Tensor):
            zero = torch.full_like(grid.step, zero) if zero else None  # type: ignore[assignment]
        for key, value in (
            ("scale", grid.step),
            ("zero_point", zero),
            ("before", grid.before),
            ("after", grid.after),
        ):
            self.register_buffer(key, None if value is None else value.detach().float().clone())  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        """Numbers on the grid, float32 inside and the dtype of `x` outside."""
        if self.in_graph is not None:
            return self.in_graph(x)
        return self.grid().dequantize(self._rounded(x)).to(x.dtype)

    def codes(self, x: Tensor) -> Tensor:
        """Codes in [qmin, qmax], zero point included."""
        return self._rounded(x).to(code_dtype(self.qmin, self.qmax))

    def grid(self, x: Tensor | None = None) -> UniformGrid:
        """That of the buffers."""
        zero = 0.0 if self.zero_point is None else self.zero_point
        bounds = {"qmin": self.qmin, "qmax": self.qmax}
        return UniformGrid(
            **bounds,
            step=self.scale,
            zero_point=zero,
            axis=self.axis,
            before=self.before,
            after=self.after,
        )

    def _rounded(self, x: Tensor) -> Tensor:
        """Codes as float32."""
        check_fit(x, self.scale, self.axis, self.before)
        return self.grid().to_code_coordinates(x).round().clamp(self.qmin, self.qmax)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.qmin, self.qmax = (int(n) for n in self.bounds)


class FrozenNonuniform(Frozen):
    """Values that are not evenly spaced, as powers of two: the quantizer itself."""

    def __init__(self, quantizer: Quantizer, name: str) -> None:
        super().__init__(quantizer.spec, quantizer.axis, name)
        self.quantizer, self.in_blocks = quantizer, quantizer.in_blocks

    def forward(self, x: Tensor) -> Tensor:
        """What the quantizer gives."""
        y: Tensor = self.quantizer(x)
        return y

    def codes(self, x: Tensor) -> Tensor:
        """Those of the quantizer."""
        return self.quantizer.codes(x)

    def grid(self, x: Tensor | None = None) -> Grid | None:
        """That of the quantizer."""
        return self.quantizer.grid(x)


# Attentions that hand what leaves `qkv` to the quantizers as it is.
DIRECT = (QuantVitAttention, QuantWindowAttention)


def freeze(net: nn.Module) -> nn.Module:
    """A copy of a quantized net with integer codes in place of its float weights, and nothing left to learn.

    Weights are codes with a scale a row: StatsQ's code k stands for (k + 1/2) * step size. Query-key reparameterization keeps the codes
    of its folded matrix alone. An offset after the input of a Linear becomes part of its bias (W c), as does one before the quantizer of
    values, and of queries and keys that no norm or rotation changes; other offsets stay before their quantizer, and those that are zero go.

    Args:
        net: converted, with all scales set; stays as it is.

    Returns:
        The frozen net, in evaluation mode. Its quantizers are found by `qat.iter_quantizers`, of which `codes()` gives those of a weight.

    Raises:
        UsageError: the net is in float or frozen already, a scale was never set, a quantizer has no fixed grid, or a layer's weight is
            made from other tensors (pruning, parametrizations).
    """
    if conversion_of(net) is None:
        raise UsageError(
            "freeze: the model is not quantized; convert and train it first, or load a quantized checkpoint"
        )
    if is_frozen(net):
        raise UsageError("freeze: the model is already frozen")
    assert_ready(net)
    frozen = freeze_structure(copied(net).float())
    prune_offsets(frozen, {name for name, tensor in frozen.state_dict().items() if tensor.any()})
    return frozen


def is_frozen(net: nn.Module) -> bool:
    """True for what `freeze` gives."""
    return any(isinstance(module, Frozen) for module in net.modules())


def keeps_weights(net: nn.Module) -> bool:
    """False if freezing moved offsets into biases, or folded queries and keys: the float net cannot be recovered from what is left."""
    offsets = any(
        getattr(quantizer, name) is not None for quantizer in _activations(net) for name in OFFSETS
    )
    return not offsets and not (
        is_frozen(net) and any(isinstance(module, QkrAttention) for module in net.modules())
    )


@torch.no_grad()
def freeze_structure(net: nn.Module) -> nn.Module:
    """Replace in place, whatever the scales hold: what a file of codes is read into."""
    net.eval().requires_grad_(requires_grad=False)
    for site in list(iter_quantizers(net)):
        setattr(site.owner, site.name.rpartition(".")[2], _frozen(site))
    for module in net.modules():
        if isinstance(module, QuantModule):
            _drop_float_weights(module)
    for module in net.modules():
        _fold_offsets(module)
    if isinstance(net, FqNet):
        net.connect()
    return net


def _drop_float_weights(module: QuantModule) -> None:
    if isinstance(module, QkrAttention):
        if isinstance(module.qk_quantizer, FrozenWeight):
            module.fold_bias()
            for name in ("q_weight", "k_weight", "q_bias"):
                setattr(module, name, None)
    elif isinstance(module.weight_quantizer, FrozenWeight):
        # Empty, not absent: nets of timm ask a layer's weight where it is and of which kind.
        empty = module.latent("weight").new_empty(0)
        del module.weight
        module.register_buffer("weight", empty, persistent=False)


def _fold_offsets(module: nn.Module) -> None:
    if isinstance(module, QuantLinear) and isinstance(module.input_quantizer, FrozenActivation):
        offset = module.input_quantizer.after
        if offset is not None and offset.shape == (module.in_features,):
            _add_to_bias(module, slice(None), module.quantized("weight").float() @ offset)
            module.input_quantizer.after = None
    if isinstance(module, QkrAttention) and isinstance(module.v, QuantLinear):
        _fold_before(module.v_quantizer, module.v, slice(None))
    if type(module) in DIRECT and isinstance(module.qkv, QuantLinear):
        quantizers: list[object] = [module.v_quantizer]
        if isinstance(module.q_norm, nn.Identity) and isinstance(module.k_norm, nn.Identity):
            quantizers = [module.q_quantizer, module.k_quantizer, module.v_quantizer]
        size = module.qkv.out_features // 3
        for i, quantizer in zip(range(3 - len(quantizers), 3), quantizers, strict=True):
            _fold_before(quantizer, module.qkv, slice(i * size, (i + 1) * size))


def _fold_before(quantizer: object, linear: QuantLinear, rows: slice) -> None:
    if isinstance(quantizer, FrozenActivation) and quantizer.before is not None:
        _add_to_bias(linear, rows, quantizer.before)
        quantizer.before = None


def _add_to_bias(linear: QuantLinear, rows: slice, what: Tensor) -> None:
    bias = (
        torch.zeros(linear.out_features, device=what.device)
        if linear.bias is None
        else linear.bias.detach().float().clone()
    )
    bias[rows] += what
    linear.bias = nn.Parameter(bias, requires_grad=False)


def prune_offsets(net: nn.Module, others: Collection[str]) -> None:
    """Let go of offsets that are not among `others`, by name: those of zeros, which no file has."""
    offsets = (
        (name, module, kind)
        for name, module in net.named_modules()
        if isinstance(module, FrozenActivation)
        for kind in OFFSETS
    )
    for name, module, kind in offsets:
        if f"{name}.{kind}" not in others:
            setattr(module, kind, None)


def _activations(net: nn.Module) -> Iterator[FrozenActivation]:
    return (module for module in net.modules() if isinstance(module, FrozenActivation))


def _frozen(site: Site) -> Quantizer:
    """What takes the place of a site's quantizer: no parameters, nothing of the float weight; float stays as it is."""
    quantizer = site.quantizer
    if quantizer.is_float:
        return quantizer
    weight = site.latent().detach() if site.is_weight else None
    if (
        weight is not None
        and not ({"q_weight", "k_weight"} if site.role == "qk" else {"weight"})
        <= site.owner._parameters.keys()
    ):
        raise UsageError(f"freeze: {site.layer} {NOT_PLAIN}")
    grid = quantizer.grid(weight)
    if isinstance(grid, UniformGrid):
        return (
            FrozenActivation(quantizer.spec, site.name, grid)
            if weight is None
            else _weight(site, grid, weight)
        )
    if weight is not None and isinstance(quantizer, BlockFloat):
        return FrozenBlocks(quantizer, site.name, weight)
    if grid is None or weight is not None or grid.before is not None:
        why = f"{site.name} is quantized by {quantizer.spec.quantizer}, whose values have no fixed grid"
        raise UsageError(
            f"freeze: {why}; must be a quantizer whose method grid says where its values lie"
        )
    return FrozenNonuniform(quantizer, site.name)


def _weight(site: Site, grid: UniformGrid, weight: Tensor) -> FrozenWeight:
    spec = site.quantizer.spec
    codes = site.quantizer.codes(weight).to(torch.int8 if grid.qmin < 0 else torch.uint8)
    scale, shift = grid.step.clone(), torch.zeros_like(grid.step) - grid.zero_point
    axis, after = grid.axis, None
    if grid.after is not None:
        axis = axis or 0
        rows = grid.after.detach().float().expand_as(weight).movedim(axis, 0).flatten(1)
        if (rows != rows[:, :1]).any():
            raise UsageError(
                f"freeze: {site.name} has an offset after its quantizer that differs within a row; must be one for each row"
            )
        scale, shift, after = (
            scale.expand(len(rows)).clone(),
            shift.expand(len(rows)).clone(),
            rows[:, 0].clone(),
        )
    made = FrozenWeight(spec, axis, site.name, (codes, scale, shift, after))
    return _corrected(made, weight) if spec.bias_correction else made


def _corrected(made: FrozenWeight, weight: Tensor) -> FrozenWeight:
    """Bias correction is an affine map of every row: its factor goes into the scale, which all rows have then."""
    axis = made.axis or 0
    plain = made()
    rows, corrected = (
        t.movedim(axis, 0).flatten(1) for t in (plain, correct_mean_and_std(plain, weight, axis))
    )
    centered, mean = rows - rows.mean(1, keepdim=True), corrected.mean(1, keepdim=True)
    spread = centered.square().sum(1)
    ratio = torch.where(spread > 0, ((corrected - mean) * centered).sum(1) / spread, 1.0)
    n = len(rows)
    parts = (
        made.stored,
        made.scale.expand(n) * ratio,
        made.shift.expand(n).clone(),
        corrected.mean(1) - ratio * rows.mean(1),
    )
    return FrozenWeight(made.spec, axis, made.name, parts)
