"""Cost of a model by kind of layer, compared with its float version. Docs: docs/analysis.md."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from matplotlib.patches import Patch
from torch import nn

from qat.analysis.analysis import (
    PALETTE,
    Analysis,
    Drawing,
    ImageSet,
    Outcome,
    Row,
    StudiedNet,
    Table,
    panels,
)
from qat.errors import UsageError
from qat.model.convert import conversion_of, stem_and_heads
from qat.model.cost import ModuleCost, module_costs, total
from qat.model.storage import float_twin
from qat.utils.text import format_si

# Kinds in the order of the segments of a bar. A kind has one colour in all figures.
KINDS = (
    "attention weights",
    "attention products",
    "MLP",
    "patch embedding",
    "head",
    "norms",
    "other",
)
COLUMN_UNITS = {
    "bytes": "bytes of the stored model",
    "bit operations": "bit operations of one image",
}
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)


@dataclass(frozen=True)
class CostAnalysis(Analysis):
    """Parameters, bytes, multiply-accumulates and bit operations by kind of layer.

    Bytes are those of the stored model, in which quantized weights are packed. Totals are also
    computed for the float version of a quantized model, if it can be built.
    """

    name: ClassVar[str] = "cost"
    split: ClassVar[str | None] = None

    def run(self, nets: Sequence[StudiedNet], images: ImageSet) -> Outcome:
        """Compute a table by kind of layer, a table by module, and bars by kind."""
        summary = {}
        kind_rows = []
        module_rows = []
        for studied_net in nets:
            costs = module_costs(studied_net.net, studied_net.input_size)
            kinds = module_kinds(studied_net.net)
            summary[studied_net.label] = dataclasses.asdict(total(costs)) | _float_cost(studied_net)
            for row in _rows_by_kind(costs, kinds):
                kind_rows.append({"net": studied_net.label} | row)
            for cost in costs:
                kind = kinds[cost.module]
                module_rows.append({"net": studied_net.label} | _module_row(cost, kind))
        tables = [
            Table("cost", "Cost by kind of layer", kind_rows),
            Table("cost_modules", "Cost by module", module_rows),
        ]
        return Outcome(summary, tables, [_draw_bars(kind_rows)])


def _float_cost(studied_net: StudiedNet) -> Row:
    """Cost of the model without quantization.

    The result is empty if the model is float, or if its float version cannot be built.
    """
    if conversion_of(studied_net.net) is None:
        return {}
    try:
        float_net = float_twin(studied_net.net)
    except UsageError:
        return {}
    return {"in_float": dataclasses.asdict(total(module_costs(float_net, studied_net.input_size)))}


def _module_row(cost: ModuleCost, kind: str) -> Row:
    operand_bits: dict[str, None] = {}  # without repetitions
    for product in cost.products:
        left, right = product.bits
        operand_bits[f"{left} x {right}"] = None
    return {
        "module": cost.module or "(net)",
        "kind": kind,
        "bits of operands": ", ".join(operand_bits),
        "bytes": cost.size_bytes,
        "MACs": cost.macs,
        "bit operations": cost.bitops,
    }


def module_kinds(net: nn.Module) -> dict[str, str]:
    """Kind (one of `KINDS`) by module path: from `stem_and_heads`, else from class and path."""
    place_of = stem_and_heads(net)
    kind_of_place = {"stem": "patch embedding", "head": "head"}
    kinds = {}
    for name, module in net.named_modules():
        name_parts = name.lower().split(".")
        if name in place_of:
            kinds[name] = kind_of_place[place_of[name]]
        elif isinstance(module, _NORMS) or "norm" in name_parts[-1]:
            kinds[name] = "norms"
        elif any("attn" in part or "attention" in part for part in name_parts):
            kinds[name] = "attention weights"
        elif any("mlp" in part for part in name_parts):
            kinds[name] = "MLP"
        else:
            kinds[name] = "other"
    return kinds


def _rows_by_kind(costs: Sequence[ModuleCost], kinds: Mapping[str, str]) -> list[Row]:
    """A row for each kind whose cost is not zero."""
    columns = ("parameters in training", "bytes", "MACs", "bit operations")
    rows = {kind: dict.fromkeys(columns, 0) for kind in KINDS}
    for cost in costs:
        row = rows[kinds[cost.module]]
        row["parameters in training"] += cost.n_params
        row["bytes"] += cost.size_bytes
        for product in cost.products:
            kind = kinds[product.module]
            if product.of_activations and kind == "attention weights":
                kind = "attention products"
            row = rows[kind]
            row["MACs"] += product.macs
            row["bit operations"] += product.bitops
    return [{"kind": kind, **row} for kind, row in rows.items() if any(row.values())]


def _draw_bars(rows: Sequence[Row]) -> Drawing:
    """Draw two stacked bars for each model: bytes, and bit operations."""
    labels = list(dict.fromkeys(row["net"] for row in rows))
    figure, axes = panels(2, height=1.6 + 0.9 * len(labels))
    totals_in_words = []
    for panel, (column, unit) in zip(axes, COLUMN_UNITS.items(), strict=True):
        lengths = dict.fromkeys(labels, 0)
        for row in rows:
            if row[column]:
                panel.barh(
                    row["net"],
                    row[column] / 1e6,
                    left=lengths[row["net"]] / 1e6,
                    color=PALETTE[KINDS.index(row["kind"])],
                    height=0.6,
                    edgecolor="white",
                )
            lengths[row["net"]] += row[column]
        for y, (label, length) in enumerate(lengths.items()):
            panel.text(length / 1e6, y, f" {format_si(length)}", va="center", fontsize=8)
            totals_in_words.append(f"{label}: {format_si(length)} {unit}")
        panel.set_xlabel(f"{unit}, millions")
        panel.margins(x=0.12)
        panel.grid(axis="y", visible=False)
        panel.invert_yaxis()
    patches = [Patch(color=color, label=kind) for kind, color in zip(KINDS, PALETTE, strict=True)]
    figure.legend(handles=patches, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return Drawing("cost", "Cost by kind of layer", "; ".join(totals_in_words), figure)
