"""The deployable form of a quantized net: integer codes, and products that are computed on them."""

from qat.frozen.coded import QuantizedTensor
from qat.frozen.net import freeze, freeze_structure, integer_forward, is_frozen, prune_offsets
from qat.frozen.products import Noted, Product, noting
from qat.frozen.quantizers import Frozen, FrozenActivation, FrozenNonuniform, FrozenWeight, set_mode

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
    "noting",
    "prune_offsets",
    "set_mode",
]
