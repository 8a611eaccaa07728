"""The scales of a block as one vector."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qat.errors import UsageError
from qat.functional.evolution import noise_radius
from qat.model.sites import CONTAINER, Site, find_blocks, iter_quantizers
from qat.quantizers import Quantizer

# A scale divides; the calibration keeps the same distance from zero.
LOWEST_SCALE = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class ScaleVector:
    """Scales of several sites, one after the other, each flat.

    Attributes:
        sites: whose scales they are.
    """

    sites: tuple[Site, ...]

    @property
    def scales(self) -> list[Tensor]:
        """The tensors in the net."""
        return [scale for site in self.sites if (scale := stored_scale(site.quantizer)) is not None]

    def read(self) -> Tensor:
        """(n,) float64 on the CPU."""
        return torch.cat([scale.detach().cpu().double().flatten() for scale in self.scales])

    @torch.no_grad()
    def write(self, values: Tensor) -> None:
        """Put (n,) into the net, in its dtype; a scale is at least float32 eps."""
        scales = self.scales
        parts = values.split([scale.numel() for scale in scales])
        for site, scale, part in zip(self.sites, scales, parts, strict=True):
            holder = getattr(site.quantizer, "quantizer", site.quantizer)
            holder.set_scale(part.to(scale).clamp(min=LOWEST_SCALE).view_as(scale))

    def radius(self, fixed: float | None) -> Tensor:
        """(n,) float64: `fixed`, or what suits the bits of each scale."""
        sizes = ((scale.numel(), site.quantizer.spec.bits) for scale, site in zip(self.scales, self.sites, strict=True))
        return torch.cat([torch.full((n,), noise_radius(bits) if fixed is None else fixed, dtype=torch.float64) for n, bits in sizes])


def stored_scale(quantizer: Quantizer) -> Tensor | None:
    """The scale that a quantizer stores, that inside offsets too; None for one that reads it off its input."""
    inner = getattr(quantizer, "quantizer", quantizer)
    scale = getattr(inner, "scale", None)
    return scale if isinstance(scale, Tensor) else None


def place_in(block: str, site: Site) -> str:
    """What `search.targets` calls a site: the path of its owner in the block, and its role."""
    return f"{site.layer.removeprefix(block)}.{site.role}".lstrip(".")


def scale_vectors(net: nn.Module, targets: Iterable[str], place: Mapping[str, int] | None = None) -> dict[str, ScaleVector]:
    """The vector of every block that has one, first block first.

    Args:
        net: quantized.
        targets: globs, see `SearchSettings.targets`.
        place: when each quantizer runs, by name: the order in a vector.

    Raises:
        UsageError: the net has no blocks, or no block a stored scale that the globs match.
    """
    targets, blocks = tuple(targets), find_blocks(net)
    if not blocks:
        raise UsageError(f"search: this net has no blocks; they are looked for in modules called {CONTAINER!r}")
    sites = [site for site in iter_quantizers(net) if stored_scale(site.quantizer) is not None]
    places = {name: [(s, place_in(name, s)) for s in sites if s.name.startswith(f"{name}.")] for name in blocks}
    vectors = {}
    for name, inside in places.items():
        chosen = [site for site, place in inside if any(fnmatch.fnmatchcase(place, glob) for glob in targets)]
        if chosen:
            vectors[name] = ScaleVector(tuple(sorted(chosen, key=lambda site: (place or {}).get(site.name, 0))))
    if not vectors:
        known = sorted({place for inside in places.values() for _, place in inside})
        raise UsageError(
            f"search.targets={list(targets)}: no block has such a scale; stored scales are those of {', '.join(known) or 'nothing'}"
        )
    return vectors
