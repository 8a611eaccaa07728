"""Activation codes of a fixed batch, compared from one look to the next."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qat.model.sites import Site, iter_quantizers
from qat.utils.probing import probing


class ActivationCodes:
    """Codes of every quantized activation of a net on some images, one byte each (two where a code needs them).

    Attributes:
        codes: by site name, the leading `len(images)` entries of what the quantizer saw at the last look; on the CPU.
    """

    def __init__(self) -> None:
        self.codes: dict[str, Tensor] = {}

    def look(self, net: nn.Module, images: Tensor, precision: AbstractContextManager) -> dict[str, Tensor]:
        """Run the net on the images; what is compiled runs eagerly, since a compiled graph knows no hooks.

        Args:
            net: left as it was.
            images: (B, C, H, W), the same at every look.
            precision: autocast, or nothing.

        Returns:
            By site name, the share of codes that differ from the last look, a scalar each; empty at the first.
        """
        sites = [s for s in iter_quantizers(net) if not s.is_weight and not s.quantizer.is_float]
        seen: dict[str, Tensor] = {}
        with probing(net, [_remember(site, seen, len(images)) for site in sites]), precision:
            net.forward(images)
        before, self.codes = self.codes, {name: codes.cpu() for name, codes in seen.items()}
        return {name: (codes != before[name]).float().mean() for name, codes in self.codes.items() if name in before}


def _remember(site: Site, seen: dict[str, Tensor], rows: int) -> RemovableHandle:
    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen[site.name] = site.quantizer.codes(args[0].detach())[:rows].clone()

    return site.quantizer.register_forward_pre_hook(note)


def mean_share(shares: dict[str, Tensor]) -> Tensor:
    """Mean over sites, a scalar."""
    return torch.stack(list(shares.values())).mean()
