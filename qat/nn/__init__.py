"""Modules that own quantizers, one file per timm family. Importing the package registers every swap."""

from qat.nn import conv, linear, vit
from qat.nn.base import QuantModule
from qat.nn.conv import QuantConv2d
from qat.nn.linear import QuantLinear
from qat.nn.registry import INTENTS, Swap, SwapContext, find_swap, register_swap
from qat.nn.vit import QkrAttention, QuantAttention

__all__ = [
    "INTENTS",
    "QkrAttention",
    "QuantAttention",
    "QuantConv2d",
    "QuantLinear",
    "QuantModule",
    "Swap",
    "SwapContext",
    "conv",
    "find_swap",
    "linear",
    "register_swap",
    "vit",
]
