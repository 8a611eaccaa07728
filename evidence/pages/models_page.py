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

What `qat.convert` quantizes in each timm family. A family that is not listed is converted too; its
attention products stay float unless it uses one of the attention classes below. `qat.convert` warns
if more than 1 % of the multiply-accumulates stay float against the recipe, and names the modules.

- **Quantized** in every model: the image, weights and inputs of all linear layers and convolutions;
  in an attention that does not stay float, queries, keys, values and probabilities too.
- **QKR**: whether query-key reparameterization (`quant.attention=qkr`, the default of `ofq_*`) is
  possible. It quantizes the product of the query and key weights, and the product of that with the
  input, in place of queries and keys; never in a pooling head. Where it is not possible, use
  `quant.attention=standard` or `float`, for the model or with `quant.overrides` for some blocks.
- **Stays float** lists classes of modules. In every model norms, tokens, position embeddings and
  factors of residual branches stay float, so a block or an attention with such parameters is
  listed. "products of activations": the linear layers of this attention are quantized, its matrix
  products are not. `Linear` is part of a small network that computes relative positions, whose
  output depends on no image. `conversion.txt` of a run lists all modules by name.
- A convolution inside a model has one scale for its input and no offsets; a linear layer on a
  feature map has one scale (`quant.map_scales=column`: one per column).
- A layer after GELU, ReLU, SiLU or Hardswish has unsigned inputs (not in `deploy_w8a8`,
  `deploy_w4a8`); others are signed. A convolution after SiLU or Hardswish has signed inputs: it has
  no offset that could fit their negative tails.

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
