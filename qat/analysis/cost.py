"""What a net costs by kind of layer, beside the same net in float. Docs: docs/analysis.md."""

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
from qat.utils.text import scaled

# The order of the bars, each kind with the same colour in every picture.
KINDS = (
    "attention weights",
    "attention products",
    "MLP",
    "patch embedding",
    "head",
    "norms",
    "other",
)
UNITS = {"bytes": "bytes of weights", "bit operations": "bit operations of one image"}


@dataclass(frozen=True)
class CostAnalysis(Analysis):
    """Parameters, bytes of weights (quantized: packed), multiply-accumulates, bit operations by kind of layer; in total in float too."""

    name: ClassVar[str] = "cost"
    split: ClassVar[str | None] = None

    def run(self, nets: Sequence[StudiedNet], images: ImageSet) -> Outcome:
        """A table of kinds, one of modules; bars by kind."""
        summary, kinds, modules = {}, [], []
        for studied in nets:
            parts = module_costs(studied.net, studied.input_size)
            kind_of = module_kinds(studied.net)
            summary[studied.label] = dataclasses.asdict(total(parts)) | _in_float(studied)
            kinds += [{"net": studied.label, **row} for row in _by_kind(parts, kind_of)]
            modules += [
                {
                    "net": studied.label,
                    "module": part.module or "(net)",
                    "kind": kind_of[part.module],
                    "bits of operands": ", ".join(
                        dict.fromkeys(
                            f"{a} x {b}" for a, b in (product.bits for product in part.products)
                        )
                    ),
                    "bytes": part.size_bytes,
                    "MACs": part.macs,
                    "bit operations": part.bitops,
                }
                for part in parts
            ]
        tables = [
            Table("cost", "Cost by kind of layer", kinds),
            Table("cost_modules", "Cost by module", modules),
        ]
        return Outcome(summary, tables, [_bars(kinds)])


def _in_float(studied: StudiedNet) -> Row:
    """The same net without quantization; nothing for one that is float, or that does not say how it was built."""
    if conversion_of(studied.net) is None:
        return {}
    try:
        twin = float_twin(studied.net)
    except UsageError:
        return {}
    return {"in_float": dataclasses.asdict(total(module_costs(twin, studied.input_size)))}


def module_kinds(net: nn.Module) -> dict[str, str]:
    """One of `KINDS` for each module, by timm's description of the net, by class and by name."""
    where, kinds = stem_and_heads(net), {}
    for name, module in net.named_modules():
        words = name.lower().split(".")
        if name in where:
            kinds[name] = {"stem": "patch embedding", "head": "head"}[where[name]]
        elif (
            isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.modules.batchnorm._BatchNorm)
            or "norm" in words[-1]
        ):
            kinds[name] = "norms"
        elif any("attn" in word for word in words):
            kinds[name] = "attention weights"
        else:
            kinds[name] = "MLP" if any("mlp" in word for word in words) else "other"
    return kinds


def _by_kind(parts: Sequence[ModuleCost], kind_of: Mapping[str, str]) -> list[Row]:
    rows = {
        kind: dict.fromkeys(("parameters in training", "bytes", "MACs", "bit operations"), 0)
        for kind in KINDS
    }
    for part in parts:
        row = rows[kind_of[part.module]]
        row["parameters in training"] += part.n_params
        row["bytes"] += part.size_bytes
        for product in part.products:
            kind = kind_of[product.module]
            row = rows[
                "attention products"
                if product.of_activations and kind == "attention weights"
                else kind
            ]
            row["MACs"] += product.macs
            row["bit operations"] += product.bitops
    return [{"kind": kind, **row} for kind, row in rows.items() if any(row.values())]


def _bars(rows: Sequence[Row]) -> Drawing:
    """A stacked bar for each net, of bytes and of bit operations."""
    labels = list(dict.fromkeys(row["net"] for row in rows))
    (drawn, axes), said = panels(2, height=1.6 + 0.9 * len(labels)), []
    for axis, (unit, words) in zip(axes, UNITS.items(), strict=True):
        wholes = dict.fromkeys(labels, 0)
        for row in rows:
            if row[unit]:
                colour = PALETTE[KINDS.index(row["kind"])]
                axis.barh(
                    row["net"],
                    row[unit] / 1e6,
                    left=wholes[row["net"]] / 1e6,
                    color=colour,
                    height=0.6,
                    edgecolor="white",
                )
            wholes[row["net"]] += row[unit]
        for place, (label, whole) in enumerate(wholes.items()):
            axis.text(whole / 1e6, place, f" {scaled(whole)}", va="center", fontsize=8)
            said.append(f"{label}: {scaled(whole)} {words}")
        axis.set_xlabel(f"{words}, millions")
        axis.margins(x=0.12)
        axis.grid(axis="y", visible=False)
        axis.invert_yaxis()
    patches = [Patch(color=colour, label=kind) for kind, colour in zip(KINDS, PALETTE, strict=True)]
    drawn.legend(handles=patches, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return Drawing("cost", "Cost by kind of layer", "; ".join(said), drawn)
