"""Stored scales as vectors, which `qat.ptq.search` changes block by block."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qat.errors import UsageError
from qat.functional.evolution import noise_radius
from qat.model.sites import BLOCKS, Site, find_blocks, iter_quantizers
from qat.ptq.runner import MIN_SCALE


class ScaleVector:
    """Stored scales of several sites as one vector; the quantizers may have offsets."""

    def __init__(self, sites: Sequence[Site]) -> None:
        self.sites = sites
        self.quantizers: list[Any] = [
            getattr(site.quantizer, "quantizer", site.quantizer) for site in sites
        ]

    def read(self) -> Tensor:
        """Read all scales (n,), as float64 on the CPU."""
        scales = []
        for quantizer in self.quantizers:
            scales.append(quantizer.scale.detach().cpu().double().flatten())
        return torch.cat(scales)

    @torch.no_grad()
    def write(self, values: Tensor) -> None:
        """Set all scales to `values` (n,), but at least float32 eps, in the dtype of the net."""
        parts = values.split([quantizer.num_stored_scales for quantizer in self.quantizers])
        for quantizer, part in zip(self.quantizers, parts, strict=True):
            scale = part.to(quantizer.scale).clamp(min=MIN_SCALE)
            quantizer.set_scale(scale.view_as(quantizer.scale))

    def radius(self, fixed_radius: float | None) -> Tensor:
        """Noise radius of each scale (n,), float64: `fixed_radius`, or derived from bits."""
        radii = []
        for quantizer in self.quantizers:
            radius = noise_radius(quantizer.spec.bits) if fixed_radius is None else fixed_radius
            radii.append(torch.full((quantizer.num_stored_scales,), radius, dtype=torch.float64))
        return torch.cat(radii)


def _name_in_block(site: Site, block: str) -> str:
    """The name of a site that globs are compared with, such as `attn.qkv.weight`."""
    return f"{site.layer.removeprefix(block)}.{site.role}".lstrip(".")


def scale_vectors(
    net: nn.Module, targets: Iterable[str], position: Mapping[str, int] = {}
) -> dict[str, ScaleVector]:
    """Scale vectors of blocks with matching scales, by block name, first block first.

    Args:
        net: a quantized net.
        targets: globs, see `SearchSettings.targets`.
        position: positions of quantizers in the run order, by name; they determine the order of
            the scales in a vector. A missing quantizer counts as 0.

    Raises:
        UsageError: the net has no blocks, or the globs match no stored scale of a block.
    """
    blocks = find_blocks(net)
    if not blocks:
        raise UsageError(f"search: must be null for this model, which has no blocks ({BLOCKS})")
    vectors: dict[str, ScaleVector] = {}
    stored_names: set[str] = set()
    for block in blocks:
        matching_sites = []
        for site in iter_quantizers(net):
            if not site.quantizer.num_stored_scales or not site.name.startswith(f"{block}."):
                continue
            name = _name_in_block(site, block)
            stored_names.add(name)
            if any(fnmatch.fnmatchcase(name, glob) for glob in targets):
                matching_sites.append(site)
        if matching_sites:
            matching_sites.sort(key=lambda site: position.get(site.name, 0))
            vectors[block] = ScaleVector(matching_sites)
    if not vectors:
        stored_text = ", ".join(sorted(stored_names)) or "nothing"
        raise UsageError(
            f"search.targets={list(targets)}: must match a scale of a block; stored scales are "
            f"those of {stored_text}"
        )
    return vectors
