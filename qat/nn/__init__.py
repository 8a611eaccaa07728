"""Modules with quantizers. Importing a file such as `vit.py` registers replacements for timm's.

`attention_interface.py` quantizes attentions of Transformers.
"""

from qat.nn import beit, conv, eva, fqvit, hf_constructor, linear, relpos, swin, swinv2, vit
from qat.nn.attention import QuantAttention, ScoredAttention
from qat.nn.attention_interface import (
    AttentionInterface,
    HeadProducts,
    activation_classes,
    hf_models,
)
from qat.nn.conv import QuantConv2d
from qat.nn.fqvit import FqNet
from qat.nn.last_layers import BOXES, LOGITS, last_layers, named_outputs
from qat.nn.linear import QuantLinear
from qat.nn.qkr_attention import QkrAttention
from qat.nn.quant_module import QuantModule
from qat.nn.signs import ActivationTracer
from qat.nn.swap_registry import Swap, SwapContext, find_swap, is_attention, register_swap, swap_net

__all__ = [
    "BOXES",
    "LOGITS",
    "ActivationTracer",
    "AttentionInterface",
    "FqNet",
    "HeadProducts",
    "QkrAttention",
    "QuantAttention",
    "QuantConv2d",
    "QuantLinear",
    "QuantModule",
    "ScoredAttention",
    "Swap",
    "SwapContext",
    "activation_classes",
    "beit",
    "conv",
    "eva",
    "find_swap",
    "fqvit",
    "hf_constructor",
    "hf_models",
    "is_attention",
    "last_layers",
    "linear",
    "named_outputs",
    "register_swap",
    "relpos",
    "swap_net",
    "swin",
    "swinv2",
    "vit",
]
