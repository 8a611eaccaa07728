"""Sensitivity of each layer to quantization, and a choice of bits per layer for a model size.

Docs: docs/analysis.md.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from matplotlib.colors import SymLogNorm
from torch import Tensor, nn
from torch.nn import functional as F

from qat.analysis.analysis import (
    FIGURE_WIDTH,
    GREY,
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
from qat.analysis.requantize import WeightSite, all_float, block_weights, requantize, weight_sites
from qat.errors import UsageError
from qat.functional.packing import packed_bytes
from qat.model.convert import Conversion, conversion_of
from qat.model.cost import FLOAT_BYTES, size_bytes
from qat.model.sites import iter_quantizers
from qat.nn.fqvit import IntegerLayerNorm
from qat.ptq.runner import Forward, patch_forwards
from qat.quantizers import Quantizer
from qat.utils.text import format_count
from qat.utils.validate import FLOAT_BITS, check_bits, check_list, check_number

log = logging.getLogger(__name__)
MB = 10**6
# A loss change that is smaller than this number of standard errors may be chance.
STANDARD_ERRORS = 2

# Bytes that a layer's weights take, by layer name and bits.
Sizes = Mapping[str, Mapping[int, int]]


@dataclass(frozen=True)
class Budget:
    """Bytes for the weights whose bits may be chosen.

    Attributes:
        fixed_bytes: bytes of everything except these weights.
        weight_bytes: bytes that these weights may take together.
        sizes: bytes of each of these weights at each bit-width.
    """

    fixed_bytes: int
    weight_bytes: int
    sizes: Sizes

    def size_with(self, bits: Mapping[str, int]) -> int:
        """Size of the model in bytes with these bit-widths of all weights in `sizes`."""
        return self.fixed_bytes + sum(self.sizes[name][width] for name, width in bits.items())


class PairedScore:
    """Scores models, and estimates the noise of each model's loss minus the first model's loss.

    The noise is `STANDARD_ERRORS` times the standard error of the mean loss difference, where each
    image contributes one difference between the two models. The noise is NaN for a single image.
    """

    def __init__(self, images: ImageSet) -> None:
        self.images = images
        self.losses_of_first_model: Tensor | None = None

    def __call__(self, net: nn.Module) -> dict[str, float]:
        """`top1` (percent), mean `loss` and `noise` of a model."""
        targets = (target for _, target in self.images.batches)
        loss_batches: list[Tensor] = []

        def predict(images: Tensor) -> Tensor:
            logits: Tensor = net(images)
            loss_batches.append(F.cross_entropy(logits.float(), next(targets), reduction="none"))
            return logits

        score = self.images.score(predict)
        losses = torch.cat(loss_batches).double()
        if self.losses_of_first_model is None:
            self.losses_of_first_model = losses
        noise = math.nan
        if len(losses) > 1:
            deviation = float((losses - self.losses_of_first_model).std())
            noise = STANDARD_ERRORS * deviation / math.sqrt(len(losses))
        return {**score, "noise": noise}


@dataclass(frozen=True)
class Sensitivity(Analysis):
    """The settings of `analysis/sensitivity.yaml`.

    Attributes:
        bits: bit-widths to try for the weights of each layer.
        budget_mb: model size, in 10^6 bytes, for which the analysis suggests bits; None = no
            suggestion.

    Raises:
        UsageError: a setting has a value that is not allowed.
    """

    bits: Sequence[int] = (2, 3, 4, 8)
    budget_mb: float | None = None

    name: ClassVar[str] = "sensitivity"
    split: ClassVar[str | None] = "val"

    def __post_init__(self) -> None:
        for width in check_list("analysis.bits", self.bits):
            check_bits("analysis.bits", width)
        if self.budget_mb is not None:
            check_number("analysis.budget_mb", self.budget_mb, 0, exclusive_lowest=True)

    def run(self, nets: Sequence[StudiedNet], images: ImageSet) -> Outcome:
        """Evaluate each layer in float and at other bits; with a budget, also the suggested bits.

        Raises:
            UsageError: with a budget, a model exceeds it even with the lowest bits everywhere, or
                has no weights whose bits may be chosen.
        """
        summary: dict[str, Any] = {}
        table: list[Row] = []
        drawings: list[Drawing] = []
        for number, studied_net in enumerate(nets, start=1):
            rows, summary[studied_net.label] = self._analyze(studied_net, images)
            table += rows
            name = f"sensitivity-{number}" if len(nets) > 1 else "sensitivity"
            drawings.append(_draw_heat_map(name, studied_net.label, rows))
        tables = [Table("sensitivity", "Layers and what their quantization costs", table)]
        return Outcome(summary, tables, drawings)

    def _analyze(
        self, studied_net: StudiedNet, images: ImageSet
    ) -> tuple[list[Row], dict[str, Any]]:
        """Analyse one model; return the rows of the table, one per layer, and the summary."""
        net, sites = weight_sites(studied_net.net, studied_net.input_size)
        weights = {site.name: site for site in sites}
        quantizers = _quantizers_by_layer(net, weights)
        budget = None if self.budget_mb is None else self._make_budget(studied_net, net, sites)

        points = self._points(net, sites, quantizers, PairedScore(images))
        unchanged_result, *changed_results = measure(points, images)
        unchanged_result.pop("noise")
        rows = {name: _layer_row(studied_net.label, name, weights.get(name)) for name in quantizers}
        for result in changed_results:
            row = rows[result["layer"]]
            change = result["change"]
            row[f"{change}: loss change"] = result["loss"] - unchanged_result["loss"]
            row[f"{change}: loss noise"] = result["noise"]
            row[f"{change}: top-1 change (points)"] = result["top1"] - unchanged_result["top1"]

        summary: dict[str, Any] = {"as_is": unchanged_result}
        if changed_results:
            noise = statistics.median(result["noise"] for result in changed_results)
            summary["noise"] = {"images": images.num_images, "loss_change": noise}
            limit = f"below {noise:.2g} (two standard errors, median)"
            log.info(
                "%s: on %s, loss changes %s may be chance",
                studied_net.label,
                format_count(images.num_images, "image"),
                "of any size" if math.isnan(noise) else limit,
            )
        float_results = [result for result in changed_results if result["change"] == "in float"]
        if float_results:
            most_sensitive = min(float_results, key=lambda result: result["loss"])
            loss_change = most_sensitive["loss"] - unchanged_result["loss"]
            summary["most_sensitive"] = {
                "layer": most_sensitive["layer"],
                "loss_change": loss_change,
            }
        if budget is not None:
            loss_changes = _loss_changes(rows, budget.sizes)
            bits = greedy_bits(budget.sizes, loss_changes, budget.weight_bytes)
            point = EvaluationPoint({}, net, functools.partial(change_bits, sites, bits))
            (result,) = measure([point], images)
            added_losses = [loss_changes[name][width] for name, width in bits.items()]
            summary["suggestion"] = {
                "budget_mb": self.budget_mb,
                "size_bytes": budget.size_with(bits),
                "expected_loss": unchanged_result["loss"] + sum(added_losses),
                **result,
                "bits_of_layers": bits,
                "setting": override_setting(conversion_of(studied_net.net), bits),
            }
            _log_suggestion(studied_net.label, summary["suggestion"])
            for name, row in rows.items():
                row[f"bits for {self.budget_mb:g} MB"] = bits.get(name)
        return list(rows.values()), summary

    def _points(
        self,
        net: nn.Module,
        sites: Sequence[WeightSite],
        quantizers: Mapping[str, Sequence[Quantizer]],
        score: PairedScore,
    ) -> list[EvaluationPoint]:
        """Points to evaluate: the unchanged model, then each layer in float and at other bits."""
        weights = {site.name: site for site in sites}
        points = [EvaluationPoint({}, net, score=score)]
        for name, layer_quantizers in quantizers.items():
            if layer_quantizers:
                labels = {"layer": name, "change": "in float"}
                change = functools.partial(bypass_quantizers, net, layer_quantizers)
                points.append(EvaluationPoint(labels, net, change, score))
            for bits in self.bits:
                if name in weights and bits != weights[name].bits:
                    labels = {"layer": name, "change": f"{bits} bits"}
                    change = functools.partial(change_bits, sites, {name: bits})
                    points.append(EvaluationPoint(labels, net, change, score))
        return points

    def _make_budget(
        self, studied_net: StudiedNet, net: nn.Module, sites: Sequence[WeightSite]
    ) -> Budget:
        """The budget of bytes for the weights whose bits may be chosen.

        Raises:
            UsageError: the model has no weights whose bits may be chosen, or exceeds the budget
                even with the lowest bits everywhere.
        """
        assert self.budget_mb is not None  # noqa: S101  (narrows a type)
        budget_bytes = round(self.budget_mb * MB)
        # In a quantized model, only weights in blocks may change: in training, a rule that sets the
        # bits of a stem or head also sets the bits of its input.
        adjustable = sites if all_float(sites) else block_weights(sites)
        if not adjustable:
            raise UsageError(
                f"analysis.budget_mb={self.budget_mb}: {studied_net.label} has no weights on a "
                "uniform grid besides stem and heads; must be null"
            )
        fixed_bytes, sizes = sizes_by_bits(net, adjustable, self.bits)
        min_bytes = fixed_bytes + sum(min(layer_sizes.values()) for layer_sizes in sizes.values())
        if min_bytes > budget_bytes:
            # Print the size exactly, so that users can set it as the new budget.
            raise UsageError(
                f"analysis.budget_mb={self.budget_mb}: must be at least {min_bytes / MB:f}, "
                f"the size of {studied_net.label} with the lowest bits everywhere"
            )
        return Budget(fixed_bytes, budget_bytes - fixed_bytes, sizes)


def _quantizers_by_layer(
    net: nn.Module, weights: Mapping[str, WeightSite]
) -> dict[str, list[Quantizer]]:
    """Quantizers that round, by layer. Layers in `weights` are listed even if none rounds.

    Quantizers that belong to no layer are listed under "(net)".
    """
    quantizers: dict[str, list[Quantizer]] = {}
    for site in iter_quantizers(net):
        if site.quantizer.is_float and site.layer not in weights:
            continue
        layer_quantizers = quantizers.setdefault(site.layer or "(net)", [])
        if not site.quantizer.is_float:
            layer_quantizers.append(site.quantizer)
    return quantizers


def _layer_row(label: str, layer: str, weight: WeightSite | None) -> Row:
    return {
        "net": label,
        "layer": layer,
        "weights": weight and weight.shape.numel(),
        "bits": weight and weight.bits,
    }


def _loss_changes(rows: Mapping[str, Row], sizes: Sizes) -> dict[str, dict[int, float]]:
    """Loss changes by layer and bits. The current bits were not tried, so their change is 0."""
    changes: dict[str, dict[int, float]] = {}
    for name, layer_sizes in sizes.items():
        changes[name] = {}
        for bits in layer_sizes:
            changes[name][bits] = float(rows[name].get(f"{bits} bits: loss change", 0.0))
    return changes


def _log_suggestion(label: str, suggestion: Mapping[str, Any]) -> None:
    log.info(
        "%(net)s within %(budget_mb)g MB: %(size_bytes)d bytes, "
        "loss %(loss).4f (%(expected_loss).4f expected from adding up the layers' own changes), "
        "top-1 %(top1).2f %%:\n'%(setting)s'",
        {"net": label, **suggestion},
    )


def bypass_quantizers(
    net: nn.Module, quantizers: Sequence[Quantizer]
) -> AbstractContextManager[None]:
    """Let these quantizers return their input unchanged inside a `with` block.

    An integer LayerNorm that would use the scale of one of these quantizers runs in float.
    """
    forwards: dict[nn.Module, Forward] = {quantizer: lambda x: x for quantizer in quantizers}
    for module in net.modules():
        if isinstance(module, IntegerLayerNorm) and set(quantizers) & set(module.outer_quantizers):
            forwards[module] = module.in_float
    return patch_forwards(forwards)


def change_bits(
    sites: Sequence[WeightSite], bits: Mapping[str, int]
) -> AbstractContextManager[None]:
    """Give weights other bits inside a `with` block.

    Args:
        sites: all weights of a model; those of a float model get step sizes with the least error.
        bits: new bits, by name of the weight.
    """
    steps_from = "mse" if all_float(sites) else "own"
    forwards: dict[nn.Module, Forward] = {}
    for site in sites:
        width = bits.get(site.name, site.bits)
        if width != site.bits:
            forwards[site.quantizer] = functools.partial(
                requantize, site.requantizer, bits=width, steps_from=steps_from
            )
    return patch_forwards(forwards)


def sizes_by_bits(
    net: nn.Module, adjustable: Sequence[WeightSite], widths: Sequence[int]
) -> tuple[int, Sizes]:
    """Bytes of everything else, and the size of each adjustable weight at each bit-width.

    Args:
        net: the model.
        adjustable: weights whose bits may be chosen.
        widths: bit-widths to choose from; the current bits of each quantized weight are added.
    """
    fixed_bytes = size_bytes(net)
    sizes: dict[str, dict[int, int]] = {}
    for site in adjustable:
        num_weights = site.shape.numel()
        fixed_bytes -= packed_bytes(num_weights, site.bits)
        if site.bits == FLOAT_BITS:
            # `ptq.py` creates a scale and a zero point for each row of a float weight.
            fixed_bytes += 2 * FLOAT_BYTES * site.shape[0]
        all_widths = {*widths, site.bits} - {FLOAT_BITS}
        sizes[site.name] = {bits: packed_bytes(num_weights, bits) for bits in sorted(all_widths)}
    return fixed_bytes, sizes


def greedy_bits(
    sizes: Sizes, loss_increases: Mapping[str, Mapping[int, float]], max_bytes: int
) -> dict[str, int]:
    """Choose bits for each layer so that all weights together fit into `max_bytes` bytes.

    The search starts from the bits with the lowest loss. While the weights are too large, it makes
    the reduction that adds the least loss per byte saved.

    Args:
        sizes: bytes by layer and bits; with the lowest bits everywhere, the weights must fit.
        loss_increases: loss increase by layer and bits.
        max_bytes: bytes that all weights together may take.
    """
    bits = {
        name: min(layer_sizes, key=lambda width: (loss_increases[name][width], layer_sizes[width]))
        for name, layer_sizes in sizes.items()
    }
    while sum(sizes[name][width] for name, width in bits.items()) > max_bytes:
        candidates = []
        for name, layer_sizes in sizes.items():
            current_bits = bits[name]
            for width, size in layer_sizes.items():
                saved_bytes = layer_sizes[current_bits] - size
                if saved_bytes > 0:
                    added_loss = loss_increases[name][width] - loss_increases[name][current_bits]
                    candidates.append((added_loss / saved_bytes, name, width))
        _, name, width = min(candidates)
        bits[name] = width
    return bits


def override_setting(conversion: Conversion | None, bits: Mapping[str, int]) -> str:
    """The command-line override that sets these bits and repeats the model's existing rules.

    Returns:
        `quant.overrides={...}` for `train.py`, or `ptq.overrides={...}` for `ptq.py`.
    """
    group = "ptq"
    rules: dict[str, dict[str, Any]] = {name: {} for name in bits}
    if conversion is not None:
        recipe = conversion.recipe
        group = recipe.GROUP
        rules = {name: dict(rule) for name, rule in recipe.overrides.items() if name not in bits}
        for name in bits:
            layer_recipe = recipe.at(name)  # a later pattern may win over the layer's own rule
            knobs = recipe.overrides.get(name, {})
            rules[name] = {
                knob: getattr(layer_recipe, knob)
                for knob in knobs
                if knob not in {"bits", "stem_bits", "head_bits"}
            }
            if recipe.rule_bits == "both":  # then `bits` also sets bits of activations
                rules[name]["act_bits"] = layer_recipe.act_bits
            if layer_recipe.weight_quantizer == "float":
                rules[name]["weight_quantizer"] = "affine" if group == "ptq" else "lsq"
    for name, width in bits.items():
        rules[name]["bits"] = width
    # In Hydra's grammar, keys have no quotes, and brackets are escaped.
    entries = []
    for name, rule in rules.items():
        key = re.sub(r"([\[\]])", r"\\\1", name)
        values = ",".join(f"{knob}:{json.dumps(value)}" for knob, value in rule.items())
        entries.append(f"{key}:{{{values}}}")
    return f"{group}.overrides={{{','.join(entries)}}}"


def _draw_heat_map(name: str, label: str, rows: Sequence[Row]) -> Drawing:
    """Draw loss changes on a logarithmic colour scale; changes within noise get no colour."""
    keys = sorted({key for row in rows for key in row if key.endswith("loss change")})
    columns = [key.partition(":")[0] for key in keys]
    loss_changes = torch.full((len(rows), len(keys)), math.nan, dtype=torch.float64)
    for (y, row), (x, key) in itertools.product(enumerate(rows), enumerate(keys)):
        if abs(row.get(key, 0.0)) > row.get(key.replace("change", "noise"), 0.0):
            loss_changes[y, x] = row[key]
    limit = float(loss_changes.nan_to_num().abs().max()) or 1.0
    norm = SymLogNorm(linthresh=limit / 100, vmin=-limit, vmax=limit)
    figure, (panel,) = panels(width=0.7 * FIGURE_WIDTH, height=1.1 + 0.19 * len(rows))
    image = panel.imshow(loss_changes.numpy(), aspect="auto", cmap="PuOr_r", norm=norm)
    for (y, row), (x, key) in itertools.product(enumerate(rows), enumerate(keys)):
        value = row.get(key)
        if value is None:
            continue
        color = GREY
        if not loss_changes[y, x].isnan():
            is_dark = abs(float(norm(value)) - 0.5) > 0.33
            color = "white" if is_dark else "black"
        panel.text(x, y, f"{value:+.2g}", ha="center", va="center", fontsize=6.5, color=color)
    panel.set_xticks(range(len(columns)), columns)
    panel.set_yticks(range(len(rows)), [row["layer"] for row in rows])
    panel.grid(visible=False)
    ticks = [-limit, 0, limit]
    figure.colorbar(image, ax=panel, label="loss change", shrink=0.8, ticks=ticks, format="%.2g")

    worst_layers = []
    for column, changes in zip(columns, loss_changes.T, strict=True):
        if not (changes > 0).any():
            worst_layers.append(f"{column}: no layer adds more than noise")
            continue
        index = int(changes.nan_to_num(-math.inf).argmax())
        layer = rows[index]["layer"]
        worst_layers.append(f"{column}: {layer} adds most ({float(changes[index]):+.4f})")
    title = (
        f"Loss of {label} when one layer is left in float, or has weights of other bits; "
        "grey: within noise (two standard errors)"
    )
    summary = f"Heat map of {len(rows)} layers. {'; '.join(worst_layers)}."
    return Drawing(name, title, summary, figure)
