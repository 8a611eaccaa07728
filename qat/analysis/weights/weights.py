"""What the weights of a net look like, what their codes make of them, and what activations can be represented."""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from qat.analysis.analysis import Analysis, Drawing, EvaluationPoint, Outcome, Row, StudiedNet, Table
from qat.analysis.images import ImageSet
from qat.analysis.weights.activation_stats import ActivationStats, CodeCounts, activation_row, activation_stats, look, readable
from qat.analysis.weights.advice import advice
from qat.analysis.weights.drawings import code_usage_map, histograms, kurtosis_chart
from qat.analysis.weights.weight_stats import WeightStats, masters, weight_stats
from qat.errors import UsageError
from qat.functional.confidence import check_boundary
from qat.utils.validate import check_globs, check_int

# Beyond this many levels a table of usage lists only those that occur.
_LISTED = 16


@dataclass(frozen=True)
class WeightAnalysis(Analysis):
    """Histograms of float weights on the axis of their codes, usage of codes, errors, kurtosis, scales; ranges of activations.

    Attributes:
        layers: globs of layers whose histograms are drawn; None = the first, the middle and the last, and those with the highest kurtosis.
        max_panels: histograms of one net at most.
        boundary: half-width of the band in which a weight counts as near a threshold, in codes, 0 < value < 0.5.
        activation_images: how many images record the codes of activation quantizers; 0 = none is read.

    Raises:
        UsageError: a setting cannot work.
    """

    name: ClassVar[str] = "weights"
    split: ClassVar[str | None] = "train"

    layers: Sequence[str] | None = None
    max_panels: int = 9
    boundary: float = 0.005
    activation_images: int = 128

    def __post_init__(self) -> None:
        if self.layers is not None:
            object.__setattr__(self, "layers", check_globs("analysis.layers", self.layers, "blocks.0.*"))
        check_int("analysis.max_panels", self.max_panels, 1)
        check_int("analysis.activation_images", self.activation_images, 0)
        check_boundary("analysis.boundary", self.boundary)
        if not self.activation_images:
            # Then no image has to be read.
            object.__setattr__(self, "split", None)

    @functools.cached_property
    def _seen(self) -> dict[str, dict[str, CodeCounts]]:
        """By label of the net, what `points` saw on the images."""
        return {}

    def points(self, nets: Sequence[StudiedNet], images: ImageSet) -> list[EvaluationPoint]:
        """Nothing to evaluate; a few images are passed through each net, which records its activation codes."""
        batches = list(_first(images, self.activation_images))
        for studied in nets:
            self._seen[studied.label] = look(studied.net, batches)
        return []

    def outcome(self, nets: Sequence[StudiedNet], rows: Sequence[Row]) -> Outcome:
        """Tables of weights, of the usage of codes and of activations; pictures; warnings. Without `points`, activations are not seen."""
        weights = {net.label: [weight_stats(m, self.boundary) for m in masters(net.net)] for net in nets}
        found = {net.label: activation_stats(net.net, self._seen.get(net.label, {})) for net in nets}
        self._check_layers([entry.layer for stats in weights.values() for entry in stats])
        chosen = {label: self._chosen(stats) for label, stats in weights.items()}
        return Outcome(
            {label: _summary(stats, found[label]) for label, stats in weights.items()},
            list(_tables(weights, found)),
            list(_drawings(weights, chosen)),
            [entry for label, stats in weights.items() for entry in advice(label, stats, found[label])],
        )

    def _check_layers(self, names: Sequence[str]) -> None:
        """Raise `UsageError` if a glob matches none of the names of all nets: one net may lack what another has."""
        for glob in self.layers or ():
            if not fnmatch.filter(names, glob):
                raise UsageError(f"analysis.layers: {glob!r} matches no layer with weights; patterns see names like {names[-1]!r}")

    def _chosen(self, stats: Sequence[WeightStats]) -> list[WeightStats]:
        """The tensors whose histograms are drawn, in the order of the net."""
        if self.layers is not None:
            return [entry for entry in stats if any(fnmatch.fnmatchcase(entry.layer, glob) for glob in self.layers)][: self.max_panels]
        sharpest = sorted(range(len(stats)), key=lambda index: -stats[index].kurtosis)
        order = dict.fromkeys([0, len(stats) // 2, len(stats) - 1, *sharpest] if stats else [])
        return [stats[index] for index in sorted(list(order)[: self.max_panels])]


def _first(images: ImageSet, count: int) -> Iterator[Tensor]:
    for batch, _ in images.batches:
        if count <= 0:
            return
        yield batch[:count]
        count -= len(batch)


def _drawings(weights: dict[str, list[WeightStats]], chosen: dict[str, list[WeightStats]]) -> Iterator[Drawing]:
    for number, (label, stats) in enumerate(weights.items(), 1):
        suffix = f"_{number}" if len(weights) > 1 else ""
        of_net = f" of {label}" if len(weights) > 1 else ""
        if chosen[label]:
            yield histograms(f"weights_histograms{suffix}", f"Weights{of_net} before rounding", chosen[label])
        coded = [entry for entry in stats if entry.codes is not None]
        if coded:
            yield code_usage_map(f"weights_codes{suffix}", f"Use of the codes{of_net}", coded)
    if any(weights.values()):
        yield kurtosis_chart("weights_kurtosis", "Kurtosis of the weights", weights)


def _tables(weights: dict[str, list[WeightStats]], found: dict[str, list[ActivationStats]]) -> Iterator[Table]:
    yield Table("weights", "Weights and their codes", [{"net": label, **weight_row(s)} for label, stats in weights.items() for s in stats])
    usage = [{"net": label, **row} for label, stats in weights.items() for entry in stats for row in _usage_rows(entry)]
    if usage:
        yield Table("weights_codes", "Share of weights at each code", usage)
    activations = [{"net": label, **activation_row(entry)} for label, stats in found.items() for entry in stats]
    if activations:
        yield Table("weights_activations", "Activation quantizers", activations)


def weight_row(stats: WeightStats) -> Row:
    """One line of a table; what is not known is left out."""
    row: Row = {
        "layer": stats.layer,
        "role": stats.role,
        "quantizer": stats.quantizer,
        "bits": stats.bits,
        "weights": stats.n_weights,
        "kurtosis": stats.kurtosis,
        "channels": stats.channels,
        "dead channels": stats.dead,
    }
    if stats.codes is not None:
        codes = stats.codes
        row |= {
            "levels": len(codes.usage),
            "unused levels": codes.unused,
            "entropy (bits)": codes.entropy,
            "SNR (dB)": codes.snr,
            "mean error (steps)": codes.error,
            "at the end codes, %": 100 * codes.at_ends,
            "beyond the outermost levels, %": 100 * codes.beyond,
            "clipped, %": 100 * codes.clipped,
            "near a threshold, %": 100 * codes.near,
            **dict(zip(("step, smallest", "step, median", "step, largest"), codes.step, strict=True)),
        }
    return readable(row)


def _usage_rows(stats: WeightStats) -> Iterator[Row]:
    if stats.codes is None:
        return
    all_listed = len(stats.codes.usage) <= _LISTED
    for code, share in enumerate(stats.codes.usage, stats.codes.low):
        if share or all_listed:
            yield {"layer": stats.layer, "role": stats.role, "bits": stats.bits, "code": code, "share, %": round(100 * share, 4)}


def _summary(weights: Sequence[WeightStats], activations: Sequence[ActivationStats]) -> dict[str, Any]:
    coded = [(entry, entry.codes) for entry in weights if entry.codes is not None]
    n_coded = sum(entry.n_weights for entry, _ in coded)
    summary: dict[str, Any] = {
        "tensors": len(weights),
        "weights": sum(entry.n_weights for entry in weights),
        "quantized_weights": n_coded,
        "kurtosis_highest": max((entry.kurtosis for entry in weights), default=None),
        "kurtosis_mean": sum(entry.kurtosis for entry in weights) / len(weights) if weights else None,
        "activation_quantizers": len(activations),
    }
    if coded:
        summary |= {
            "snr_lowest_db": min(codes.snr for _, codes in coded),
            "clipped_percent": 100 * sum(codes.clipped * entry.n_weights for entry, codes in coded) / n_coded,
            "near_threshold_percent": 100 * sum(codes.near * entry.n_weights for entry, codes in coded) / n_coded,
            "tensors_with_unused_levels": sum(codes.unused > 0 for _, codes in coded),
        }
    return summary
