"""Latent (float) weights of a net's layers: what terms on weights act on."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from qat.errors import UsageError
from qat.model.convert import stem_and_heads
from qat.model.sites import iter_quantizers
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


def find_latent_weights(net: nn.Module, setting: str, qk: str = "product") -> tuple[LatentWeight, ...]:
    """Weights of the Linears and convolutions of a net but its stem and heads, which the paper leaves out too.

    Args:
        net: quantized: the quantized ones; float: all. A tensor that two layers share is there once.
        setting: what an error names.
        qk: under query-key reparameterization the folded `product`, which is what is quantized, or its `factors`.

    Raises:
        UsageError: no layer is left.
    """
    outside = stem_and_heads(net)
    sites = [(site.layer, site.role) for site in iter_quantizers(net) if site.is_weight]
    floats = [(name, "weight") for name, module in net.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    found: dict[object, LatentWeight] = {}
    for layer, role in sites or floats:
        of_qk = (None,) if qk == "product" else ("q_weight", "k_weight")
        for parameter in () if layer in outside else of_qk if role == "qk" else ("weight",):
            latent = LatentWeight(layer, role, parameter)
            found.setdefault((layer, role) if parameter is None else id(latent.of(net)), latent)
    if not found:
        raise UsageError(f"{setting}: this net has no Linears or convolutions beside stem and heads")
    return tuple(found.values())
