"""Modules that own quantizers, one file per timm family. Importing the package registers every swap."""

from qat.nn import beit, conv, eva, fqvit, fqvit_swin, linear, pool, recomputable, relpos, swin, swinv2, vit
from qat.nn.attention import QkrAttention, QuantAttention, ScoredAttention
from qat.nn.conv import QuantConv2d
from qat.nn.fqvit import FqNet
from qat.nn.linear import QuantLinear
from qat.nn.quant_module import QuantModule
from qat.nn.swap_registry import INTENTS, Swap, SwapContext, find_swap, is_attention, register_swap, swap_net

__all__ = [
    "INTENTS",
    "FqNet",
    "QkrAttention",
    "QuantAttention",
    "QuantConv2d",
    "QuantLinear",
    "QuantModule",
    "ScoredAttention",
    "Swap",
    "SwapContext",
    "beit",
    "conv",
    "eva",
    "find_swap",
    "fqvit",
    "fqvit_swin",
    "is_attention",
    "linear",
    "pool",
    "register_swap",
    "relpos",
    "recomputable",
    "swap_net",
    "swin",
    "swinv2",
    "vit",
]
