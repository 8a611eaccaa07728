"""Find the matrix products of a model: their modules, multiply-accumulates and bit-widths."""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from qat.nn import HeadProducts, QkrAttention, QuantAttention, ScoredAttention
from qat.quantizers import Quantizer
from qat.spec import QuantRecipe
from qat.utils.probing import probing, zero_image
from qat.utils.validate import FLOAT_BITS

# Warn if more than this fraction of a model's multiply-accumulates unexpectedly stays in float.
_MAX_FLOAT_FRACTION = 0.01


@dataclass(frozen=True)
class MatrixProduct:
    """One matrix product.

    Attributes:
        module: name of the innermost module that ran the product.
        macs: multiply-accumulates.
        of_activations: True = no operand is a parameter or the weight of a layer.
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
    num_scores = query[..., 0].numel() * key.shape[-2]
    return [num_scores * query.shape[-1], num_scores * out.shape[-1]]


def _einsum_macs(operands: tuple[Any, ...], out: Tensor) -> list[int]:
    """Product of all dimension sizes in an einsum of two operands; otherwise, an empty list."""
    equation, *factors = operands
    if not isinstance(equation, str) or len(factors) != 2:
        return []
    inputs, *_ = equation.replace(" ", "").split("->")
    sizes = {"...": 1}
    for letters, factor in zip(inputs.split(","), factors, strict=True):
        before, _, after = letters.partition("...")
        sizes |= dict(zip(before, factor.shape, strict=False))
        sizes |= dict(zip(reversed(after), reversed(factor.shape), strict=False))
        between = factor.shape[len(before) : factor.ndim - len(after)]
        sizes["..."] = max(sizes["..."], math.prod(between))
    return [math.prod(sizes.values())]


def _matmul_macs(operands: tuple[Any, ...], out: Tensor) -> list[int]:
    return [out.numel() * operands[0].shape[-1]]


def _layer_macs(operands: tuple[Any, ...], out: Tensor) -> list[int]:
    weight = operands[1]
    return [out.numel() * math.prod(weight.shape[1:])]


def _transposed_macs(operands: tuple[Any, ...], _: object) -> list[int]:
    images, weight = operands[:2]
    return [images.numel() * math.prod(weight.shape[1:])]


def _added_matmul_macs(operands: tuple[Any, ...], out: Tensor) -> list[int]:
    return [out.numel() * operands[1].shape[-1]]


def _projection_macs(operands: tuple[Any, ...], _: object) -> list[int]:
    """Multiply-accumulates of the projections of `nn.MultiheadAttention`.

    The output, which is also projected, has the shape of the queries.
    """
    query, key, value, *_ = operands
    width = query.shape[-1]
    return [t.numel() * width for t in (query, key, value, query)]


def _multi_head_macs(operands: tuple[Any, ...], _: object) -> list[int]:
    """Multiply-accumulates of the scores and the sums of values in `nn.MultiheadAttention`.

    Queries are (N, B, E), keys (M, B, E).
    """
    query, key, *_ = operands
    return [query.numel() * key.shape[0]] * 2


# For each torch function, a function that computes multiply-accumulates from operands and result.
_CountMacs = Callable[[tuple[Any, ...], Any], list[int]]
_MACS_OF_ACTIVATIONS: dict[Any, _CountMacs] = {
    torch.matmul: _matmul_macs,
    torch.mm: _matmul_macs,
    torch.bmm: _matmul_macs,
    Tensor.matmul: _matmul_macs,
    Tensor.mm: _matmul_macs,
    Tensor.bmm: _matmul_macs,
    Tensor.__matmul__: _matmul_macs,
    torch.addmm: _added_matmul_macs,
    torch.baddbmm: _added_matmul_macs,
    F.multi_head_attention_forward: _multi_head_macs,
    F.scaled_dot_product_attention: _attention_macs,
    torch.einsum: _einsum_macs,
}
_MACS_OF_LAYERS: dict[Any, _CountMacs] = {
    F.linear: _layer_macs,
    F.conv1d: _layer_macs,
    F.conv2d: _layer_macs,
    F.conv3d: _layer_macs,
    F.conv_transpose2d: _transposed_macs,
    F.multi_head_attention_forward: _projection_macs,
}


class _ProductRecorder(TorchFunctionMode):
    """Records matrix products while it is active, whatever module runs them.

    It knows the torch functions in `_MACS_OF_ACTIVATIONS` and `_MACS_OF_LAYERS`.

    Attributes:
        running_modules: names of the modules that are currently running; the innermost is last.
        products: the recorded products, in the order in which they ran.
    """

    def __init__(self) -> None:
        super().__init__()
        self.running_modules: list[str] = []
        self.products: list[MatrixProduct] = []

    def enter(self, name: str, *_: Any) -> None:
        """Forward pre-hook of the module `name`."""
        self.running_modules.append(name)

    def leave(self, *_: Any) -> None:
        """Forward hook of all modules."""
        self.running_modules.pop()

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        operands = (*args, *kwargs.values())
        if func in _MACS_OF_LAYERS:
            self._record(_MACS_OF_LAYERS[func](operands, out), of_activations=False)
        if func in _MACS_OF_ACTIVATIONS:
            # The operands are among the first three arguments; later ones are masks, biases or
            # projections.
            has_parameter = any(isinstance(operand, nn.Parameter) for operand in operands[:3])
            counts = _MACS_OF_ACTIVATIONS[func](operands, out)
            self._record(counts, of_activations=not has_parameter)
        return out

    def _record(self, counts: list[int], *, of_activations: bool) -> None:
        module = self.running_modules[-1] if self.running_modules else ""
        self.products.extend(MatrixProduct(module, macs, of_activations) for macs in counts)


def matmuls(net: nn.Module, input_size: tuple[int, ...]) -> list[MatrixProduct]:
    """List the matrix products (and convolutions) of one forward pass on an image of zeros.

    Products of our attentions, computed from the shapes of inputs, come first. The others are
    recorded (see `_ProductRecorder`). `input_size` is (C, H, W).
    """
    modules = dict(net.named_modules())
    attentions = {
        name: module
        for name, module in modules.items()
        if isinstance(module, ScoredAttention | HeadProducts)
    }
    # With QKR, the attention quantizes the input of its layer `v`.
    inherited_bits = {}
    for attention in attentions.values():
        if isinstance(attention, QkrAttention):
            inherited_bits[id(attention.v)] = _bits_of(attention.input_quantizer)

    products: list[MatrixProduct] = []
    recorder = _ProductRecorder()
    hooks = []
    for name, module in modules.items():
        enter = functools.partial(recorder.enter, name)
        hooks.append(module.register_forward_pre_hook(enter))
        hooks.append(module.register_forward_hook(recorder.leave, always_call=True))
        if name in attentions:
            add_products = functools.partial(_add_attention_products, products, name)
            hooks.append(module.register_forward_pre_hook(add_products))
    with probing(net, hooks), recorder:
        net(zero_image(net, input_size))  # type: ignore[arg-type]

    for product in recorder.products:
        if product.module in attentions:
            continue
        bits = product.bits
        if not product.of_activations:
            layer = modules[product.module]
            weight_bits = _bits_of(getattr(layer, "weight_quantizer", None))
            input_bits = _bits_of(getattr(layer, "input_quantizer", None))
            bits = (weight_bits, inherited_bits.get(id(layer), input_bits))
        products.append(dataclasses.replace(product, bits=bits))
    return products


def _bits_of(quantizer: object) -> int:
    return quantizer.spec.bits if isinstance(quantizer, Quantizer) else FLOAT_BITS


def _add_attention_products(
    products: list[MatrixProduct], name: str, attention: Any, args: tuple[Any, ...]
) -> None:
    """Forward pre-hook that adds the products of an attention."""
    if isinstance(attention, HeadProducts):
        score_macs, sum_macs = attention.macs(*args[:3])
        products.extend(_quantized_products(name, attention, score_macs, sum_macs))
    elif isinstance(attention, QkrAttention):
        products.extend(_qkr_products(name, attention, args[0]))
    else:
        products.extend(_attention_products(name, attention, args[0]))


def _attention_products(name: str, attention: QuantAttention, x: Tensor) -> list[MatrixProduct]:
    macs = attention.num_scores(x) * attention.head_dim
    return _quantized_products(name, attention, macs, macs)


def _quantized_products(
    name: str, attention: Any, score_macs: int, sum_macs: int
) -> list[MatrixProduct]:
    """The products q.k (`score_macs`) and probabilities.v (`sum_macs`) of an attention."""
    qkv_quantizer = getattr(attention, "qkv_quantizer", None)
    q_bits = _bits_of(qkv_quantizer or getattr(attention, "q_quantizer", None))
    k_bits = _bits_of(qkv_quantizer or getattr(attention, "k_quantizer", None))
    v_bits = _bits_of(qkv_quantizer or getattr(attention, "v_quantizer", None))
    probs_bits = _bits_of(attention.probs_quantizer)
    return [
        MatrixProduct(name, score_macs, of_activations=True, bits=(q_bits, k_bits)),
        MatrixProduct(name, sum_macs, of_activations=True, bits=(probs_bits, v_bits)),
    ]


def _qkr_products(name: str, attention: QkrAttention, x: Tensor) -> list[MatrixProduct]:
    """QKR's products: x with folded matrix and query bias (if any), scores, sums of values."""
    width = x.shape[-1]
    num_scores = attention.num_scores(x)
    num_product_elements = attention.num_heads * x.numel()
    input_bits = _bits_of(attention.input_quantizer)
    matrix_bits = _bits_of(attention.qk_quantizer)
    key_bits = _bits_of(attention.k_quantizer)
    probs_bits = _bits_of(attention.probs_quantizer)
    v_bits = _bits_of(attention.v_quantizer)
    products = [
        MatrixProduct(
            name, num_product_elements * width, of_activations=False, bits=(matrix_bits, input_bits)
        ),
        MatrixProduct(name, num_scores * width, of_activations=True, bits=(input_bits, key_bits)),
        MatrixProduct(
            name, num_scores * attention.head_dim, of_activations=True, bits=(probs_bits, v_bits)
        ),
    ]
    if attention.q_bias is not None or attention.folded_bias is not None:
        bits = (FLOAT_BITS, input_bits)
        products.append(MatrixProduct(name, num_product_elements, of_activations=False, bits=bits))
    return products


def warn_of_float(
    net: nn.Module, recipe: QuantRecipe, input_size: tuple[int, int, int], exempt: list[str]
) -> None:
    """Warn if modules not in `exempt` compute much in float that the recipe should quantize."""
    products = matmuls(net, input_size)
    in_float = []
    for product in products:
        is_exempt = any(f"{product.module}.".startswith(f"{name}.") for name in exempt)
        if not is_exempt and _stays_float_unexpectedly(recipe, product):
            in_float.append(product)
    total = sum(product.macs for product in products)
    fraction = sum(product.macs for product in in_float) / max(total, 1)
    if fraction <= _MAX_FLOAT_FRACTION:
        return
    modules = dict(net.named_modules())
    names_by_class = defaultdict(list)
    for name in dict.fromkeys(product.module for product in in_float):
        names_by_class[type(modules[name]).__name__].append(name or "(net)")
    parts = []
    for class_name, (first, *others) in names_by_class.items():
        more = f" and {len(others)} more" if others else ""
        parts.append(f"{first}{more} ({class_name})")
    warnings.warn(
        f"convert: {100 * fraction:.1f} % of the multiply-accumulates stay in float, "
        f"although the recipe quantizes such products: {', '.join(parts)}",
        stacklevel=3,
    )


def _stays_float_unexpectedly(recipe: QuantRecipe, product: MatrixProduct) -> bool:
    """True for a float product that the recipe should have quantized."""
    if product.bits != (FLOAT_BITS, FLOAT_BITS):
        return False
    rules = recipe.at(product.module)
    if product.of_activations:
        specs = (rules.act_spec("k", "block"), rules.act_spec("probs", "block"))
    else:
        specs = (rules.weight_spec("block"), rules.act_spec("input", "block"))
    return any(spec.bits != FLOAT_BITS for spec in specs)
