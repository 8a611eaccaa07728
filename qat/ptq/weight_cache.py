"""Fake-quantized weights made once, not in every forward."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from qat.model.sites import Site, iter_quantizers
from qat.ptq.patching import patched
from qat.quantizers import Quantizer


class WeightCache:
    """Remembers what every weight quantizer gave back. Weights must stay; a scale that changes has to be named to `forget`."""

    def __init__(self, net: nn.Module) -> None:
        self._quantizers = [site.quantizer for site in iter_quantizers(net) if site.is_weight]
        self._kept: dict[Quantizer, Tensor] = {}
        self._live: frozenset[Quantizer] = frozenset()

    @contextlib.contextmanager
    def active(self) -> Generator[None]:
        """While it lasts, a weight is quantized once."""
        try:
            with patched({quantizer: self._remembering(quantizer) for quantizer in self._quantizers}):
                yield
        finally:
            self._kept.clear()

    def forget(self, sites: Iterable[Site]) -> None:
        """Quantize the weights of these sites anew when they are needed next."""
        for site in sites:
            self._kept.pop(site.quantizer, None)

    @contextlib.contextmanager
    def live(self, sites: Iterable[Site]) -> Generator[None]:
        """While it lasts, these sites quantize in every forward, so that gradients reach their scales."""
        self._live = frozenset(site.quantizer for site in sites)
        try:
            yield
        finally:
            self._live = frozenset()

    def _remembering(self, quantizer: Quantizer) -> Callable[[Tensor], Tensor]:
        original: Callable[[Tensor], Any] = quantizer.forward

        def forward(weight: Tensor) -> Tensor:
            if quantizer in self._live:
                return original(weight)
            if quantizer not in self._kept:
                with torch.no_grad():
                    self._kept[quantizer] = original(weight)
            return self._kept[quantizer]

        return forward
