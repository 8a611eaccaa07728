"""The one way to find quantizers in a net."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from qat.errors import UsageError
from qat.nn.quant_module import QuantModule
from qat.quantizers import Quantizer

WEIGHT_ROLES = ("weight", "qk")


@dataclass(frozen=True)
class Site:
    """One quantized tensor of a net.

    Attributes:
        name: path of the quantizer in the net, `blocks.0.mlp.fc1.weight_quantizer`.
        role: weight, input, q, k, v, qk (QKR's folded query-key weight), probs or image.
        owner: the module that holds the quantizer.
        quantizer: `quantizer(x)` fake-quantizes, `quantizer.codes(x)` gives integer codes.
    """

    name: str
    role: str
    owner: nn.Module
    quantizer: Quantizer

    @property
    def layer(self) -> str:
        """Path of the module that holds the quantizer, empty for the net itself."""
        return self.name.rpartition(".")[0]

    @property
    def is_weight(self) -> bool:
        """True for a weight, False for an activation."""
        return self.role in WEIGHT_ROLES

    def latent(self) -> Tensor:
        """The float tensor that a weight quantizer rounds, (out, ...); gradients reach the parameters it is made of.

        Raises:
            TypeError: the site is an activation, which has none.
            UsageError: the net is frozen, so that its codes are all there is.
        """
        if self.quantizer.held() is not None:
            raise UsageError(f"{self.name} holds integer codes alone; the float weights are in the checkpoint that the net was frozen from")
        if not (self.is_weight and isinstance(self.owner, QuantModule)):
            raise TypeError(f"{self.name} quantizes an activation; only roles {', '.join(WEIGHT_ROLES)} have a float master")
        return self.owner.latent(self.role)


def iter_quantizers(net: nn.Module) -> Iterator[Site]:
    """Every quantizer of a net once, in the order of its modules; a quantizer is a leaf (what it wraps is not listed)."""
    for owner_name, owner in net.named_modules():
        if isinstance(owner, Quantizer):
            continue
        for name, child in owner.named_children():
            if isinstance(child, Quantizer):
                yield Site(f"{owner_name}.{name}".lstrip("."), child.spec.role, owner, child)
