"""Cost of a deployed model: bytes at its bit-widths, multiply-accumulates, bit operations."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
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
        module: name of the innermost module that ran it.
        macs: multiply-accumulates.
        of_activations: False if one operand is a parameter.
        bits: bit-widths of the two operands.
    """

    module: str
    macs: int
    of_activations: bool
    bits: tuple[int, int] = (FLOAT_BITS, FLOAT_BITS)

    @property
    def bitops(self) -> int:
        """Multiply-accumulates times the bit-widths of both operands."""
        left, right = self.bits
        return self.macs * left * right


def _attention_macs(operands: tuple[Any, ...], out: Tensor) -> list[int]:
    query, key, *_ = operands
    scores = query[..., 0].numel() * key.shape[-2]
    return [scores * query.shape[-1], scores * out.shape[-1]]


def _einsum_macs(operands: tuple[Any, ...], out: Tensor) -> list[int]:
    """Product of the sizes of all dimensions, for two operands and no ellipsis."""
    equation, *factors = operands
    if len(factors) != 2:
        return []
    inputs, *_ = equation.replace(" ", "").split("->")
    sizes: dict[str, int] = {}
    for letters, factor in zip(inputs.split(","), factors, strict=True):
        sizes |= dict(zip(letters, factor.shape, strict=False))
    return [math.prod(sizes.values())]


def _matmul_macs(operands: tuple[Any, ...], out: Tensor) -> list[int]:
    return [out.numel() * operands[0].shape[-1]]


def _layer_macs(operands: tuple[Any, ...], out: Tensor) -> list[int]:
    weight = operands[1]
    return [out.numel() * weight[0].numel()]


# Functions that return multiply-accumulates from the operands and the result of a torch function.
_CountMacs = Callable[[tuple[Any, ...], Tensor], list[int]]
_MACS_OF_ACTIVATIONS: dict[Any, _CountMacs] = {
    torch.matmul: _matmul_macs,
    torch.bmm: _matmul_macs,
    Tensor.matmul: _matmul_macs,
    Tensor.__matmul__: _matmul_macs,
    F.scaled_dot_product_attention: _attention_macs,
    torch.einsum: _einsum_macs,
}
_MACS_OF_LAYERS: dict[Any, _CountMacs] = {
    F.linear: _layer_macs,
    F.conv1d: _layer_macs,
    F.conv2d: _layer_macs,
    F.conv3d: _layer_macs,
}


class _ProductRecorder(TorchFunctionMode):
    """Records matrix products while it is active, whichever function and module compute them.

    Attributes:
        running: names of the modules that run, the innermost last.
        products: in the order in which they ran.
    """

    def __init__(self) -> None:
        super().__init__()
        self.running: list[str] = []
        self.products: list[MatrixProduct] = []

    def enter(self, name: str, *_: Any) -> None:
        """Forward pre-hook of the module `name`."""
        self.running.append(name)

    def leave(self, *_: Any) -> None:
        """Forward hook."""
        self.running.pop()

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        count_macs = _MACS_OF_ACTIVATIONS.get(func) or _MACS_OF_LAYERS.get(func)
        if count_macs is None:
            return out
        operands = (*args, *kwargs.values())
        has_parameter = any(isinstance(operand, nn.Parameter) for operand in operands)
        of_activations = not has_parameter and func not in _MACS_OF_LAYERS
        module = self.running[-1] if self.running else ""
        for macs in count_macs(operands, out):
            self.products.append(MatrixProduct(module, macs, of_activations))
        return out


FLOAT_BYTES = 4
_OFFSET_NAMES = ("offset_before", "offset_after", "product_offset", "before", "after")


@dataclass(frozen=True)
class Cost:
    """Cost of a model.

    Attributes:
        n_params: parameters in training; for a frozen model, codes and remaining parameters.
        size_bytes: weights at their bit-width (for QKR the folded matrix), the rest in float32.
        macs: multiply-accumulates of one image.
        bitops: sum over matrix products of macs * bits * bits.
    """

    n_params: int
    size_bytes: int
    macs: int
    bitops: int


@dataclass(frozen=True)
class ModuleCost:
    """Cost of one module and its quantizers, without its children.

    Attributes:
        module: its path, empty for the model itself.
        n_params: parameters in training.
        code_bytes: weights at their bit-width (for QKR the folded matrix).
        scale_bytes: float32 scales and zero points of weights and activations, including scales
            that training computes from the weights.
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
        """Sum of all bytes."""
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
    """Measure a model by one forward pass of one image (channels, height, width)."""
    return total(module_costs(net, input_size))


def total(parts: list[ModuleCost]) -> Cost:
    """Sum of the costs of modules."""
    return Cost(
        n_params=sum(part.n_params for part in parts),
        size_bytes=sum(part.size_bytes for part in parts),
        macs=sum(part.macs for part in parts),
        bitops=sum(part.bitops for part in parts),
    )


def module_costs(net: nn.Module, input_size: tuple[int, int, int]) -> list[ModuleCost]:
    """Costs of the modules that cost something, in the order of `named_modules`."""
    products: dict[str, list[MatrixProduct]] = defaultdict(list)
    for product in matmuls(net, input_size):
        products[product.module].append(product)
    stored = _stored(net)
    costs = []
    for name, _ in net.named_modules():
        if name not in stored and name not in products:
            continue
        module_cost = _sized(name, stored.get(name, Counter()))
        costs.append(dataclasses.replace(module_cost, products=tuple(products[name])))
    return costs


def size_bytes(net: nn.Module) -> int:
    """Bytes to store a model: packed codes, float32 scales for rows, everything else in float32."""
    return sum(_sized(name, sizes).size_bytes for name, sizes in _stored(net).items())


def weights_by_bits(net: nn.Module) -> Counter[int]:
    """Numbers of weights by bit-width, without the scales and offsets of quantizers."""
    sites = {site.name: site for site in iter_quantizers(net)}
    numbers: Counter[int] = Counter()
    for name, parameter in net.named_parameters():
        _, kind = _module_and_kind(name, sites)
        if kind == "float_bytes":
            numbers[FLOAT_BITS] += parameter.numel()
    for site in sites.values():
        if _has_codes(site):
            quantized = sum(tensor.numel() for tensor in _replaced_by_codes(site))
            numbers[site.quantizer.spec.bits] += quantized
            numbers[FLOAT_BITS] -= quantized
    return numbers


def macs_by_bits(net: nn.Module, input_size: tuple[int, ...]) -> Counter[int]:
    """Multiply-accumulates of one image by bit-width, for each product that of its wider operand."""
    numbers: Counter[int] = Counter()
    for product in matmuls(net, input_size):
        numbers[max(product.bits)] += product.macs
    return numbers


def _sized(name: str, sizes: Mapping[str, int]) -> ModuleCost:
    return ModuleCost(name, **sizes)  # type: ignore[arg-type]


def _stored(net: nn.Module) -> dict[str, Counter[str]]:
    """Parameters and bytes by module name, under the names of the fields of `ModuleCost`."""
    sizes: dict[str, Counter[str]] = defaultdict(Counter)
    sites = {site.name: site for site in iter_quantizers(net)}
    coded_sites = [site for site in sites.values() if _has_codes(site)]
    for site in coded_sites:
        sizes[site.layer].update(_weight_sizes(site))
    for name, parameter in net.named_parameters():
        module, _ = _module_and_kind(name, sites)
        sizes[module]["n_params"] += parameter.numel()

    not_stored = _ids_not_stored(net, sites.values())
    for site in coded_sites:
        not_stored.update(id(tensor) for tensor in _replaced_by_codes(site))
    saved_names = net.state_dict().keys()  # without tables that are computed again, as in Swin
    for name, tensor in (*net.named_parameters(), *net.named_buffers()):
        if name not in saved_names or id(tensor) in not_stored:
            continue
        module, kind = _module_and_kind(name, sites)
        element_bytes = 1 if tensor.dtype == torch.uint8 else FLOAT_BYTES
        sizes[module][kind] += tensor.numel() * element_bytes
    return sizes


def _has_codes(site: Site) -> bool:
    """True for a weight that a deployed model stores as codes."""
    return site.is_weight and site.quantizer.spec.bits != FLOAT_BITS


def _weight_sizes(site: Site) -> Counter[str]:
    """Sizes of a weight as codes, with the scales and offsets that no tensor of the model holds."""
    quantizer = site.quantizer
    spec = quantizer.spec
    sizes: Counter[str] = Counter()
    if isinstance(quantizer, FrozenWeight):
        weight = quantizer.stored
        sizes["n_params"] = weight.numel()
    else:
        weight = site.latent()
        sizes["scale_bytes"] = _computed_scale_bytes(quantizer, weight)
        sizes["offset_bytes"] = FLOAT_BYTES * len(weight) * spec.bias_correction
    if quantizer.in_blocks:
        # The codes of each row of blocks begin with a new byte.
        row_length = weight.shape[spec.axis or 0]
        num_rows = weight.numel() // row_length
        sizes["code_bytes"] = num_rows * packed_bytes(row_length, spec.bits)
    else:
        sizes["code_bytes"] = packed_bytes(weight.numel(), spec.bits)
    return sizes


def _computed_scale_bytes(quantizer: Quantizer, weight: Tensor) -> int:
    """Bytes of the scales and zero points that training computes from a weight (rows, ...)."""
    rows = len(weight)
    if isinstance(quantizer, BlockFloat):
        return quantizer.scale_bytes(weight.shape)
    if quantizer.spec.bias_correction:
        # Bias correction needs a scale and a zero point for each row.
        return FLOAT_BYTES * 2 * (rows - quantizer.n_scales)
    has_own_scales = quantizer.n_scales > 0
    return 0 if has_own_scales else FLOAT_BYTES * rows


def _replaced_by_codes(site: Site) -> list[Tensor]:
    """Tensors of a model that its codes replace when it is deployed."""
    quantizer = site.quantizer
    owner: Any = site.owner
    if isinstance(quantizer, FrozenWeight):
        if quantizer.spec.quantizer == "affine":
            return [quantizer.stored]
        # Without zero points, the shift follows from the kind of the quantizer.
        return [quantizer.stored, quantizer.shift]
    if site.role == "qk":
        return [owner.q_weight, owner.k_weight]
    return [owner.weight]


def _ids_not_stored(net: nn.Module, sites: Iterable[Site]) -> set[int]:
    """Ids of tensors that a deployed model does not need."""
    # A relative step size is one number: its start times what was learned.
    ids = {id(module.start) for module in net.modules() if isinstance(module, LSQ)}
    for site in sites:
        if isinstance(site.quantizer, FrozenActivation):
            ids.add(id(site.quantizer.bounds))
    return ids


def _module_and_kind(name: str, sites: Iterable[str]) -> tuple[str, str]:
    """The module to which a tensor is counted, and the field of `ModuleCost`.

    Args:
        name: of the tensor.
        sites: names of the quantizers; their tensors are counted to the module that owns them.
    """
    quantizer = next((site for site in sites if name.startswith(f"{site}.")), None)
    module, _, _ = (quantizer or name).rpartition(".")
    _, _, attribute = name.rpartition(".")
    if attribute in _OFFSET_NAMES:
        return module, "offset_bytes"
    return module, "float_bytes" if quantizer is None else "scale_bytes"


def matmuls(net: nn.Module, input_size: tuple[int, ...]) -> list[MatrixProduct]:
    """Matrix products of one forward pass on an image of zeros.

    Those of our attentions are computed by a formula, all others are recorded.
    """
    modules = dict(net.named_modules())
    attentions = {name: m for name, m in modules.items() if isinstance(m, ScoredAttention)}
    # The input of V in QKR is quantized by the attention.
    inherited_bits = {}
    for attention in attentions.values():
        if isinstance(attention, QkrAttention):
            inherited_bits[id(attention.v)] = _bits(attention.input_quantizer)

    products: list[MatrixProduct] = []
    recorder = _ProductRecorder()
    hooks = []
    for name, module in modules.items():
        enter = functools.partial(recorder.enter, name)
        hooks.append(module.register_forward_pre_hook(enter))
        hooks.append(module.register_forward_hook(recorder.leave, always_call=True))
        if name in attentions:
            count = functools.partial(_count_attention, products, name)
            hooks.append(module.register_forward_pre_hook(count))
    with probing(net, hooks), recorder:
        net(zero_image(net, input_size))  # type: ignore[arg-type]

    for product in recorder.products:
        if product.module in attentions:
            continue
        bits = product.bits
        if not product.of_activations:
            layer = modules[product.module]
            weight_bits = _bits(getattr(layer, "weight_quantizer", None))
            input_bits = _bits(getattr(layer, "input_quantizer", None))
            bits = (weight_bits, inherited_bits.get(id(layer), input_bits))
        products.append(dataclasses.replace(product, bits=bits))
    return products


def _bits(quantizer: object) -> int:
    return quantizer.spec.bits if isinstance(quantizer, Quantizer) else FLOAT_BITS


def _count_attention(
    products: list[MatrixProduct], name: str, attention: Any, args: tuple[Any, ...]
) -> None:
    """Forward pre-hook that adds the products of an attention."""
    if isinstance(attention, QkrAttention):
        products.extend(_qkr_products(name, attention, args[0]))
    else:
        products.extend(_attention_products(name, attention, args[0]))


def _attention_products(name: str, attention: QuantAttention, x: Tensor) -> list[MatrixProduct]:
    macs = attention.n_scores(x) * attention.head_dim
    joint = getattr(attention, "qkv_quantizer", None)
    q_bits = _bits(joint or getattr(attention, "q_quantizer", None))
    k_bits = _bits(joint or getattr(attention, "k_quantizer", None))
    v_bits = _bits(joint or getattr(attention, "v_quantizer", None))
    probs_bits = _bits(attention.probs_quantizer)
    return [
        MatrixProduct(name, macs, of_activations=True, bits=(q_bits, k_bits)),
        MatrixProduct(name, macs, of_activations=True, bits=(probs_bits, v_bits)),
    ]


def _qkr_products(name: str, attention: QkrAttention, x: Tensor) -> list[MatrixProduct]:
    width = x.shape[-1]
    n_scores = attention.n_scores(x)
    n_mapped = attention.num_heads * x.numel()
    input_bits = _bits(attention.input_quantizer)
    matrix_bits = _bits(attention.qk_quantizer)
    key_bits = _bits(attention.k_quantizer)
    probs_bits = _bits(attention.probs_quantizer)
    v_bits = _bits(attention.v_quantizer)
    products = [
        MatrixProduct(name, n_mapped * width, of_activations=False, bits=(matrix_bits, input_bits)),
        MatrixProduct(name, n_scores * width, of_activations=True, bits=(input_bits, key_bits)),
        MatrixProduct(
            name, n_scores * attention.head_dim, of_activations=True, bits=(probs_bits, v_bits)
        ),
    ]
    if attention.q_bias is not None or attention.folded_bias is not None:
        bits = (FLOAT_BITS, input_bits)
        products.append(MatrixProduct(name, n_mapped, of_activations=False, bits=bits))
    return products
