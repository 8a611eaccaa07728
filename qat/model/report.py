"""What is quantized in a converted net and what stays float."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from qat.model.convert import conversion_of
from qat.model.products import matmuls
from qat.model.sites import iter_quantizers
from qat.utils.validate import FLOAT_BITS


class ReportRow(NamedTuple):
    """One quantizer of a conversion report."""

    module: str
    role: str
    quantizer: str
    bits: int
    axis: int | None
    scales: int
    offsets: str


@dataclass(frozen=True)
class ConversionReport:
    """What is quantized and what stays float.

    Attributes:
        rows: one per quantizer.
        stays_float: name and class of every module with parameters of its own and no weight quantizer, and of every module that
            multiplies activations with each other in float, as an attention of an unknown family does; it says so after the class.
    """

    rows: tuple[ReportRow, ...]
    stays_float: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        return self.to_text()

    def to_text(self) -> str:
        """The report as a plain table."""
        table = [ReportRow._fields, *(tuple(map(str, row)) for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
            for row in table
        ]
        return "\n".join([
            *lines,
            "",
            "stays float:",
            *(f"  {name}  {cls}" for name, cls in self.stays_float),
        ])


def float_products(net: nn.Module) -> tuple[str, ...]:
    """Names of the modules of a converted net that multiply activations with each other in float; none of a float net."""
    done = conversion_of(net)
    products = [] if done is None else matmuls(net, done.input_size)
    return tuple(
        dict.fromkeys(
            p.module for p in products if p.of_activations and p.bits == (FLOAT_BITS, FLOAT_BITS)
        )
    )


def conversion_report(net: nn.Module) -> ConversionReport:
    """The conversion report of a net, which sees one image of zeros; a float net has no rows."""
    sites = list(iter_quantizers(net))
    rows = []
    for s in sites:
        spec = s.quantizer.spec
        rows.append(
            ReportRow(
                s.layer or "(net)",
                s.role,
                spec.quantizer,
                spec.bits,
                s.quantizer.axis,
                s.quantizer.n_scales,
                spec.offsets,
            )
        )
    quantized = {id(s.owner) for s in sites if s.is_weight} | {
        id(m) for s in sites for m in s.quantizer.modules()
    }
    products, stays_float = float_products(net), []
    for name, module in net.named_modules():
        has_weights = (
            id(module) not in quantized and next(module.parameters(recurse=False), None) is not None
        )
        if has_weights or name in products:
            stays_float.append((
                name or "(net)",
                type(module).__name__ + (" (products of activations)" if name in products else ""),
            ))
    return ConversionReport(tuple(rows), tuple(stays_float))
