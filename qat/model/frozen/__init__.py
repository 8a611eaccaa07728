"""The deployable form of a quantized net: integer codes and fixed grids."""

from qat.model.frozen.net import freeze, freeze_structure, is_frozen, keeps_weights, prune_offsets
from qat.model.frozen.quantizers import Frozen, FrozenActivation, FrozenNonuniform, FrozenWeight

__all__ = [
    "Frozen",
    "FrozenActivation",
    "FrozenNonuniform",
    "FrozenWeight",
    "freeze",
    "freeze_structure",
    "is_frozen",
    "keeps_weights",
    "prune_offsets",
]
