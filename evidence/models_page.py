"""Write docs/models.md: what conversion does to each timm family, found by converting one of its members: `make models-page`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from torch import nn

import qat
from qat.model.report import float_products
from qat.spec import ROLES
from tests.nets import FAMILIES, Family

PAGE = Path(__file__).resolve().parents[1] / "docs" / "models.md"
INTRO = """# Models

What `qat.convert` does to the families of timm, found by converting a small member of each. `make models-page` writes this page.

- **QKR** is query-key reparameterization (`quant.attention=qkr`, the default of `ofq_*`). Where it cannot hold, converting stops with the
  reason; `quant.attention=standard` and `float` are left, for the net or by `quant.overrides` for some blocks.
- **Quantized** lists roles of tensors: weights and inputs of all Linears and convolutions, the image, and of an attention either q, k, v
  and probabilities (`standard`), or `qk` = Wq^T Wk, its product with the input as `k`, v and probabilities (`qkr`). A pooling head has
  learnt queries and is `standard` in either case. Stem and classifiers have `quant.stem_bits` and `quant.head_bits`.
- **Stays float** lists classes of modules. "products of activations" marks an attention whose Linears are quantized and whose matrix
  products are not, because its family has no file of its own in `qat/nn/`. `conversion.txt` of a run has the list by module name.
- Small nets that turn relative positions into a table of biases (`cpb_mlp`, `rel_pos.mlp`, `meta_mlp`) stay float, and so do the biases:
  they depend on no image.
- A convolution inside a net has one scale for its input and no offsets. So has a Linear on a feature map one scale
  (`quant.map_scales=column`: one per column, as in the paper's code).
- In a gated MLP (SwiGLU) the input of the last Linear is signed; after GELU, ReLU or SiLU it is unsigned.
- A family that is not listed takes the generic path, as those do whose attention stays float.

| family | attention | QKR | quantized | stays float |
|---|---|---|---|---|
"""


def page() -> str:
    """The whole page."""
    return INTRO + "".join(f"| {' | '.join(row(family))} |\n" for family in FAMILIES.values())


def row(family: Family) -> list[str]:
    """Title, attention classes, whether QKR holds, roles, float classes."""
    plain = family.build()
    in_float = qat.convert(family.build(), qat.recipe("ofq", attention="float"), input_size=family.input_size)
    attentions = _classes(plain, float_products(in_float))
    qkr = _qkr(family, attentions)
    net = qat.convert(family.build(), qat.recipe("ofq", attention=family.attention), input_size=family.input_size)
    report = qat.conversion_report(net)
    found = {row.role for row in report.rows}
    roles = [role for role in ROLES if role in found]
    floats = Counter(cls for _, cls in report.stays_float)
    return [
        family.title,
        ", ".join(f"`{cls}`" for cls in attentions) or "none",
        qkr,
        ", ".join(roles),
        ", ".join(f"{cls} x{n}" if n > 1 else cls for cls, n in sorted(floats.items())),
    ]


def _classes(net: nn.Module, names: tuple[str, ...]) -> list[str]:
    found = {type(net.get_submodule(name)) for name in names}
    return sorted(f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}" for cls in found)


def _qkr(family: Family, attentions: list[str]) -> str:
    try:
        net = qat.convert(family.build(), qat.recipe("ofq"), input_size=family.input_size)
    except qat.UsageError as error:
        return "no: it " + str(error).partition("this net ")[2].partition(", so ")[0]
    if not attentions:
        return "no attention"
    return "yes" if any(site.role == "qk" for site in qat.iter_quantizers(net)) else "no: attention stays float"


if __name__ == "__main__":
    PAGE.write_text(page())
