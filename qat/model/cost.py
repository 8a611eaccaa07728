"""Cost of a deployed model: bytes at its bit-widths, multiply-accumulates, bit operations."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qat.functional.packing import packed_bytes
from qat.model.frozen import FrozenActivation, FrozenWeight
from qat.model.products import MatrixProduct, matmuls
from qat.model.sites import Site, iter_quantizers
from qat.quantizers import LSQ, BlockFloat, Quantizer
from qat.utils.validate import FLOAT_BITS

FLOAT_BYTES = 4
_OFFSET_NAMES = ("offset_before", "offset_after", "product_offset", "before", "after")


@dataclass(frozen=True)
class Cost:
    """Cost of a model.

    Attributes:
        n_params: number of parameters; for a frozen model, of codes and remaining parameters.
        size_bytes: bytes of the weights at their bit-widths (with QKR, of the folded matrix), of
            scales (1 for the scale of a block of floats, else 4), and of the rest in float32.
        macs: multiply-accumulates for one image.
        bitops: bit operations: macs times the bit-widths of both operands, summed over products.
    """

    n_params: int
    size_bytes: int
    macs: int
    bitops: int


@dataclass(frozen=True)
class ModuleCost:
    """Cost of one module and its quantizers, without its other children.

    Attributes:
        module: path of the module; empty for the model itself.
        n_params: see `Cost`.
        code_bytes: bytes of the weights at their bit-widths (with QKR, of the folded matrix).
        scale_bytes: bytes of scales and zero points of weights and activations (4 each; 1 for the
            scale of a block of floats), including scales that training computes from the weights.
        offset_bytes: bytes of learned offsets and of the offsets of bias correction.
        float_bytes: bytes of everything else.
        products: the matrix products for one image.
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
        """Multiply-accumulates for one image."""
        return sum(product.macs for product in self.products)

    @property
    def bitops(self) -> int:
        """Bit operations for one image."""
        return sum(product.bitops for product in self.products)


def cost(net: nn.Module, input_size: tuple[int, int, int]) -> Cost:
    """Measure the cost of a model in a forward pass of one image (channels, height, width)."""
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
    """Costs of all modules whose cost is not zero, in the order of `named_modules`.

    `input_size` is (channels, height, width).
    """
    products: dict[str, list[MatrixProduct]] = defaultdict(list)
    for product in matmuls(net, input_size):
        products[product.module].append(product)
    counts = _count_by_module(net)
    costs = []
    for name, _ in net.named_modules():
        if name not in counts and name not in products:
            continue
        module_cost = _module_cost(name, counts.get(name, Counter()))
        costs.append(dataclasses.replace(module_cost, products=tuple(products[name])))
    return costs


def size_bytes(net: nn.Module) -> int:
    """Bytes of a stored model: packed codes, 1-byte scales of blocks, everything else float32."""
    counts = _count_by_module(net)
    return sum(_module_cost(name, sizes).size_bytes for name, sizes in counts.items())


def weights_by_bits(net: nn.Module) -> Counter[int]:
    """Number of parameters of an unfrozen model by bit-width, without scales and offsets."""
    sites = {site.name: site for site in iter_quantizers(net)}
    counts: Counter[int] = Counter()
    for name, parameter in net.named_parameters():
        _, kind = _module_and_kind(name, sites)
        if kind == "float_bytes":
            counts[FLOAT_BITS] += parameter.numel()
    seen = set()  # layers can share a weight
    for site in sites.values():
        if not _has_codes(site):
            continue
        for tensor in _replaced_by_codes(site):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                counts[site.quantizer.spec.bits] += tensor.numel()
                counts[FLOAT_BITS] -= tensor.numel()
    return counts


def macs_by_bits(net: nn.Module, input_size: tuple[int, ...]) -> Counter[int]:
    """Multiply-accumulates by bits of the wider operand, for an image (channels, height, width)."""
    counts: Counter[int] = Counter()
    for product in matmuls(net, input_size):
        counts[max(product.bits)] += product.macs
    return counts


def _module_cost(name: str, sizes: Mapping[str, int]) -> ModuleCost:
    return ModuleCost(name, **sizes)  # type: ignore[arg-type]


def _count_by_module(net: nn.Module) -> dict[str, Counter[str]]:
    """Number of parameters and bytes of each module, by field name of `ModuleCost`."""
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
    saved_names = net.state_dict().keys()  # without tables that are recomputed, as in Swin
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
    """Sizes of a weight as codes, and of its scales and offsets that are not yet stored tensors."""
    quantizer = site.quantizer
    spec = quantizer.spec
    sizes: Counter[str] = Counter()
    if isinstance(quantizer, FrozenWeight):
        weight = quantizer.stored
        sizes["n_params"] = weight.numel()
    else:
        weight = site.latent()
        sizes["scale_bytes"] = _computed_scale_bytes(quantizer, weight)
        if spec.bias_correction:
            sizes["offset_bytes"] = FLOAT_BYTES * len(weight)
    if quantizer.in_blocks:
        # The codes of each row of blocks start at a new byte.
        row_length = weight.shape[spec.axis or 0]
        num_rows = weight.numel() // row_length
        sizes["code_bytes"] = num_rows * packed_bytes(row_length, spec.bits)
    else:
        sizes["code_bytes"] = packed_bytes(weight.numel(), spec.bits)
    return sizes


def _computed_scale_bytes(quantizer: Quantizer, weight: Tensor) -> int:
    """Bytes of scales and zero points that only a frozen model stores, of a weight (rows, ...)."""
    rows = len(weight)
    if isinstance(quantizer, BlockFloat):
        return quantizer.scale_bytes(weight.shape)
    # Stored scales are already counted as parameters or buffers.
    if quantizer.spec.bias_correction:
        # Bias correction needs a scale and a zero point for each row.
        return FLOAT_BYTES * 2 * (rows - quantizer.num_stored_scales)
    return 0 if quantizer.num_stored_scales else FLOAT_BYTES * quantizer.num_scales(weight.shape)


def _replaced_by_codes(site: Site) -> list[Tensor]:
    """Tensors that a deployed model does not store in addition to packed codes."""
    quantizer = site.quantizer
    owner: Any = site.owner
    if isinstance(quantizer, FrozenWeight):
        if quantizer.spec.quantizer == "affine":
            return [quantizer.stored]
        # Without zero points, the shift follows from the quantizer's class, so do not count it.
        return [quantizer.stored, quantizer.shift]
    if site.role == "qk":
        return [owner.q_weight, owner.k_weight]
    return [owner.weight]


def _ids_not_stored(net: nn.Module, sites: Iterable[Site]) -> set[int]:
    """Ids of tensors that a deployed model does not need."""
    # A deployed model stores a relative step size as one number: the initial step size
    # times the learned factor.
    ids = {id(module.start) for module in net.modules() if isinstance(module, LSQ)}
    for site in sites:
        if isinstance(site.quantizer, FrozenActivation):
            ids.add(id(site.quantizer.bounds))
    return ids


def _module_and_kind(name: str, sites: Iterable[str]) -> tuple[str, str]:
    """The module and the field of `ModuleCost` to which a tensor's bytes are added.

    Args:
        name: name of the tensor.
        sites: names of the quantizers; the tensors of a quantizer count for the module that owns
            the quantizer.
    """
    quantizer = next((site for site in sites if name.startswith(f"{site}.")), None)
    module, _, _ = (quantizer or name).rpartition(".")
    _, _, attribute = name.rpartition(".")
    if attribute in _OFFSET_NAMES:
        return module, "offset_bytes"
    return module, "float_bytes" if quantizer is None else "scale_bytes"
