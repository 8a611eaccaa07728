"""The identity: float is a quantizer too, so that no caller asks for the number of bits."""

from __future__ import annotations

from torch import Tensor

from qat.quantizers.quantizer import Quantizer
from qat.quantizers.registry import register


@register("float")
class Float(Quantizer):
    """Returns its input."""

    def forward(self, x: Tensor) -> Tensor:
        """`x` itself."""
        return x

    def codes(self, x: Tensor) -> Tensor:
        """A float tensor has no codes.

        Raises:
            TypeError: always.
        """
        raise TypeError(f"the float quantizer of role {self.spec.role!r} has no integer codes")
