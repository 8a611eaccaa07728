"""Put the tensors of a file of the authors into a converted net: strictly, and nothing is lost unnoticed."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from qat.errors import UsageError
from qat.interop.layout import OfqLayout
from qat.interop.names import CONSTANT, DEAD, WINDOW_INDEX, place_of

LIKELY_BITS = (2, 3, 4)
# Inputs that come from a LayerNorm have E|x| of about 0.8, and LSQ's first step is 2 E|x| / sqrt(qmax).
_FIRST_STEP = 1.6
_BEHIND_NORMS = ("attn.input_quantizer.quantizer.scale", "qkv.input_quantizer.quantizer.scale")


def mergings_with_bias(net: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """Names of a Swin's patch mergings that have a bias in the file: the authors' Linear always has one, timm's has none there."""
    names = [name for name, module in net.named_modules() if isinstance(module, nn.Linear) and name.endswith("reduction")]
    return [name for name in names if place_of(f"{name}.bias", swin=True, qkr=True).name in state]


def fill(net: nn.Module, state: Mapping[str, Tensor], layout: OfqLayout, origin: str) -> None:
    """Load a file's tensors.

    Args:
        net: converted as `layout` says.
        state: tensors under the authors' names.
        layout: what net the file holds.
        origin: how to call the file in messages.

    Raises:
        UsageError: names the first tensor that is missing, has another shape, or has no place in the net.
    """
    found, taken = {}, set()
    for name, own in net.state_dict().items():
        place = place_of(name, swin=layout.swin, qkr=layout.qkr)
        if place.name not in state:
            raise UsageError(f"{origin}: tensor {place.name} is missing")
        whole = own.shape if place.third is None else torch.Size((3 * own.numel(),))
        tensor = _fitted(state[place.name], whole, place.name, origin)
        found[name] = tensor if place.third is None else tensor.chunk(3)[place.third]
        taken.add(place.name)
    _check_rest(net, {name: tensor for name, tensor in state.items() if name not in taken}, origin)
    net.load_state_dict(found)


def _fitted(tensor: Tensor, shape: torch.Size, name: str, origin: str) -> Tensor:
    """A stored tensor in the shape it has here: maps and single numbers are flat there."""
    if tensor.numel() != shape.numel() or (tensor.ndim > 1 and tensor.shape != shape):
        raise UsageError(f"{origin}: {name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")
    return tensor.reshape(shape)


def _check_rest(net: nn.Module, rest: Mapping[str, Tensor], origin: str) -> None:
    """What the net does not take must be dead, or what it has without being told."""
    indices = [index.flatten() for name, index in net.named_buffers() if WINDOW_INDEX.search(name)]
    for name, tensor in rest.items():
        is_default = CONSTANT.search(name) and bool((tensor == 2).all())
        is_index = WINDOW_INDEX.search(name) and any(torch.equal(tensor.flatten(), index) for index in indices)
        if not (DEAD.search(name) or is_default or is_index):
            raise UsageError(f"{origin}: nothing in the net corresponds to {name}")


def likely_act_bits(net: nn.Module) -> tuple[int, float]:
    """The width of `LIKELY_BITS` that activation steps behind norms look like, and their mean: a hint, since training moves them."""
    steps = [p.detach() for name, p in net.named_parameters() if name.endswith(_BEHIND_NORMS)]
    mean = float(torch.cat(steps).mean().clamp_min(1e-5))
    return min(LIKELY_BITS, key=lambda bits: abs(math.log(mean * math.sqrt(2 ** (bits - 1) - 1) / _FIRST_STEP))), mean
