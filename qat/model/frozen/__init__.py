"""The deployable form of a quantized net: integer codes, and products that are computed on them."""

from qat.model.frozen.coded import Coded
from qat.model.frozen.net import freeze, freeze_structure, integer_forward, is_frozen, prune_offsets
from qat.model.frozen.products import Noted, Product, noting
from qat.model.frozen.quantizers import Frozen, FrozenActivation, FrozenLog2, FrozenWeight, set_mode

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
