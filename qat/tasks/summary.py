"""The first lines of a run: what it does, with what, and where its outputs go."""

from __future__ import annotations

import re
from collections import Counter

from torch import nn

from qat.conversion import ConversionReport
from qat.data import ImageData
from qat.spec import QuantRecipe


def lines(title: str, entries: dict[str, str]) -> str:
    """A title and aligned `key  value` lines."""
    width = max(len(key) for key in entries)
    return "\n".join([title, *(f"  {key.ljust(width)}  {value}" for key, value in entries.items())])


def describe_model(name: str, net: nn.Module, data: ImageData) -> str:
    """Name, parameters, image and token count."""
    params = sum(p.numel() for p in net.parameters())
    chans, height, width = data.input_size
    return f"{name}, {params / 1e6:.2f} M parameters, images {chans} x {height} x {width}"


def describe_recipe(recipe: QuantRecipe) -> str:
    """One line of bits and quantizers."""
    if recipe.name == "fp":
        return "fp: float, nothing is quantized"
    bias = f" (query bias: {recipe.qk_bias})" if recipe.attention == "qkr" else ""
    rules = f", {len(recipe.overrides)} override(s)" if recipe.overrides else ""
    return (
        f"{recipe.name}: weights {recipe.bits} bit {recipe.weight_quantizer}, activations {recipe.act_bits} bit {recipe.act_quantizer}, "
        f"attention {recipe.attention}{bias}, stem {recipe.stem_bits} bit, heads {recipe.head_bits} bit{rules}"
    )


def describe_data(name: str, data: ImageData) -> str:
    """Sizes of the splits."""
    counts = ", ".join(f"{len(data.split(s))} {s}" for s in ("train", "val"))
    test = f", {len(data.split('test'))} test" if data.evaluation_split == "test" else ""
    return f"{name}: {counts}{test} images, {data.settings.num_classes} classes"


def compact(report: ConversionReport) -> str:
    """The conversion report with equal blocks in one row: numbers in names become `*`, the last column counts them."""
    rows = Counter((re.sub(r"\d+", "*", r.module), r.role, r.quantizer, r.bits, r.axis, r.scales, r.offsets) for r in report.rows)
    head = ("module", "role", "quantizer", "bits", "axis", "scales", "offsets", "times")
    table = [head, *((*(str(v) for v in key), str(times)) for key, times in rows.items())]
    widths = [max(len(row[i]) for row in table) for i in range(len(head))]
    text = ["  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in table]
    floats = Counter((re.sub(r"\d+", "*", name), cls) for name, cls in report.stays_float)
    stays = ", ".join(f"{name} ({cls})" + (f" x{n}" if n > 1 else "") for (name, cls), n in floats.items())
    return "\n".join(["quantized", *text, f"  stays float: {stays}"])
