"""Modules that own quantizers, one file per timm family; importing a file registers its swaps."""

from qat.nn import beit, conv, eva, fqvit, linear, relpos, swin, swinv2, vit
from qat.nn.attention import QuantAttention, ScoredAttention
from qat.nn.conv import QuantConv2d
from qat.nn.fqvit import FqNet
from qat.nn.linear import QuantLinear
from qat.nn.qkr_attention import QkrAttention
from qat.nn.quant_module import QuantModule
from qat.nn.signs import ActivationTracer
from qat.nn.swap_registry import Swap, SwapContext, find_swap, is_attention, register_swap, swap_net

__all__ = [
    "ActivationTracer",
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
    "is_attention",
    "linear",
    "register_swap",
    "relpos",
    "swap_net",
    "swin",
    "swinv2",
    "vit",
]
