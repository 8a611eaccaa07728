"""What a training step cannot do without: multiply-accumulates, forward and backward, and bytes that quantizers must move.

By formula from the products of the net (`qat.model.cost`) and from the tensors that its quantizers see; used by `make profile-step`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.kure_cost import SIZE
from benchmarks.step_arms import Batch
from qat.model.cost import matmuls
from qat.model.sites import iter_quantizers
from qat.utils.probing import probing

FLOAT32 = 4
# Passes over an activation that its quantizer needs by itself: x and x_hat forward; x, the gradient behind and the one in front backward.
ACTIVATION_PASSES = 5
# Over a weight: its mean, then it and its levels; the gradient passes as it is.
WEIGHT_PASSES = 3


@dataclass(frozen=True)
class Floor:
    """Of one step.

    Attributes:
        forward: multiply-accumulates.
        backward: likewise; twice as many, but for the first layer's input if nothing in front of it learns.
        activations: bytes of the activations that are quantized.
        weights: bytes of the weights that are.
    """

    forward: int
    backward: int
    activations: int = 0
    weights: int = 0

    @property
    def macs(self) -> int:
        """Of both passes."""
        return self.forward + self.backward

    @property
    def moved(self) -> int:
        """Bytes read and written by quantizers that go over memory once forward and once backward."""
        return ACTIVATION_PASSES * self.activations + WEIGHT_PASSES * self.weights

    def seconds(self, rate: float, bandwidth: float) -> tuple[float, float]:
        """Of the products, and of the bytes, at multiply-accumulates and bytes a second."""
        return self.macs / rate, self.moved / bandwidth


def quantized_bytes(net: nn.Module, images: Tensor) -> tuple[int, int]:
    """Float32 bytes of the activations, and of the weights, that quantizers see in a forward pass."""
    seen = {True: 0, False: 0}

    def hook(is_weight: bool) -> Callable[..., None]:  # noqa: FBT001
        def add(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            seen[is_weight] += FLOAT32 * args[0].numel()

        return add

    with torch.no_grad(), probing(net, [site.quantizer.register_forward_hook(hook(site.is_weight)) for site in iter_quantizers(net)]):
        net(images)
    return seen[False], seen[True]


def floor(net: nn.Module, batch: Batch, *, frozen: bool = False) -> Floor:
    """Count those of a step; of a forward pass alone for a frozen net."""
    images = batch[0]
    products = list(matmuls(net, SIZE))
    forward = images.shape[0] * sum(product.macs for product in products)
    if frozen:
        return Floor(forward, 0)
    first = images.shape[0] * products[0].macs
    activations, weights = quantized_bytes(net, images)
    learns = any(site.role == "image" and any(p.requires_grad for p in site.quantizer.parameters()) for site in iter_quantizers(net))
    return Floor(forward, 2 * forward - (0 if learns else first), activations, weights)


def _best(run: Callable[[], object], repeats: int = 5) -> float:
    """Seconds of the process, the least of some runs."""
    times = []
    for _ in range(repeats):
        began = time.process_time()
        run()
        times.append(time.process_time() - began)
    return min(times)


def machine_rates(rows: int = 1576, width: int = 192) -> tuple[float, float]:
    """Multiply-accumulates a second of a Linear of DeiT-T, (rows, width) to (rows, 4 * width), and bytes a second read and written."""
    a, b = torch.randn(rows, width), torch.randn(width, 4 * width)
    rate = 10 * rows * width * 4 * width / _best(lambda: [a @ b for _ in range(10)])
    x, out = torch.randn(2**24), torch.empty(2**24)
    return rate, 2 * x.numel() * FLOAT32 / _best(lambda: out.copy_(x))
