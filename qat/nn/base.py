"""Shared by modules that own quantizers."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def adopt(cls: type[M], module: nn.Module) -> M:
    """A module of class `cls` with everything that `module` has: its parameters, buffers, children and settings, none of them copied."""
    made = cls.__new__(cls)
    made.__dict__.update(module.__dict__)
    for kind in ("_parameters", "_buffers", "_modules"):
        made.__dict__[kind] = dict(module.__dict__[kind])
    return made


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
