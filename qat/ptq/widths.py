"""The bits of a calibrated net's weights, and the scales that go with them."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qat.errors import UsageError
from qat.functional.allocation import Assignment
from qat.model.sites import Site, iter_quantizers
from qat.ptq.observers import Observer
from qat.quantizers import Affine
from qat.spec import QuantRecipe

# What a rule about `bits` sets too; one that is older would win over it.
_FOLLOW_BITS = ("stem_bits", "head_bits")


class Widths:
    """Weights whose bits may change, in the order in which they are used.

    At another width, a weight has the scale and zero point that calibration would have given it: its observer sees the weight alone.
    They are found once for each layer and width.

    Args:
        net: converted with a `PtqRecipe` and calibrated.
        targets: globs of the modules that own the weights.
        order: when each quantizer first runs, by name.

    Attributes:
        names: of the modules.
        numels: entries of each weight.

    Raises:
        UsageError: no weight with a stored scale is matched.
    """

    def __init__(self, net: nn.Module, targets: Iterable[str], order: Mapping[str, int]) -> None:
        targets = tuple(targets)
        sites = [s for s in iter_quantizers(net) if s.is_weight and type(s.quantizer) is Affine and s.name in order]
        owners = {site.name: site.name.rpartition(".")[0] for site in sites}
        chosen = [site for site in sites if any(fnmatch.fnmatchcase(owners[site.name], glob) for glob in targets)]
        if not chosen:
            known = ", ".join(owners.values()) or "nothing"
            raise UsageError(f"search.targets={list(targets)}: no such module has a weight whose bits can change; those are {known}")
        self.sites: tuple[Site, ...] = tuple(sorted(chosen, key=lambda site: order[site.name]))
        self.names = tuple(owners[site.name] for site in self.sites)
        self.numels = tuple(site.latent().numel() for site in self.sites)
        self._found: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def read(self) -> Assignment:
        """The bits of each weight."""
        return tuple(site.quantizer.spec.bits for site in self.sites)

    @torch.no_grad()
    def write(self, assignment: Assignment) -> list[Site]:
        """Give every weight its bits, scales and zero points; tells whose have changed."""
        changed = []
        for number, (site, bits) in enumerate(zip(self.sites, assignment, strict=True)):
            if site.quantizer.spec.bits != bits:
                self._put(number, bits)
                changed.append(site)
        return changed

    def _put(self, number: int, bits: int) -> None:
        site = self.sites[number]
        quantizer = site.quantizer
        assert isinstance(quantizer, Affine)  # noqa: S101  (narrows a type)
        # A scale that the net came with may be another than its observer's, after a search over scales.
        self._found.setdefault((number, quantizer.spec.bits), (quantizer.scale.clone(), quantizer.zero_point.clone()))
        quantizer.resize(bits)
        if (number, bits) not in self._found:
            observer = Observer(quantizer)
            observer.update(site.latent())
            self._found[number, bits] = observer.scale(site.latent())
        scale, zero_point = self._found[number, bits]
        quantizer.scale.copy_(scale)
        quantizer.zero_point.copy_(zero_point)


def with_bits(recipe: QuantRecipe, bits: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """The `overrides` of a recipe with those bits: its own rules, then one for each module.

    Args:
        recipe: of the net as it was converted.
        bits: of weights, by the name of their module.
    """
    rules: dict[str, dict[str, Any]] = {name: dict(rule) for name, rule in recipe.overrides.items()}
    for name, width in bits.items():
        # A rule of that very name moves to the end: it has to keep what the rules behind it made of its knobs.
        at, earlier = recipe.at(name), rules.pop(name, {})
        rules[name] = {knob: getattr(at, knob) for knob in earlier if knob not in _FOLLOW_BITS} | {"bits": width}
    return rules


def set_bits(net: nn.Module, bits: Mapping[str, int]) -> None:
    """Give weights of a calibrated net other bits, by the name of their module; its recipe stays as it is."""
    widths = Widths(net, tuple(bits), {site.name: number for number, site in enumerate(iter_quantizers(net))})
    widths.write(tuple(bits[name] for name in widths.names))
