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
from matplotlib.patches import Rectangle
from torch import nn

from qat.analysis.analysis import Analysis, Drawing, EvaluationPoint, ImageSet, Outcome, Row, StudiedNet, Table, measure
from qat.analysis.requantize import STEPS_FROM, GridSite, WeightSites, requantized, weight_sites
from qat.analysis.style import WIDTH, axes, figure
from qat.errors import UsageError
from qat.functional.packing import packed_bytes
from qat.model.convert import Conversion, conversion_of
from qat.model.cost import FLOAT_BYTES, size_bytes
from qat.model.sites import Site, iter_quantizers
from qat.nn.fqvit import IntegerLayerNorm
from qat.ptq.runner import Forward, patched
from qat.quantizers import Quantizer
from qat.spec import QuantRecipe
from qat.utils.validate import FLOAT_BITS, check_bits, check_choice, check_number

log = logging.getLogger(__name__)
MB = 10**6

# Bytes of the weights of layers, by name and bits.
Sizes = Mapping[str, Mapping[int, int]]


@dataclass(frozen=True)
class Layer:
    """A module with its quantizers.

    Attributes:
        name: of the module.
        quantizers: those that round.
        weight: if its bits can change.
        is_free: a rule of `overrides` about its bits would change them alone.
    """

    name: str
    quantizers: tuple[Quantizer, ...]
    weight: GridSite | None
    is_free: bool


@dataclass(frozen=True)
class Sensitivity(Analysis):
    """The settings of `analysis/sensitivity.yaml`.

    Attributes:
        bits: widths at which the weights of each layer are tried.
        steps_from: where step sizes at other widths come from, one of `STEPS_FROM`; those of a float net always from `mse`.
        budget_mb: size to suggest bits for, 10^6 bytes; None = no suggestion.

    Raises:
        UsageError: a value that cannot work.
    """

    bits: Sequence[int] = (2, 3, 4, 8)
    steps_from: str = "own"
    budget_mb: float | None = None

    name: ClassVar[str] = "sensitivity"
    split: ClassVar[str | None] = "val"

    def __post_init__(self) -> None:
        if not isinstance(self.bits, list | tuple) or not self.bits:
            raise UsageError(f"analysis.bits={self.bits!r}: must be a list")
        for width in self.bits:
            check_bits("analysis.bits", width)
        check_choice("analysis.steps_from", self.steps_from, STEPS_FROM)
        if self.budget_mb is not None:
            check_number("analysis.budget_mb", self.budget_mb, 0, above=True)

    def run(self, nets: Sequence[StudiedNet], images: ImageSet) -> Outcome:
        """Evaluate each layer left in float and at other bits, then the suggested bits as a whole.

        Raises:
            UsageError: the budget is below the smallest size of a net.
        """
        found = [(studied, *find_layers(studied)) for studied in nets]
        for studied, weights, layers in found:
            self._check_budget(studied.label, *stored_bytes(weights.net, layers, self.bits))
        summary: dict[str, Any] = {}
        table: list[Row] = []
        drawings: list[Drawing] = []
        for number, (studied, weights, layers) in enumerate(found, start=1):
            lines, summary[studied.label] = self._measured(studied.label, weights, layers, conversion_of(studied.net), images)
            table += lines
            drawings.append(_heat_map(f"sensitivity-{number}" if len(nets) > 1 else "sensitivity", studied.label, lines))
        return Outcome(summary, [Table("sensitivity", "Layers and what their quantization costs", table)], drawings)

    def _check_budget(self, label: str, rest: int, sizes: Sizes) -> None:
        least = rest + sum(min(of.values()) for of in sizes.values())
        if self.budget_mb is not None and least > round(self.budget_mb * MB):
            # To the byte: what is printed can be typed.
            raise UsageError(
                f"analysis.budget_mb={self.budget_mb}: {label} takes at least {least / MB:f} MB, with the lowest bits everywhere"
            )

    def _measured(
        self, label: str, weights: WeightSites, layers: Sequence[Layer], conversion: Conversion | None, images: ImageSet
    ) -> tuple[list[Row], dict[str, Any]]:
        """Lines of the table, and the summary."""
        steps_from = "mse" if weights.is_float else self.steps_from
        points = [EvaluationPoint({"net": label}, weights.net)]
        for layer in layers:
            if layer.quantizers:
                change = functools.partial(left_in_float, weights.net, layer.quantizers)
                points.append(EvaluationPoint({"net": label, "layer": layer.name, "change": "in float"}, weights.net, change))
            for bits in self.bits:
                if layer.weight and bits != layer.weight.grid.bits:
                    change = functools.partial(with_bits, [layer], {layer.name: bits}, steps_from)
                    points.append(EvaluationPoint({"net": label, "layer": layer.name, "change": f"{bits} bits"}, weights.net, change))
        as_is, *rows = measure(points, images)
        lines: dict[str, Row] = {}
        for layer in layers:
            numel, has = (layer.weight.shape.numel(), layer.weight.grid.bits) if layer.weight else (0, None)
            lines[layer.name] = {"net": label, "layer": layer.name, "weights": numel, "bits": has}
            for column in ("in float", *(f"{bits} bits" for bits in self.bits)):
                lines[layer.name] |= {f"{column}: loss change": None, f"{column}: top-1 change (points)": None}
        for row in rows:
            lines[row["layer"]][f"{row['change']}: loss change"] = row["loss"] - as_is["loss"]
            lines[row["layer"]][f"{row['change']}: top-1 change (points)"] = row["top1"] - as_is["top1"]

        summary: dict[str, Any] = {"as_is": {name: as_is[name] for name in ("top1", "loss")}}
        in_float = [row for row in rows if row["change"] == "in float"]
        if in_float:
            best = min(in_float, key=lambda row: row["loss"])
            summary["most_sensitive"] = {"layer": best["layer"], "loss_change": best["loss"] - as_is["loss"]}
        rest, sizes = stored_bytes(weights.net, layers, self.bits)
        rises = {name: {bits: float(lines[name].get(f"{bits} bits: loss change") or 0.0) for bits in of} for name, of in sizes.items()}
        if (budget := self.budget_mb) is not None:
            chosen = greedy_bits(sizes, rises, round(budget * MB) - rest)
            change = functools.partial(with_bits, layers, chosen, steps_from)
            (row,) = measure([EvaluationPoint({"net": label}, weights.net, change)], images)
            n_bytes = rest + sum(sizes[name][bits] for name, bits in chosen.items())
            expected = as_is["loss"] + sum(rises[name][bits] for name, bits in chosen.items())
            entry = {"budget_mb": budget, "size_bytes": n_bytes, "expected_loss": expected, "loss": row["loss"], "top1": row["top1"]}
            entry |= {"bits_of_layers": chosen, "setting": as_setting(conversion, chosen)}
            summary["suggestion"] = entry
            log.info(
                "%s within %g MB: %d bytes, loss %.4f (%.4f if changes added up), top-1 %.2f %%:\n'%s'",
                *(label, budget, n_bytes, row["loss"], expected, row["top1"], entry["setting"]),
            )
            for name, line in lines.items():
                line[f"bits for {budget:g} MB"] = chosen.get(name)
        return list(lines.values()), summary


def find_layers(studied: StudiedNet) -> tuple[WeightSites, list[Layer]]:
    """The weights of a net, quantized or float, and its layers in the order of its modules; what it quantizes beside them is `(net)`."""
    weights = weight_sites(studied.net, studied.input_size)
    grids = {weight.quantizer: weight for weight in weights.sites}
    conversion = conversion_of(studied.net)
    members: dict[str, list[Site]] = {}
    for site in iter_quantizers(weights.net):
        members.setdefault(site.layer or "(net)", []).append(site)
    layers = []
    for name, sites in members.items():
        weight = next((grids[site.quantizer] for site in sites if site.quantizer in grids), None)
        is_free = weight is not None
        if weight is not None and conversion is not None:
            recipe = conversion.recipe
            # In training, a rule about the bits of the first convolution and of a head means their input too.
            is_alone = recipe.GROUP != "quant" or weight.place == "block" or recipe.at(name).act_quantizer == "float"
            is_free = is_alone and weight.grid.bits != FLOAT_BITS
        rounding = tuple(site.quantizer for site in sites if not site.quantizer.is_float)
        if rounding or weight:
            layers.append(Layer(name, rounding, weight, is_free))
    return weights, layers


def left_in_float(net: nn.Module, quantizers: Sequence[Quantizer]) -> AbstractContextManager[None]:
    """While it lasts these quantizers pass on what they get, and a norm in integers beside one, which rounds with its scale, is a norm."""
    forwards: dict[nn.Module, Forward] = {quantizer: lambda x: x for quantizer in quantizers}
    forwards |= {m: m.in_float for m in net.modules() if isinstance(m, IntegerLayerNorm) and not {*quantizers}.isdisjoint(m.between)}
    return patched(forwards)


def with_bits(layers: Sequence[Layer], bits: Mapping[str, int], steps_from: str) -> AbstractContextManager[None]:
    """While it lasts the weights of layers have these bits, by name; those that have them already stay as they are."""
    named = [(layer.weight, bits[layer.name]) for layer in layers if layer.weight and layer.name in bits]
    others = [(weight, width) for weight, width in named if width != weight.grid.bits]
    return patched({w.quantizer: functools.partial(requantized, w.grid, bits=width, steps_from=steps_from) for w, width in others})


def stored_bytes(net: nn.Module, layers: Sequence[Layer], widths: Sequence[int]) -> tuple[int, Sizes]:
    """Bytes of a net but for the weights of its free layers; and of each of those by its bits, the present ones among them."""
    weights = {layer.name: layer.weight for layer in layers if layer.is_free and layer.weight}
    rest = size_bytes(net) - sum(packed_bytes(weight.shape.numel(), weight.grid.bits) for weight in weights.values())
    # `ptq.py` gives each row of a float weight a scale and a zero point.
    rest += sum(2 * FLOAT_BYTES * weight.shape[0] for weight in weights.values() if weight.grid.bits == FLOAT_BITS)
    sizes = {
        name: {bits: packed_bytes(weight.shape.numel(), bits) for bits in sorted({*widths, weight.grid.bits} - {FLOAT_BITS})}
        for name, weight in weights.items()
    }
    return rest, sizes


def greedy_bits(sizes: Sizes, rises: Mapping[str, Mapping[int, float]], room: int) -> dict[str, int]:
    """Bits of each layer that fit a size: from those of least loss, the reduction that adds least loss per byte saved, again and again.

    Args:
        sizes: bytes by layer and bits; the smallest of all fit.
        rises: what they add to the loss.
        room: bytes.
    """
    bits = {name: min(of, key=lambda width: (rises[name][width], of[width])) for name, of in sizes.items()}
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
    """Bits of layers as a command takes them: `quant.overrides={...}` for `train.py`, `ptq.overrides={...}` for `ptq.py`."""
    if conversion is None:
        group, rules = "ptq", {name: {"bits": width} for name, width in bits.items()}
    else:
        group, rules = conversion.recipe.GROUP, rules_with_bits(conversion.recipe, bits)

    # In Hydra's grammar, in which keys have no quotes.
    each = (f"{name}:{{{','.join(f'{knob}:{json.dumps(value)}' for knob, value in rule.items())}}}" for name, rule in rules.items())
    return f"{group}.overrides={{{','.join(each)}}}"


def rules_with_bits(recipe: QuantRecipe, bits: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """The `overrides` of a recipe with bits of weights by module: its own rules, then one for each module."""
    rules: dict[str, dict[str, Any]] = {name: dict(rule) for name, rule in recipe.overrides.items()}
    for name, width in bits.items():
        # A rule of that very name moves to the end: it has to keep what the rules after it made of its knobs. `stem_bits` and `head_bits`
        # follow `bits`, and would win over it.
        at, earlier = recipe.at(name), rules.pop(name, {})
        activations = {"act_bits": at.act_bits} if recipe.rule_bits == "both" else {}  # the weights' bits alone were chosen
        rules[name] = (
            {knob: getattr(at, knob) for knob in earlier if knob not in {"stem_bits", "head_bits"}} | {"bits": width} | activations
        )
    return rules


def _heat_map(name: str, label: str, lines: Sequence[Row]) -> Drawing:
    """Loss changes by layer and what is changed of it; the suggested bits are framed."""
    columns = [name.partition(":")[0] for name in lines[0] if name.endswith("loss change")]
    if all(line["in float: loss change"] is None for line in lines):  # a float net
        columns.remove("in float")
    losses = torch.tensor([[line[f"{column}: loss change"] or 0.0 for column in columns] for line in lines], dtype=torch.float64)
    suggested = next((name for name in lines[0] if name.startswith("bits for")), None)
    drawn = figure(0.7 * WIDTH, 1.1 + 0.19 * len(lines))
    axis = axes(drawn)
    reach = float(losses.abs().max()) or 1.0
    # A shade is a factor: one layer may cost a thousand times what another does.
    norm = SymLogNorm(linthresh=reach / 100, vmin=-reach, vmax=reach)
    image = axis.imshow(losses.numpy(), aspect="auto", cmap="PuOr_r", norm=norm)
    for (y, line), (x, column) in itertools.product(enumerate(lines), enumerate(columns)):
        value = line[f"{column}: loss change"]
        text = "as is" if column == f"{line['bits']} bits" else "" if value is None else f"{value:+.2g}"
        is_dark = abs(float(norm(value or 0.0)) - 0.5) > 0.33
        axis.text(x, y, text, ha="center", va="center", fontsize=6.5, color="white" if is_dark else "black")
        if suggested and column == f"{line[suggested]} bits":
            axis.add_patch(Rectangle((x - 0.47, y - 0.45), 0.94, 0.9, fill=False, edgecolor="black", linewidth=1.6))
    axis.set_xticks(range(len(columns)), columns)
    axis.set_yticks(range(len(lines)), [line["layer"] for line in lines], fontsize=8)
    axis.grid(visible=False)
    drawn.colorbar(image, ax=axis, label="loss change", shrink=0.8, ticks=[-reach, -reach / 10, 0, reach / 10, reach], format="%.2g")
    pairs = zip(columns, losses.T, strict=True)
    highest = [f"{column}: {lines[int(of.argmax())]['layer']} adds most ({float(of.max()):+.4f})" for column, of in pairs]
    framed = f" (framed: {suggested})" if suggested else ""
    title = f"Loss of {label} when one layer is left in float, or has weights of other bits{framed}"
    return Drawing(name, title, f"Heat map of {len(lines)} layers. {'; '.join(highest)}.", drawn)
