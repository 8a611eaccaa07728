"""The deployable form of a quantized net: integer codes, and products that are computed on them."""

from qat.model.frozen.coded import QuantizedTensor
from qat.model.frozen.net import freeze, freeze_structure, integer_forward, is_frozen, keeps_weights, prune_offsets
from qat.model.frozen.products import Noted, Product, noting
from qat.model.frozen.quantizers import Frozen, FrozenActivation, FrozenNonuniform, FrozenWeight, set_mode

__all__ = [
    "QuantizedTensor",
    "Frozen",
    "FrozenActivation",
    "FrozenNonuniform",
    "FrozenWeight",
    "Noted",
    "Product",
    "freeze",
    "freeze_structure",
    "integer_forward",
    "is_frozen",
    "keeps_weights",
    "noting",
    "prune_offsets",
    "set_mode",
]
