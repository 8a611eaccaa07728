"""Tables of a model's quantized tensors and of the modules that stay in float."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from qat.model.convert import conversion_of
from qat.model.products import matmuls
from qat.model.sites import iter_quantizers
from qat.utils.tables import text_table
from qat.utils.validate import FLOAT_BITS


class ReportRow(NamedTuple):
    """One quantizer of a conversion report; `scales` excludes those that each forward computes."""

    module: str
    role: str
    quantizer: str
    bits: int
    axis: int | None
    scales: int
    offsets: str


@dataclass(frozen=True)
class ConversionReport:
    """Report of a model's quantizers, and of modules that stay in float.

    Attributes:
        rows: one row per quantizer.
        stays_float: name and class of each module except quantizers that has parameters but no
            weight quantizer, and of each module that multiplies activations in float, such as an
            attention of an unknown class. In the second case, a remark follows the class.
    """

    rows: tuple[ReportRow, ...]
    stays_float: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        return self.to_text()

    def to_text(self) -> str:
        """Tables of quantizers and of modules that stay in float, as text, without empty ones."""
        tables = []
        if self.rows:
            tables.append(text_table(ReportRow._fields, self.rows))
        if self.stays_float:
            tables.append(text_table(("stays float", "class"), self.stays_float))
        return "\n\n".join(tables)


def float_products(net: nn.Module) -> tuple[str, ...]:
    """Names of the modules of a converted model that multiply activations in float.

    For a float model, the result is empty.
    """
    conversion = conversion_of(net)
    if conversion is None:
        return ()
    names = []
    for product in matmuls(net, conversion.input_size):
        if product.of_activations and product.bits == (FLOAT_BITS, FLOAT_BITS):
            names.append(product.module)
    return tuple(dict.fromkeys(names))


def conversion_report(net: nn.Module) -> ConversionReport:
    """Report the conversion of a model. A converted model runs once on an image of zeros.

    The report of a float model has no rows.
    """
    rows = []
    quantized: set[nn.Module] = set()
    for site in iter_quantizers(net):
        spec = site.quantizer.spec
        row = ReportRow(
            module=site.layer or "(net)",
            role=site.role,
            quantizer=spec.quantizer,
            bits=spec.bits,
            axis=site.quantizer.axis,
            scales=site.quantizer.num_stored_scales,
            offsets=spec.offsets,
        )
        rows.append(row)
        quantized.update(site.quantizer.modules())
        if site.is_weight:
            quantized.add(site.owner)
    products = float_products(net)
    stays_float = []
    for name, module in net.named_modules():
        has_parameters = next(module.parameters(recurse=False), None) is not None
        class_name = type(module).__name__
        if name in products:
            stays_float.append((name or "(net)", f"{class_name} (products of activations)"))
        elif has_parameters and module not in quantized:
            stays_float.append((name or "(net)", class_name))
    return ConversionReport(tuple(rows), tuple(stays_float))
