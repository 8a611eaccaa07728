"""What a net costs as deployed: bytes at its bit-widths, multiply-accumulates, bit operations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from qat.nn import QkrAttention, QuantAttention, ScoredAttention
from qat.probing import probing
from qat.products import watching
from qat.quantizers import Quantizer
from qat.sites import iter_quantizers
from qat.spec import FLOAT_BITS

FLOAT_BYTES = 4


@dataclass(frozen=True)
class Matmul:
    """One matrix product of a forward pass of one image.

    Attributes:
        module: where it happens.
        macs: multiply-accumulates.
        bits: widths of the two operands.
    """

    module: str
    macs: int
    bits: tuple[int, int]


@dataclass(frozen=True)
class Cost:
    """Cost of a net.

    Attributes:
        n_params: parameters of the net in training.
        size_bytes: weights at their bit-width (QKR as its folded matrix), scales and everything else in float32.
        macs: multiply-accumulates of one image.
        bitops: sum over matrix products of macs * bits * bits.
    """

    n_params: int
    size_bytes: int
    macs: int
    bitops: int


def cost(net: nn.Module, input_size: tuple[int, int, int]) -> Cost:
    """Measure a net by one forward pass of one image (channels, height, width)."""
    products = list(matmuls(net, input_size))
    return Cost(
        n_params=sum(p.numel() for p in net.parameters()),
        size_bytes=size_bytes(net),
        macs=sum(m.macs for m in products),
        bitops=sum(m.macs * m.bits[0] * m.bits[1] for m in products),
    )


def size_bytes(net: nn.Module) -> int:
    """Bytes to store a net: codes packed at their width, a float32 scale a row, the float rest."""
    masters: set[int] = set()
    quantized = 0
    for site in iter_quantizers(net):
        if not site.is_weight or site.quantizer.spec.bits == FLOAT_BITS:
            continue
        latent = site.latent()
        owner = site.owner
        parts = (owner.q_weight, owner.k_weight) if site.role == "qk" else (owner.weight,)
        masters |= {id(p) for p in parts}
        unstored_scales = latent.shape[0] if site.quantizer.n_scales == 0 else 0
        quantized += (latent.numel() * site.quantizer.spec.bits + 7) // 8 + unstored_scales * FLOAT_BYTES
    rest = sum(t.numel() for t in (*net.parameters(), *net.buffers()) if id(t) not in masters)
    return quantized + rest * FLOAT_BYTES


def matmuls(net: nn.Module, input_size: tuple[int, int, int]) -> Iterator[Matmul]:
    """Every matrix product of one image, by one forward pass on zeros: layers and float attentions as they run, ours by formula."""
    modules = dict(net.named_modules())
    ours = {name: m for name, m in modules.items() if isinstance(m, ScoredAttention)}
    inherited = {id(m.v): _bits(m.input_quantizer) for m in ours.values() if isinstance(m, QkrAttention)}
    found: list[Matmul] = []
    with watching(net) as products, probing(net, [m.register_forward_hook(_recorder(name, found)) for name, m in ours.items()]):
        net(torch.zeros(1, *input_size, device=next(net.parameters()).device))
    for product in products:
        if product.module not in ours:
            bits = (FLOAT_BITS, FLOAT_BITS) if product.of_activations else _layer_bits(modules[product.module], inherited)
            found.append(Matmul(product.module, product.macs, bits))
    return iter(found)


def _bits(quantizer: object) -> int:
    return quantizer.spec.bits if isinstance(quantizer, Quantizer) else FLOAT_BITS


def _layer_bits(layer: nn.Module, inherited: dict[int, int]) -> tuple[int, int]:
    """Weight and input."""
    return _bits(getattr(layer, "weight_quantizer", None)), inherited.get(id(layer), _bits(getattr(layer, "input_quantizer", None)))


def _attention(module: QuantAttention, x: torch.Tensor) -> list[tuple[int, int, int]]:
    macs = module.n_scores(x) * module.head_dim
    joint = getattr(module, "qkv_quantizer", None)
    q, k, v = (_bits(joint or getattr(module, f"{role}_quantizer", None)) for role in ("q", "k", "v"))
    return [(macs, q, k), (macs, _bits(module.probs_quantizer), v)]


def _qkr(module: QkrAttention, x: torch.Tensor) -> list[tuple[int, int, int]]:
    width = x.shape[-1]
    act, weight, key = _bits(module.input_quantizer), _bits(module.qk_quantizer), _bits(module.k_quantizer)
    product, score, values = module.num_heads * x.numel() * width, module.n_scores(x) * width, module.n_scores(x) * module.head_dim
    return [(product, weight, act), (score, act, key), (values, _bits(module.probs_quantizer), _bits(module.v_quantizer))]


def _recorder(name: str, found: list[Matmul]) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        counted = _qkr(module, args[0]) if isinstance(module, QkrAttention) else _attention(module, args[0])  # type: ignore[arg-type]
        found.extend(Matmul(name, macs, (a, b)) for macs, a, b in counted)

    return hook
