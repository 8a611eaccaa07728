"""Single attentions of timm as `convert` sees them, and their formulas."""

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


def heads(t):
    """(B, N, C) to (B, 2, N, C / 2)."""
    return t.unflatten(-1, (2, -1)).transpose(1, 2)


def merged(t):
    """(B, 2, N, C / 2) to (B, N, C)."""
    return t.transpose(1, 2).flatten(2)


def attend(attn, scores, v):
    """The rest of a quantized attention, from scores (B, 2, N, N) and values (B, N, C) on."""
    probs = attn.probs_quantizer(scores.softmax(-1))
    return attn.proj(merged(probs @ heads(attn.v_quantizer(v))))
