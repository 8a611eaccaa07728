"""What a net costs as deployed: bytes at its bit-widths, multiply-accumulates, bit operations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import timm.layers as timm_layers
import torch
from torch import nn

from qat.nn import QkrAttention, QuantAttention
from qat.probing import probing
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
    """Every matrix product of one image, by one forward pass on zeros."""
    found: list[Matmul] = []
    inherited = {id(m.v): _bits(m.input_quantizer) for m in net.modules() if isinstance(m, QkrAttention)}
    hooks = []
    for name, module in net.named_modules():
        count = next((f for cls, f in _COUNTERS.items() if isinstance(module, cls)), None)
        if count is not None:
            hooks.append(module.register_forward_hook(_recorder(name, count, found, inherited.get(id(module)))))
    with probing(net, hooks):
        net(torch.zeros(1, *input_size, device=next(net.parameters()).device))
    return iter(found)


def _bits(quantizer: object) -> int:
    return quantizer.spec.bits if isinstance(quantizer, Quantizer) else FLOAT_BITS


def _layer(module: Any, x: torch.Tensor, out: torch.Tensor, inherited: int | None) -> list[tuple[int, int, int]]:
    per_output = module.weight[0].numel()
    act = _bits(getattr(module, "input_quantizer", None)) if inherited is None else inherited
    return [(out.numel() * per_output, _bits(getattr(module, "weight_quantizer", None)), act)]


def _attention(module: Any, x: torch.Tensor, out: torch.Tensor, inherited: int | None) -> list[tuple[int, int, int]]:
    pairs = module.num_heads * x.shape[1] ** 2
    q, k, v, p = (_bits(getattr(module, f"{role}_quantizer", None)) for role in ("q", "k", "v", "probs"))
    return [(pairs * module.head_dim, q, k), (pairs * module.head_dim, p, v)]


def _qkr(module: Any, x: torch.Tensor, out: torch.Tensor, inherited: int | None) -> list[tuple[int, int, int]]:
    tokens, width, heads = x.shape[1], x.shape[2], module.num_heads
    act, weight, key = _bits(module.input_quantizer), _bits(module.qk_quantizer), _bits(module.k_quantizer)
    values = heads * tokens**2 * module.head_dim
    product, score = heads * tokens * width**2, heads * tokens**2 * width
    return [(product, weight, act), (score, act, key), (values, _bits(module.probs_quantizer), _bits(module.v_quantizer))]


Counter = Callable[[Any, torch.Tensor, torch.Tensor, int | None], list[tuple[int, int, int]]]
_COUNTERS: dict[type[nn.Module], Counter] = {
    nn.Linear: _layer,
    nn.Conv2d: _layer,
    QkrAttention: _qkr,
    QuantAttention: _attention,
    timm_layers.Attention: _attention,
}


def _recorder(name: str, count: Counter, found: list[Matmul], inherited: int | None) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        found.extend(Matmul(name, macs, (a, b)) for macs, a, b in count(module, args[0], out, inherited))

    return hook
