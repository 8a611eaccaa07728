"""The deployable form of a quantized net: integer codes, and products that are computed on them."""

from qat.frozen.coded import Coded
from qat.frozen.net import freeze, freeze_structure, integer_forward, is_frozen, prune_offsets
from qat.frozen.products import Noted, Product, noting
from qat.frozen.quantizers import Frozen, FrozenActivation, FrozenLog2, FrozenWeight, set_mode

__all__ = [
    "Coded",
    "Frozen",
    "FrozenActivation",
    "FrozenLog2",
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
