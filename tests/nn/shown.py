"""Attentions of timm by themselves, as `convert` sees them."""

import copy

from torch import nn

import qat

WIDTH = 16


class Holder(nn.Module):
    """Shows an attention to `convert`: (B, 1, N, C) to (B, N, C), with the same further inputs in every call."""

    def __init__(self, attention, **inputs):
        super().__init__()
        self.attn = attention
        self.inputs = inputs

    def forward(self, x):
        return self.attn(x.squeeze(1), **self.inputs)


def swapped(plain, recipe, tokens, **inputs):
    """A converted copy in its holder."""
    return qat.convert(
        Holder(copy.deepcopy(plain), **inputs), recipe, input_size=(1, tokens, WIDTH)
    )
