"""Write docs/models.md, `make models-page`: results of converting a member of each timm family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

import qat
from qat.model.report import float_products
from tests.nets import FAMILIES, Family

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
INTRO = """# Models

Results of `qat.convert` for each family of timm. A family that is not listed is converted too; its
attention keeps products in float unless it uses one of the attention classes below. `qat.convert`
warns if more than 1 % of the [multiply-accumulates](glossary.md#mac-bit-operations) stay in float
against the [recipe](glossary.md#recipe), and names the modules.

- **Quantized in every model**: the image, and weights and inputs of all linear layers and
  convolutions. Where attention is quantized: also queries, keys, values and probabilities.
- **[QKR](glossary.md#qkr)** says whether query-key reparameterization is possible
  (`quant.attention=qkr`, the default of `ofq_*`). It quantizes two products in place of queries and
  keys: query weights times key weights, and that times the input. A pooling head never has it.
  Where it is not possible, use `quant.attention=standard` or `float`, for the whole model or with
  `quant.overrides` for some blocks.
- **Stays float** lists classes of modules. Norms, tokens, position embeddings and factors of
  residual branches stay in float in every model, so a block or an attention that has such
  parameters is listed. "Products of [activations](glossary.md#activation)" means that the linear
  layers of this attention are quantized and its matrix products are not. `Linear` is part of a
  small network that computes relative positions; its output does not depend on the image.
  `conversion.txt` of a run lists all modules by name.
- **Scales**: a convolution inside a model has one scale for its input and no
  [offsets](glossary.md#offset). A linear layer on a feature map has one scale
  (`quant.map_scales=column`: one per column).
- **Signs**: a layer after GELU, ReLU, SiLU or Hardswish has unsigned inputs, except in
  `deploy_w8a8` and `deploy_w4a8`. All other inputs are signed, except
  images, whose sign comes from [calibration](glossary.md#calibration).

| family | attention | QKR | stays float |
|---|---|---|---|
"""


def page() -> str:
    """The whole page."""
    titles: dict[str, list[str]] = {}
    for family in FAMILIES.values():
        titles.setdefault(row(family), []).append(family.title)
    text = INTRO
    for cells, families in titles.items():
        text += f"| {', '.join(families)} | {cells} |\n"
    return text


def row(family: Family) -> str:
    """The cells of a family: attention classes, whether QKR is possible, float classes."""
    net = _converted(family, attention="float")
    attentions = _classes(family.build(), float_products(net))
    qkr = _qkr(family, attentions)
    net = _converted(family, attention=family.attention)
    floats = {cls for _, cls in qat.conversion_report(net).stays_float} - {type(net).__name__}
    attention_cell = ", ".join(f"`{cls}`" for cls in attentions) or "none"
    return " | ".join((attention_cell, qkr, ", ".join(sorted(floats))))


def _converted(family: Family, **knobs: Any) -> nn.Module:
    return qat.convert(family.build(), qat.recipe("ofq", **knobs), input_size=family.input_size)


def _classes(net: nn.Module, names: tuple[str, ...]) -> list[str]:
    classes = set()
    for name in names:
        cls = type(net.get_submodule(name))
        classes.add(f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}")
    return sorted(classes)


def _qkr(family: Family, attentions: list[str]) -> str:
    try:
        net = _converted(family)
    except qat.UsageError as error:
        return "no: it " + str(error).partition("this model ")[2].partition(", so ")[0]
    if not attentions:
        return "no attention"
    has_qkr = any(site.role == "qk" for site in qat.iter_quantizers(net))
    return "yes" if has_qkr else "no: attention stays float"


if __name__ == "__main__":
    PAGE.write_text(page())
