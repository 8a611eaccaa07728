"""Which layers of a net cost its accuracy, and which bits each should have under a size. Docs: docs/analysis.md."""

from __future__ import annotations

import functools
import itertools
import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from matplotlib.colors import SymLogNorm
from torch import nn

from qat.analysis.analysis import (
    WIDTH,
    Analysis,
    Drawing,
    EvaluationPoint,
    ImageSet,
    Outcome,
    Row,
    StudiedNet,
    Table,
    measure,
    panels,
)
from qat.analysis.requantize import WeightSite, in_blocks, is_float, requantized, weight_sites
from qat.errors import UsageError
from qat.functional.packing import packed_bytes
from qat.model.convert import Conversion, conversion_of
from qat.model.cost import FLOAT_BYTES, size_bytes
from qat.model.sites import iter_quantizers
from qat.nn.fqvit import IntegerLayerNorm
from qat.ptq.runner import Forward, patched
from qat.quantizers import Quantizer
from qat.utils.validate import FLOAT_BITS, check_bits, check_list, check_number

log = logging.getLogger(__name__)
MB = 10**6

# Bytes of the weights of layers, by name and bits.
Sizes = Mapping[str, Mapping[int, int]]


@dataclass(frozen=True)
class Sensitivity(Analysis):
    """The settings of `analysis/sensitivity.yaml`.

    Attributes:
        bits: widths at which the weights of each layer are tried.
        budget_mb: size to suggest bits for, 10^6 bytes; None = no suggestion.

    Raises:
        UsageError: a value that cannot work.
    """

    bits: Sequence[int] = (2, 3, 4, 8)
    budget_mb: float | None = None

    name: ClassVar[str] = "sensitivity"
    split: ClassVar[str | None] = "val"

    def __post_init__(self) -> None:
        for width in check_list("analysis.bits", self.bits):
            check_bits("analysis.bits", width)
        if self.budget_mb is not None:
            check_number("analysis.budget_mb", self.budget_mb, 0, above=True)

    def run(self, nets: Sequence[StudiedNet], images: ImageSet) -> Outcome:
        """Evaluate each layer left in float and at other bits, then the suggested bits as a whole.

        Raises:
            UsageError: the budget is below the smallest size of a net.
        """
        summary: dict[str, Any] = {}
        table: list[Row] = []
        drawings: list[Drawing] = []
        for number, studied in enumerate(nets, start=1):
            lines, summary[studied.label] = self._measured(studied, images)
            table += lines
            drawings.append(
                _heat_map(
                    f"sensitivity-{number}" if len(nets) > 1 else "sensitivity",
                    studied.label,
                    lines,
                )
            )
        return Outcome(
            summary,
            [Table("sensitivity", "Layers and what their quantization costs", table)],
            drawings,
        )

    def _measured(self, studied: StudiedNet, images: ImageSet) -> tuple[list[Row], dict[str, Any]]:
        """Lines of the table, and the summary."""
        label, conversion = studied.label, conversion_of(studied.net)
        net, sites = weight_sites(studied.net, studied.input_size)
        weights = {site.name: site for site in sites}
        rounding: dict[
            str, list[Quantizer]
        ] = {}  # by layer; what a net quantizes beside its layers is `(net)`
        for site in iter_quantizers(net):
            if not site.quantizer.is_float or site.layer in weights:
                rounding.setdefault(site.layer or "(net)", []).extend(
                    [] if site.quantizer.is_float else [site.quantizer]
                )
        # In training, a rule about the bits of a stem or a head means their input too.
        rest, sizes = stored_bytes(net, sites if is_float(sites) else in_blocks(sites), self.bits)
        least = rest + sum(min(of.values()) for of in sizes.values())
        if self.budget_mb is not None and least > round(self.budget_mb * MB):
            # To the byte: what is printed can be typed.
            raise UsageError(
                f"analysis.budget_mb={self.budget_mb}: must be at least {least / MB:f}, which {label} takes with the lowest bits everywhere"
            )

        points = [EvaluationPoint({}, net)]
        for name, quantizers in rounding.items():
            if quantizers:
                points.append(
                    EvaluationPoint(
                        {"layer": name, "change": "in float"},
                        net,
                        functools.partial(left_in_float, net, quantizers),
                    )
                )
            for bits in self.bits:
                if name in weights and bits != weights[name].bits:
                    change = functools.partial(with_bits, sites, {name: bits})
                    points.append(
                        EvaluationPoint({"layer": name, "change": f"{bits} bits"}, net, change)
                    )
        as_is, *rows = measure(points, images)
        lines: dict[str, Row] = {}
        for name in rounding:
            weight = weights.get(name)
            lines[name] = {
                "net": label,
                "layer": name,
                "weights": weight and weight.shape.numel(),
                "bits": weight and weight.bits,
            }
        for row in rows:
            lines[row["layer"]][f"{row['change']}: loss change"] = row["loss"] - as_is["loss"]
            lines[row["layer"]][f"{row['change']}: top-1 change (points)"] = (
                row["top1"] - as_is["top1"]
            )

        summary: dict[str, Any] = {"as_is": as_is}
        if in_float := [row for row in rows if row["change"] == "in float"]:
            best = min(in_float, key=lambda row: row["loss"])
            summary["most_sensitive"] = {
                "layer": best["layer"],
                "loss_change": best["loss"] - as_is["loss"],
            }
        if (budget := self.budget_mb) is not None:
            rises = {
                name: {
                    bits: float(lines[name].get(f"{bits} bits: loss change", 0.0)) for bits in of
                }
                for name, of in sizes.items()
            }
            chosen = greedy_bits(sizes, rises, round(budget * MB) - rest)
            (row,) = measure(
                [EvaluationPoint({}, net, functools.partial(with_bits, sites, chosen))], images
            )
            suggestion = summary["suggestion"] = {
                "budget_mb": budget,
                "size_bytes": rest + sum(sizes[name][bits] for name, bits in chosen.items()),
                "expected_loss": as_is["loss"]
                + sum(rises[name][bits] for name, bits in chosen.items()),
                **row,
                "bits_of_layers": chosen,
                "setting": as_setting(conversion, chosen),
            }
            log.info(
                "%(net)s within %(budget_mb)g MB: %(size_bytes)d bytes, "
                "loss %(loss).4f (%(expected_loss).4f as the sum of single changes), top-1 %(top1).2f %%:\n'%(setting)s'",
                {"net": label, **suggestion},
            )
            for name, line in lines.items():
                line[f"bits for {budget:g} MB"] = chosen.get(name)
        return list(lines.values()), summary


def left_in_float(net: nn.Module, quantizers: Sequence[Quantizer]) -> AbstractContextManager[None]:
    """While it lasts these quantizers pass on what they get, and a norm in integers beside one, which rounds with its scale, is a norm."""
    forwards: dict[nn.Module, Forward] = {quantizer: lambda x: x for quantizer in quantizers}
    forwards |= {
        m: m.in_float
        for m in net.modules()
        if isinstance(m, IntegerLayerNorm) and not {*quantizers}.isdisjoint(m.between)
    }
    return patched(forwards)


def with_bits(sites: Sequence[WeightSite], bits: Mapping[str, int]) -> AbstractContextManager[None]:
    """While it lasts weights have these bits, by name, those of a float net with step sizes of least error; equal bits change nothing."""
    change = functools.partial(requantized, steps_from="mse" if is_float(sites) else "own")
    others = [site for site in sites if bits.get(site.name, site.bits) != site.bits]
    return patched({
        site.quantizer: functools.partial(change, site.rule, bits=bits[site.name])
        for site in others
    })


def stored_bytes(
    net: nn.Module, free: Sequence[WeightSite], widths: Sequence[int]
) -> tuple[int, Sizes]:
    """Bytes of a net but for some weights; and of each of those by its bits, the present ones among them."""
    rest = size_bytes(net) - sum(packed_bytes(site.shape.numel(), site.bits) for site in free)
    # `ptq.py` gives each row of a float weight a scale and a zero point.
    rest += sum(2 * FLOAT_BYTES * site.shape[0] for site in free if site.bits == FLOAT_BITS)
    return rest, {
        site.name: {
            bits: packed_bytes(site.shape.numel(), bits)
            for bits in sorted({*widths, site.bits} - {FLOAT_BITS})
        }
        for site in free
    }


def greedy_bits(
    sizes: Sizes, rises: Mapping[str, Mapping[int, float]], room: int
) -> dict[str, int]:
    """Bits of each layer that fit a size: from those of least loss, the reduction that adds least loss per byte saved, again and again.

    Args:
        sizes: bytes by layer and bits; the smallest of all fit.
        rises: what they add to the loss.
        room: bytes.
    """
    bits = {
        name: min(of, key=lambda width: (rises[name][width], of[width]))
        for name, of in sizes.items()
    }
    while sum(sizes[name][width] for name, width in bits.items()) > room:
        _, name, width = min(
            ((rises[name][width] - rises[name][now]) / (of[now] - of[width]), name, width)
            for name, of in sizes.items()
            for now in [bits[name]]
            for width in of
            if of[width] < of[now]
        )
        bits[name] = width
    return bits


def as_setting(conversion: Conversion | None, bits: Mapping[str, int]) -> str:
    """Bits of layers, after the rules that a net has, as a command takes them: `quant.overrides={...}` of `train.py`, else `ptq.`."""
    group = "ptq"
    rules: dict[str, dict[str, Any]] = {name: {"bits": width} for name, width in bits.items()}
    if conversion is not None:
        recipe, group = conversion.recipe, conversion.recipe.GROUP
        if recipe.rule_bits == "both":  # the weights' bits alone were chosen
            rules = {
                name: rule | {"act_bits": recipe.at(name).act_bits} for name, rule in rules.items()
            }
        rules = {
            name: dict(rule) for name, rule in recipe.overrides.items() if name not in rules
        } | {name: {**recipe.overrides.get(name, {}), **rule} for name, rule in rules.items()}
    # In Hydra's grammar, in which keys have no quotes.
    each = (
        f"{name}:{{{','.join(f'{knob}:{json.dumps(value)}' for knob, value in rule.items())}}}"
        for name, rule in rules.items()
    )
    return f"{group}.overrides={{{','.join(each)}}}"


def _heat_map(name: str, label: str, lines: Sequence[Row]) -> Drawing:
    """Loss changes by layer and what is changed of it; a shade is a factor, as one layer may cost a thousand times what another does."""
    found = sorted({column for line in lines for column in line if column.endswith("loss change")})
    columns = [column.partition(":")[0] for column in found]
    losses = torch.tensor(
        [[line.get(column, 0.0) for column in found] for line in lines], dtype=torch.float64
    )
    reach = float(losses.abs().max()) or 1.0
    norm = SymLogNorm(linthresh=reach / 100, vmin=-reach, vmax=reach)
    drawn, (axis,) = panels(width=0.7 * WIDTH, height=1.1 + 0.19 * len(lines))
    image = axis.imshow(losses.numpy(), aspect="auto", cmap="PuOr_r", norm=norm)
    for (y, line), (x, column) in itertools.product(enumerate(lines), enumerate(found)):
        if (value := line.get(column)) is not None:
            is_dark = abs(float(norm(value)) - 0.5) > 0.33
            axis.text(
                x,
                y,
                f"{value:+.2g}",
                ha="center",
                va="center",
                fontsize=6.5,
                color="white" if is_dark else "black",
            )
    axis.set_xticks(range(len(columns)), columns)
    axis.set_yticks(range(len(lines)), [line["layer"] for line in lines])
    axis.grid(visible=False)
    drawn.colorbar(
        image, ax=axis, label="loss change", shrink=0.8, ticks=[-reach, 0, reach], format="%.2g"
    )
    pairs = zip(columns, losses.T, strict=True)
    highest = [
        f"{column}: {lines[int(of.argmax())]['layer']} adds most ({float(of.max()):+.4f})"
        for column, of in pairs
    ]
    title = f"Loss of {label} when one layer is left in float, or has weights of other bits"
    return Drawing(name, title, f"Heat map of {len(lines)} layers. {'; '.join(highest)}.", drawn)
