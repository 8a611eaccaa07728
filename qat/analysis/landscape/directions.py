"""Moving a net along two directions, of its scales or of its weights, and back to the last bit."""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import functools
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qat.analysis.requantize import GridSite, weight_sites
from qat.errors import UsageError
from qat.model.blocks import find_blocks
from qat.model.frozen import is_frozen
from qat.model.sites import Site, iter_quantizers
from qat.nn import QkrAttention
from qat.ptq.patching import Forward, patched
from qat.ptq.vector import ScaleVector, place_in, stored_scale
from qat.quantizers import UniformGrid
from qat.utils.validate import FLOAT_BITS

Globs = tuple[str, ...]


@dataclass(frozen=True)
class Axes:
    """Two directions in which a net can be moved.

    Attributes:
        net: that moves.
        names: what moves along each of them.
        move: `move(x, y)` is a context in which the net is away from where it is, and after which it is back, bit for bit.
    """

    net: nn.Module
    names: tuple[Globs, Globs]
    move: Callable[[float, float], contextlib.AbstractContextManager[None]]


def scale_axes(net: nn.Module, input_size: tuple[int, int, int], targets: Sequence[Globs], seed: int) -> Axes:
    """Directions of scales: each entry is uniform in [-1, 1] times the scale, as a mutation of Evol-Q's is uniform in a cube.

    Weights keep their zero points and the range of their codes.

    Args:
        net: quantized.
        input_size: of its images.
        targets: what moves along the one and the other direction.
        seed: of the directions.

    Raises:
        UsageError: no scale is matched.
    """
    found = weight_sites(net, input_size)
    weights = {f"{site.name}.{site.quantizer.spec.role}": site for site in found.sites if site.grid.bits != FLOAT_BITS}
    stored = _stored_scales(net)
    latents = {site.quantizer: site.latent().detach() for site in iter_quantizers(found.net) if site.is_weight}
    counts = {name: len(_own(site, latents[site.quantizer]).step) for name, site in weights.items()}
    counts |= {name: sum(scale.numel() for scale in vector.scales) for name, vector in stored.items()}
    names = _matched(net, tuple(counts), targets, "scale")
    plane = _plane({name: torch.Size([n]) for name, n in counts.items()}, names, seed, _uniform)

    @contextlib.contextmanager
    def move(x: float, y: float) -> Generator[None]:
        def factor(name: str) -> Tensor | None:
            parts = [at * direction[name] for at, direction in zip((x, y), plane, strict=True) if name in direction]
            return 1 + torch.stack(parts).sum(0) if parts else None

        forwards: dict[nn.Module, Forward] = {
            site.quantizer: functools.partial(_rescaled, site, of) for name, site in weights.items() if (of := factor(name)) is not None
        }
        others = [pair for name, vector in stored.items() if (of := factor(name)) is not None for pair in _multiplied(vector, of)]
        with patched(forwards), _replaced(others):
            yield

    return Axes(found.net, names, move)


def weight_axes(net: nn.Module, targets: Sequence[Globs], seed: int) -> Axes:
    """Directions of weights: normal noise, each row as long as the row of the weight: filter normalisation.

    Source: Li et al., Visualizing the loss landscape of neural nets, arXiv 1712.09913, section 4. Biases, norms and embeddings stay.

    Args:
        net: float or quantized: then its float masters move.
        targets: what moves along the one and the other direction.
        seed: of the directions.

    Raises:
        UsageError: no weight is matched, or there are codes in their place.
    """
    if is_frozen(net):
        raise UsageError("analysis.space='weights': the file holds integer codes alone; the float weights are in the checkpoint behind it")
    weights = dict(_layer_weights(net))
    names = _matched(net, tuple(weights), targets, "weight")
    shapes = {name: torch.Size([sum(t.shape[0] for t in tensors), *tensors[0].shape[1:]]) for name, tensors in weights.items()}
    plane = _plane(shapes, names, seed, torch.randn)
    # Several tensors of one name are the rows of one.
    rows = {name: [t.shape[0] for t in tensors] for name, tensors in weights.items()}
    normalised = [{name: list(map(_as_long_as, d[name].split(rows[name]), weights[name])) for name in d} for d in plane]

    @contextlib.contextmanager
    def move(x: float, y: float) -> Generator[None]:
        moved = []
        for name, tensors in weights.items():
            for number, tensor in enumerate(tensors):
                steps = [at * d[name][number] for at, d in zip((x, y), normalised, strict=True) if name in d]
                if steps:
                    moved.append((tensor, tensor.detach() + torch.stack(steps).sum(0)))
        with _replaced(moved):
            yield

    return Axes(net, names, move)


def has_both(net: nn.Module, targets: Sequence[Globs]) -> bool:
    """True if each of the entries matches a quantized weight of the net."""
    names = tuple(f"{site.layer}.{site.role}" for site in iter_quantizers(net) if site.is_weight and not site.quantizer.is_float)
    return all(_chosen(net, names, globs) for globs in targets)


def _own(site: GridSite, weight: Tensor) -> UniformGrid:
    return site.grid.own(weight, site.grid.bits)


@torch.no_grad()
def _rescaled(site: GridSite, factor: Tensor, weight: Tensor) -> Tensor:
    own = _own(site, weight)
    onto = dataclasses.replace(own, step=own.step * factor.to(own.step))
    return site.grid.fake_quantize(weight, onto).to(weight.dtype)


def _stored_scales(net: nn.Module) -> dict[str, ScaleVector]:
    """Of activations; quantizers of one module and role, as behind both sums of a block, have one name."""
    found: dict[str, list[Site]] = {}
    for site in iter_quantizers(net):
        if not site.is_weight and stored_scale(site.quantizer) is not None:
            found.setdefault(place_in("", site), []).append(site)
    return {name: ScaleVector(tuple(sites)) for name, sites in found.items()}


def _multiplied(vector: ScaleVector, factors: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Tensors behind scales, each with what it has to hold for every scale in force to be times its factor (n,)."""
    scales = vector.scales
    for site, scale, factor in zip(vector.sites, scales, factors.split([scale.numel() for scale in scales]), strict=True):
        quantizer: Any = getattr(site.quantizer, "quantizer", site.quantizer)
        values = scale.detach() * factor.to(scale)
        if getattr(quantizer, "change", None) is None:
            yield scale, values
        else:  # a relative step that has grown is not proportional to its start; one that begins anew is its start
            yield quantizer.start, values
            yield quantizer.change, torch.zeros_like(values)


def _layer_weights(net: nn.Module) -> Iterator[tuple[str, list[Tensor]]]:
    for name, module in net.named_modules():
        if isinstance(module, QkrAttention):
            yield f"{name}.qk", [module.q_weight, module.k_weight]
        elif isinstance(module, nn.Linear | nn.Conv2d):
            yield f"{name}.weight", [module.weight]


def _as_long_as(direction: Tensor, weight: Tensor) -> Tensor:
    """Rows of a direction (out, ...), each with the norm of the row of a weight of this shape."""
    flat, rows = direction.flatten(1), weight.detach().flatten(1)
    lengths = rows.norm(dim=1, keepdim=True).to(flat) / flat.norm(dim=1, keepdim=True).clamp(min=torch.finfo(flat.dtype).tiny)
    return (flat * lengths).view_as(direction).to(weight)


@contextlib.contextmanager
def _replaced(tensors: Sequence[tuple[Tensor, Tensor]]) -> Generator[None]:
    """While it lasts, each tensor holds other values."""
    before = [tensor.detach().clone() for tensor, _ in tensors]
    try:
        with torch.no_grad():
            for tensor, values in tensors:
                tensor.copy_(values)
        yield
    finally:
        with torch.no_grad():
            for (tensor, _), values in zip(tensors, before, strict=True):
                tensor.copy_(values)


def _uniform(shape: torch.Size, *, generator: torch.Generator) -> Tensor:
    return 2 * torch.rand(shape, generator=generator) - 1


def _plane(
    shapes: Mapping[str, torch.Size], names: Sequence[Globs], seed: int, draw: Callable[..., Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Two directions, drawn on the CPU: the same on every device."""
    first, second = (torch.Generator().manual_seed(2 * seed + number) for number in range(2))
    return tuple(  # type: ignore[return-value]
        {name: draw(shapes[name], generator=generator) for name in of} for generator, of in zip((first, second), names, strict=True)
    )


def _matched(net: nn.Module, names: Globs, targets: Sequence[Globs], what: str) -> tuple[Globs, Globs]:
    """The names that each of two targets matches.

    Raises:
        UsageError: there are none.
    """
    found = []
    for globs in targets:
        chosen = _chosen(net, names, globs)
        if not chosen:
            known = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
            raise UsageError(f"analysis.targets={list(globs)}: no {what} has such a name; they are {known or 'none: the net is float'}")
        found.append(chosen)
    return found[0], found[1]


def _chosen(net: nn.Module, names: Globs, globs: Globs) -> Globs:
    """Globs see the name in the net, and the one in the block around it."""
    blocks = tuple(find_blocks(net))

    def known_as(name: str) -> tuple[str, ...]:
        return (name, *(name.removeprefix(f"{block}.") for block in blocks if name.startswith(f"{block}.")))

    return tuple(name for name in names if any(fnmatch.fnmatchcase(known, glob) for known in known_as(name) for glob in globs))
