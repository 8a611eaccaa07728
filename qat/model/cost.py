"""What a net costs as deployed: bytes at its bit-widths, multiply-accumulates, bit operations."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from qat.functional.packing import packed_bytes
from qat.model.frozen import FrozenActivation, FrozenWeight
from qat.model.sites import Site, iter_quantizers
from qat.nn import QkrAttention, QuantAttention, ScoredAttention
from qat.quantizers import LSQ, BlockFloat, Quantizer
from qat.utils.probing import probing, zero_image
from qat.utils.validate import FLOAT_BITS


@dataclass(frozen=True)
class MatrixProduct:
    """One matrix product.

    Attributes:
        module: name of the innermost module that was running.
        macs: multiply-accumulates.
        of_activations: no operand is a parameter; False for a layer's weight times its input.
        bits: widths of the two operands.
    """

    module: str
    macs: int
    of_activations: bool
    bits: tuple[int, int] = (FLOAT_BITS, FLOAT_BITS)

    @property
    def bitops(self) -> int:
        """Multiply-accumulates times the widths of both operands."""
        return self.macs * self.bits[0] * self.bits[1]


def _attention_macs(operands: tuple[Any, ...], out: Tensor) -> list[int]:
    query, key, *_ = operands
    scores = query[..., 0].numel() * key.shape[-2]
    return [scores * query.shape[-1], scores * out.shape[-1]]


def _einsum_macs(operands: tuple[Any, ...], out: Tensor) -> list[int]:
    """The product of all dimensions that occur, for an equation of two operands without ellipsis."""
    equation, *factors = operands
    if len(factors) != 2:
        return []
    sizes: dict[str, int] = {}
    for letters, factor in zip(
        equation.split("->")[0].replace(" ", "").split(","), factors, strict=True
    ):
        sizes |= dict(zip(letters, factor.shape, strict=False))
    return [math.prod(sizes.values())]


# Of operands in their order, by place or by name, and the result: multiply-accumulates of the products.
_Count = Callable[[tuple[Any, ...], Tensor], list[int]]
_OF_ACTIVATIONS: dict[Any, _Count] = {
    **dict.fromkeys(
        [torch.matmul, torch.bmm, Tensor.matmul, Tensor.__matmul__],
        lambda operands, out: [out.numel() * operands[0].shape[-1]],
    ),
    F.scaled_dot_product_attention: _attention_macs,
    torch.einsum: _einsum_macs,
}
_OF_WEIGHTS: dict[Any, _Count] = dict.fromkeys(
    [F.linear, F.conv1d, F.conv2d, F.conv3d],
    lambda operands, out: [out.numel() * operands[1][0].numel()],
)


class _Watch(TorchFunctionMode):
    """Notes products while it is on, whatever module makes them and by whatever function; `running` is the stack of names of modules."""

    def __init__(self) -> None:
        super().__init__()
        self.running: list[str] = []
        self.found: list[MatrixProduct] = []

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        count = _OF_ACTIVATIONS.get(func) or _OF_WEIGHTS.get(func)
        if count is not None:
            where, operands = self.running[-1] if self.running else "", (*args, *kwargs.values())
            by_weight = func in _OF_WEIGHTS or any(isinstance(a, nn.Parameter) for a in operands)
            self.found.extend(
                MatrixProduct(where, macs, not by_weight) for macs in count(operands, out)
            )
        return out


FLOAT_BYTES = 4
_OFFSETS = ("offset_before", "offset_after", "product_offset", "before", "after")


@dataclass(frozen=True)
class Cost:
    """Cost of a net.

    Attributes:
        n_params: parameters of the net in training; of a frozen one its codes and the parameters beside them.
        size_bytes: weights at their bit-width (QKR as its folded matrix), scales and everything else in float32.
        macs: multiply-accumulates of one image.
        bitops: sum over matrix products of macs * bits * bits.
    """

    n_params: int
    size_bytes: int
    macs: int
    bitops: int


@dataclass(frozen=True)
class ModuleCost:
    """What one module costs: its own tensors and products and those of its quantizers, not those of its children.

    Attributes:
        module: its path, empty for the net itself.
        n_params: parameters in training.
        code_bytes: weights at their bit-width (QKR as its folded matrix).
        scale_bytes: float32 scales and zero points of weights and activations, those included that training makes from the weights.
        offset_bytes: learnable offsets.
        float_bytes: everything else.
        products: of one image.
    """

    module: str
    n_params: int = 0
    code_bytes: int = 0
    scale_bytes: int = 0
    offset_bytes: int = 0
    float_bytes: int = 0
    products: tuple[MatrixProduct, ...] = ()

    @property
    def size_bytes(self) -> int:
        """All bytes."""
        return self.code_bytes + self.scale_bytes + self.offset_bytes + self.float_bytes

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one image."""
        return sum(product.macs for product in self.products)

    @property
    def bitops(self) -> int:
        """Bit operations of one image."""
        return sum(product.bitops for product in self.products)


def cost(net: nn.Module, input_size: tuple[int, int, int]) -> Cost:
    """Measure a net by one forward pass of one image (channels, height, width)."""
    return total(module_costs(net, input_size))


def total(parts: list[ModuleCost]) -> Cost:
    """The sum of what modules cost."""
    return Cost(**{
        field.name: sum(getattr(part, field.name) for part in parts)
        for field in dataclasses.fields(Cost)
    })


def module_costs(net: nn.Module, input_size: tuple[int, int, int]) -> list[ModuleCost]:
    """`cost` by module, in the order of the net's modules; a module that costs nothing is not listed."""
    products: dict[str, list[MatrixProduct]] = defaultdict(list)
    for product in matmuls(net, input_size):
        products[product.module].append(product)
    stored = _stored(net)
    names = [name for name, _ in net.named_modules() if name in stored or name in products]
    return [
        ModuleCost(name, **stored.get(name, Counter()), products=tuple(products.get(name, ())))
        for name in names
    ]


def size_bytes(net: nn.Module) -> int:
    """Bytes to store a net: codes packed at their width, a float32 scale a row, the float rest."""
    return sum(
        n for sums in _stored(net).values() for kind, n in sums.items() if kind != "n_params"
    )


def _stored(net: nn.Module) -> dict[str, Counter[str]]:
    """By module name, how much there is of each of the first fields of `ModuleCost`."""
    sums: dict[str, Counter[str]] = defaultdict(Counter)
    sites = {site.name: site for site in iter_quantizers(net)}
    # Of a relative step what it began with and what was learned are one number.
    masters = {id(module.start) for module in net.modules() if isinstance(module, LSQ)}
    masters |= {
        id(site.quantizer.bounds)
        for site in sites.values()
        if isinstance(site.quantizer, FrozenActivation)
    }
    for site in sites.values():
        spec, owner = site.quantizer.spec, site.owner
        if not site.is_weight or spec.bits == FLOAT_BITS:
            continue
        found = sums[site.layer]
        if isinstance(site.quantizer, FrozenWeight):
            latent = site.quantizer.stored
            # A shift that is no zero point is implied by the quantizer's kind.
            masters |= (
                {id(latent)}
                if spec.quantizer == "affine"
                else {id(latent), id(site.quantizer.shift)}
            )
            found["n_params"] += latent.numel()
        else:
            latent, n_scales = site.latent(), site.quantizer.n_scales
            masters |= {
                id(t)
                for t in (
                    (owner.q_weight, owner.k_weight) if site.role == "qk" else (owner.weight,)
                )
            }
            # As deployed also scales that training makes from the weight; where a bias is corrected, each row has a scale, a zero point and
            # a constant.
            rows = len(latent)
            if isinstance(site.quantizer, BlockFloat):
                found["scale_bytes"] += site.quantizer.scale_bytes(latent.shape)
            else:
                found["scale_bytes"] += FLOAT_BYTES * (
                    2 * (rows - n_scales) if spec.bias_correction else 0 if n_scales else rows
                )
            found["offset_bytes"] += FLOAT_BYTES * rows * spec.bias_correction
        # Rows of blocks begin with a byte of their own.
        length = latent.shape[spec.axis or 0] if site.quantizer.in_blocks else latent.numel()
        found["code_bytes"] += latent.numel() // length * packed_bytes(length, spec.bits)
    for name, parameter in net.named_parameters():
        sums[_place(name, sites)[0]]["n_params"] += parameter.numel()
    kept = (
        net.state_dict().keys()
    )  # tables that a net makes anew, as Swin's indices, are in no file
    for name, tensor in (*net.named_parameters(), *net.named_buffers()):
        if name in kept and id(tensor) not in masters:
            layer, kind = _place(name, sites)
            sums[layer][kind] += tensor.numel() * (
                1 if tensor.dtype == torch.uint8 else FLOAT_BYTES
            )
    return sums


def _place(name: str, sites: dict[str, Site]) -> tuple[str, str]:
    """The module that a tensor counts for, that of its quantizer where it has one, and the kind of its bytes."""
    site = next((site for site in sites if name.startswith(f"{site}.")), None)
    kind = (
        "offset_bytes"
        if name.rpartition(".")[2] in _OFFSETS
        else "float_bytes"
        if site is None
        else "scale_bytes"
    )
    return (site or name).rpartition(".")[0], kind


def matmuls(net: nn.Module, input_size: tuple[int, ...]) -> list[MatrixProduct]:
    """Every matrix product of one image, by one forward pass on zeros: ours by formula, layers and float attentions as they run."""
    modules = dict(net.named_modules())
    ours = {name: m for name, m in modules.items() if isinstance(m, ScoredAttention)}
    inherited = {
        id(m.v): _bits(m.input_quantizer) for m in ours.values() if isinstance(m, QkrAttention)
    }
    found: list[MatrixProduct] = []
    watch = _Watch()
    hooks = []
    for name, module in modules.items():

        def enter(module: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
            watch.running.append(name)
            if name in ours:
                counted = (
                    _qkr(module, args[0])
                    if isinstance(module, QkrAttention)
                    else _attention(module, args[0])  # type: ignore[arg-type]
                )
                found.extend(
                    MatrixProduct(name, macs, inner, (a, b)) for macs, a, b, inner in counted
                )

        def leave(*_: Any) -> None:
            watch.running.pop()

        hooks += [
            module.register_forward_pre_hook(enter),
            module.register_forward_hook(leave, always_call=True),
        ]
    with probing(net, hooks), watch:
        net(zero_image(net, input_size))  # type: ignore[arg-type]
    for product in watch.found:
        if product.module not in ours:
            layer = modules[product.module]
            weight, act = (
                _bits(getattr(layer, "weight_quantizer", None)),
                _bits(getattr(layer, "input_quantizer", None)),
            )
            bits = (
                product.bits if product.of_activations else (weight, inherited.get(id(layer), act))
            )
            found.append(dataclasses.replace(product, bits=bits))
    return found


def _bits(quantizer: object) -> int:
    return quantizer.spec.bits if isinstance(quantizer, Quantizer) else FLOAT_BITS


def _attention(module: QuantAttention, x: torch.Tensor) -> list[tuple[int, int, int, bool]]:
    macs = module.n_scores(x) * module.head_dim
    joint = getattr(module, "qkv_quantizer", None)
    q, k, v = (
        _bits(joint or getattr(module, f"{role}_quantizer", None)) for role in ("q", "k", "v")
    )
    return [(macs, q, k, True), (macs, _bits(module.probs_quantizer), v, True)]


def _qkr(module: QkrAttention, x: torch.Tensor) -> list[tuple[int, int, int, bool]]:
    width = x.shape[-1]
    act, weight, key = (
        _bits(module.input_quantizer),
        _bits(module.qk_quantizer),
        _bits(module.k_quantizer),
    )
    product, score, values = (
        module.num_heads * x.numel() * width,
        module.n_scores(x) * width,
        module.n_scores(x) * module.head_dim,
    )
    probs = _bits(module.probs_quantizer)
    found = [
        (product, weight, act, False),
        (score, act, key, True),
        (values, probs, _bits(module.v_quantizer), True),
    ]
    if module.q_bias is not None or module.folded_bias is not None:
        found.append((module.num_heads * x.numel(), FLOAT_BITS, act, False))
    return found
