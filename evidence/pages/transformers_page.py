"""Write docs/transformers_models.md: results of converting a tiny model of each class."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

from torch import nn

import qat
import qat.transformers  # noqa: F401  (registers the method of quantized files)
from qat.model.products import matmuls
from qat.nn import HeadProducts
from qat.utils.validate import FLOAT_BITS
from tests.hf_models import KINDS, REFUSED, Kind, are_equal, outputs

PAGE = Path(__file__).resolve().parents[2] / "docs" / "transformers_models.md"
RECIPE = qat.recipe("seq", bits=4, head_bits=7)
INTRO = """# Models of Transformers

Results of `qat.convert` for vision models of Hugging Face's Transformers, measured on a tiny model
of each class with random weights. A class that is not listed is converted too.

- **Quantized in every model**: the image, and weights and inputs of linear layers and convolutions.
- **Attention**: how many of the attentions that compute products have quantized queries, keys,
  values and probabilities. Those that use Transformers' attention interface
  (`attn_implementation`) do. The products of others stay in float, and `qat.convert` warns.
- **Stays float**: share of the [multiply-accumulates](glossary.md#mac-bit-operations) that stay in
  float, and the classes of their modules. The share is that of the tiny model; attention has a
  smaller share in larger models.
- **Heads** are the layers that compute an output other than features. They have `head_bits`.
- **Files**: whether a model has the same outputs, bit for bit, after `save_pretrained` and
  `from_pretrained`, and after `qat.save` and `qat.load`.
- [Query-key reparameterization](glossary.md#qkr) (`quant.attention=qkr`) is for timm's models only.
- In double precision on a CPU, torch's `sdpa` misreads masks in float32. EoMT in float is wrong
  there; with `attn_implementation="eager"` or quantized attention it is right.

| model | class | attention | stays float | heads | files |
|---|---|---|---|---|---|
"""
REFUSALS = """
Other classes are refused before anything is changed:

| model | class | message |
|---|---|---|
"""


def page() -> str:
    """The whole page."""
    text = INTRO + "".join(f"{row(kind)}\n" for kind in KINDS.values()) + REFUSALS
    for kind in REFUSED.values():
        text += f"| {kind.title} | `{kind.cls.__name__}` | {refusal(kind)} |\n"
    return text


def row(kind: Kind) -> str:
    """The row of a class."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the row says what stays float
        net = qat.convert(kind.build(), RECIPE, input_size=kind.input_size)
    qat.initialize_scales(net, [kind.images()])
    heads = {}
    for site in qat.iter_quantizers(net):
        if site.quantizer.spec.bits == RECIPE.head_bits:
            heads[f"`{site.layer}`"] = None
    cells = (
        kind.title,
        f"`{kind.architecture}`",
        *_products(net, kind),
        ", ".join(heads) or "none",
        _files(net, kind),
    )
    return f"| {' | '.join(cells)} |"


def refusal(kind: Kind) -> str:
    """The message of a class that is refused."""
    try:
        qat.convert(kind.build(), RECIPE, input_size=kind.input_size)
    except qat.UsageError as error:
        return str(error).removeprefix("convert: ")
    raise AssertionError(f"{kind.architecture} is converted")


def _products(net: nn.Module, kind: Kind) -> tuple[str, str]:
    """How many attentions are quantized, and the share that stays float with its classes."""
    modules = dict(net.named_modules())
    products = matmuls(net, kind.input_size)
    in_float = [product for product in products if product.bits == (FLOAT_BITS, FLOAT_BITS)]
    share = sum(product.macs for product in in_float) / sum(product.macs for product in products)
    classes = sorted({type(modules[product.module]).__name__ for product in in_float})
    floats = {p.module for p in in_float if "Attention" in type(modules[p.module]).__name__}
    quantized = sum(isinstance(module, HeadProducts) for module in modules.values())
    attention = f"{quantized} of {quantized + len(floats)}" if quantized or floats else "none"
    return attention, f"{100 * share:.1f} %: {', '.join(classes)}" if in_float else "nothing"


def _files(net: nn.Module, kind: Kind) -> str:
    with tempfile.TemporaryDirectory() as folder:
        net.save_pretrained(folder)
        qat.save(net, f"{folder}/net.ckpt")
        copies = (kind.cls.from_pretrained(folder), qat.load(f"{folder}/net.ckpt"))
    expected = outputs(net, kind.images())
    equal = all(are_equal(outputs(copy, kind.images()), expected) for copy in copies)
    return "equal" if equal else "not equal"


if __name__ == "__main__":
    PAGE.write_text(page())
