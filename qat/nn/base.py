"""Shared by modules that own quantizers."""

from __future__ import annotations

from torch import Tensor, nn


class QuantModule(nn.Module):
    """A module with quantizers among its attributes. `latent` gives the float tensor behind a weight quantizer."""

    def latent(self, role: str) -> Tensor:
        """The float master of the weight with this role.

        Raises:
            KeyError: the module quantizes no such weight.
        """
        if role != "weight":
            raise KeyError(role)
        weight = self.weight
        assert isinstance(weight, Tensor)  # noqa: S101  (narrows a type)
        return weight
