"""What a net costs, module by module, beside the same net in float and without query-key reparameterization."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from qat.analysis.analysis import Analysis, Drawing, Outcome, Row, StudiedNet, Table
from qat.analysis.cost.drawings import by_kind
from qat.errors import UsageError
from qat.model.checkpoint import built_alike
from qat.model.convert import conversion_of, stem_and_heads
from qat.model.cost import Cost, ModuleCost, module_costs, total
from qat.model.matmuls import MatrixProduct
from qat.spec import QuantRecipe, recipe

KINDS = ("patch embedding", "attention weights", "attention products", "MLP", "norms", "head", "other")
FLOAT, NO_QKR = "in float", "without QKR"
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)


@dataclass(frozen=True)
class Variant:
    """A net, or one like it under another recipe.

    Attributes:
        net: label of the net under analysis.
        variant: `as it is`, `in float`, `without QKR`.
        parts: what its modules cost; empty if it could not be built.
        kinds: by module, one of `KINDS`; products of activations inside an attention are a kind of their own.
        note: why it could not be built.
        in_float: nothing in it is quantized.
    """

    net: str
    variant: str
    parts: Sequence[ModuleCost] = ()
    kinds: Mapping[str, str] = dataclasses.field(default_factory=dict)
    note: str = ""
    in_float: bool = False

    @property
    def label(self) -> str:
        """For axes of plots."""
        return self.net if self.variant == "as it is" else f"{self.net}, {self.variant}"


@dataclass(frozen=True)
class CostAnalysis(Analysis):
    """Parameters, bytes as stored, multiply-accumulates and bit operations.

    The same net is also built in float and, where it has query-key reparameterization, without that.
    """

    name: ClassVar[str] = "cost"
    split: ClassVar[str | None] = None

    def outcome(self, nets: Sequence[StudiedNet], rows: Sequence[Row]) -> Outcome:
        """A table of nets and variants, one of kinds of modules, one of modules; bars by kind."""
        variants = [variant for net in nets for variant in self._variants(net)]
        tables = [
            Table("cost", "Cost of each net, and of the same net in float and without query-key reparameterization", _totals(variants)),
            Table("cost_kinds", "Cost by kind of module", [row for v in variants if v.parts for row in _kind_rows(v)]),
            Table("cost_modules", "Cost by module", [row for v in variants if v.variant == "as it is" for row in _module_rows(v)]),
        ]
        summary = {v.net: dataclasses.asdict(total(list(v.parts))) for v in variants if v.variant == "as it is"}
        for variant in variants:
            if variant.variant != "as it is" and variant.parts:
                summary[variant.net] |= {variant.variant.replace(" ", "_"): dataclasses.asdict(total(list(variant.parts)))}
        return Outcome(summary, tables, self._drawings(variants))

    def _variants(self, studied: StudiedNet) -> Iterator[Variant]:
        yield _measured(studied.label, "as it is", studied.net, studied.input_size)
        done = conversion_of(studied.net)
        if done is None:
            return
        yield _alike(studied, FLOAT, recipe("fp"))
        without = without_qkr(done.recipe)
        if without is not None:
            yield _alike(studied, NO_QKR, without)

    @staticmethod
    def _drawings(variants: Sequence[Variant]) -> list[Drawing]:
        # Next to the float net, whose bit operations are up to 256 times as many, no bar could be seen: its numbers are in the title.
        drawn = [v for v in variants if v.parts and not v.in_float] or variants
        bars = {v.label: list(_kind_rows(v)) for v in drawn}
        float_twins = {v.label: total(list(v.parts)) for v in variants if v.parts and v not in drawn}
        return [
            by_kind("cost_bytes", "Bytes as stored", "bytes", bars, {k: c.size_bytes for k, c in float_twins.items()}),
            by_kind("cost_bitops", "Bit operations of one image", "bit operations", bars, {k: c.bitops for k, c in float_twins.items()}),
        ]


def without_qkr(chosen: Any) -> QuantRecipe | None:
    """The recipe with standard attention wherever it has query-key reparameterization; None if it has that nowhere."""
    rules = {pattern: dict(rule) for pattern, rule in chosen.overrides.items()}
    reached = [rule for rule in rules.values() if rule.get("attention") == "qkr"]
    if getattr(chosen, "attention", None) != "qkr" and not reached:
        return None
    for rule in reached:
        rule["attention"] = "standard"
    attention = "standard" if chosen.attention == "qkr" else chosen.attention
    changed: QuantRecipe = dataclasses.replace(chosen, attention=attention, overrides=rules)
    return changed


def _measured(label: str, variant: str, net: nn.Module, input_size: tuple[int, int, int]) -> Variant:
    return Variant(label, variant, module_costs(net, input_size), module_kinds(net), in_float=conversion_of(net) is None)


def _alike(studied: StudiedNet, variant: str, chosen: QuantRecipe) -> Variant:
    try:
        net = built_alike(studied.net, chosen, studied.input_size)
    except (UsageError, LookupError, TypeError, ValueError, RuntimeError) as error:
        return Variant(studied.label, variant, note=f"cannot be built: {' '.join(str(error).split())}")
    return _measured(studied.label, variant, net, studied.input_size)


def module_kinds(net: nn.Module) -> dict[str, str]:
    """One of `KINDS` for each module, by timm's description of the net, by class and by name."""
    where = stem_and_heads(net)
    return {name: _kind(name, module, where) for name, module in net.named_modules()}


def _kind(name: str, module: nn.Module, where: Mapping[str, str]) -> str:
    parts = name.split(".")
    if name in where:
        return {"stem": "patch embedding", "head": "head"}[where[name]]
    if isinstance(module, _NORMS) or "norm" in parts[-1].lower():
        return "norms"
    if any("attn" in part.lower() for part in parts):
        return "attention weights"
    return "MLP" if any("mlp" in part.lower() for part in parts) else "other"


def _totals(variants: Sequence[Variant]) -> list[Row]:
    rows: list[Row] = []
    as_is: dict[str, Cost] = {}
    for variant in variants:
        found = total(list(variant.parts))
        if variant.variant == "as it is":
            as_is[variant.net] = found
        rows.append({"net": variant.net, "variant": variant.variant, **_compared(variant, found, as_is[variant.net]), "note": variant.note})
    return rows


def _compared(variant: Variant, found: Cost, as_is: Cost) -> Row:
    if not variant.parts:
        return {}
    return {
        "parameters in training": found.n_params,
        "bytes": found.size_bytes,
        "MACs": found.macs,
        "bit operations": found.bitops,
        "net as it is, % of these bytes": _percent(as_is.size_bytes, found.size_bytes),
        "net as it is, % of these bit operations": _percent(as_is.bitops, found.bitops),
    }


def _percent(value: float, whole: float) -> float:
    return round(100 * value / whole, 2) if whole else float("nan")


def _kind_rows(variant: Variant) -> Iterator[Row]:
    for kind in KINDS:
        parts = [part for part in variant.parts if variant.kinds[part.module] == kind]
        products = [p for part in variant.parts for p in part.products if _kind_of_product(variant, p) == kind]
        row = {
            "net": variant.net,
            "variant": variant.variant,
            "kind": kind,
            "parameters in training": sum(part.n_params for part in parts),
            "bytes": sum(part.size_bytes for part in parts),
            "MACs": sum(product.macs for product in products),
            "bit operations": sum(product.bitops for product in products),
        }
        if parts or products:
            yield row


def _kind_of_product(variant: Variant, product: MatrixProduct) -> str:
    kind = variant.kinds[product.module]
    return "attention products" if product.of_activations and kind == "attention weights" else kind


def _module_rows(variant: Variant) -> Iterator[Row]:
    for part in variant.parts:
        yield {
            "net": variant.net,
            "module": part.module or "(net)",
            "kind": variant.kinds[part.module],
            "bits of operands": ", ".join(dict.fromkeys(f"{a} x {b}" for a, b in (p.bits for p in part.products))),
            "parameters in training": part.n_params,
            "bytes": part.size_bytes,
            "bytes of codes": part.code_bytes,
            "bytes of scales": part.scale_bytes,
            "bytes of offsets": part.offset_bytes,
            "bytes of float values": part.float_bytes,
            "MACs": part.macs,
            "bit operations": part.bitops,
        }
