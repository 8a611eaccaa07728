"""Latent (float) weights of a net's layers: what terms on weights act on."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from qat.errors import UsageError
from qat.model.convert import stem_and_heads
from qat.model.sites import WEIGHT_ROLES, iter_quantizers
from qat.nn.quant_module import QuantModule

QK_FORMS = ("product", "factors")


@dataclass(frozen=True)
class LatentWeight:
    """Where a float tensor is; names, no references, so that copies of a net have their own.

    Attributes:
        layer: path of the module.
        role: `weight`, or `qk` (query-key reparameterization).
        parameter: its attribute; None = the product that the module folds.
    """

    layer: str
    role: str
    parameter: str | None

    def of(self, net: nn.Module) -> Tensor:
        """The tensor, in the graph of what it is made of."""
        module = net.get_submodule(self.layer)
        if self.parameter is not None:
            return getattr(module, self.parameter)
        assert isinstance(module, QuantModule)  # noqa: S101  (narrows a type)
        return module.latent(self.role)


def find_latent_weights(
    net: nn.Module, setting: str, layers: tuple[str, ...] | None = None, qk: str = "product"
) -> tuple[LatentWeight, ...]:
    """Weights of the Linears and convolutions of a net: the quantized ones, or all of a float net.

    Args:
        net: float or quantized.
        setting: what an error names.
        layers: globs of module names, or roles; None = all but the stem and the heads, which the paper leaves out too.
        qk: under query-key reparameterization the folded `product`, which is what is quantized, or its `factors`.

    Raises:
        UsageError: a glob that matches nothing, or no layer is left.
    """
    everything = list(_latents(net, qk))
    outside = stem_and_heads(net)
    if layers is None:
        chosen = [latent for latent in everything if latent.layer not in outside]
        if not chosen:
            raise UsageError(f"{setting}: this net has no Linears or convolutions beside stem and heads")
        return tuple(chosen)
    fits = {glob: [one for one in everything if one.role == glob or fnmatch.fnmatchcase(one.layer, glob)] for glob in layers}
    for glob, found in fits.items():
        if not found:
            example = next((one.layer for one in everything if one.layer not in outside), "none")
            raise UsageError(f"{setting}={glob!r} matches no layer; names are like {example!r}, roles are {', '.join(WEIGHT_ROLES)}")
    return tuple(latent for latent in everything if any(latent in found for found in fits.values()))


def _latents(net: nn.Module, qk: str) -> Iterator[LatentWeight]:
    """In the order of the net's modules; a tensor that two layers share is there once."""
    sites = [site for site in iter_quantizers(net) if site.is_weight]
    found = [(site.layer, site.role) for site in sites] or [
        (name, "weight") for name, module in net.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)
    ]
    seen: set[object] = set()
    for layer, role in found:
        of_qk = (None,) if qk == "product" else ("q_weight", "k_weight")
        for parameter in of_qk if role == "qk" else ("weight",):
            latent = LatentWeight(layer, role, parameter)
            key = (layer, role) if parameter is None else id(latent.of(net))
            if key not in seen:
                seen.add(key)
                yield latent
