"""Quantized modules against the reference's: outputs, gradients, and every stored tensor has a place. Oracle: tests/goldens."""

import math
import re
from functools import partial
from types import SimpleNamespace

import timm.layers
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.vision_transformer import Block
from torch import nn
from torch.testing import assert_close

import qat
from tests import golden
from tests.golden import OFQ, ofq

# The reference's names (right) for ours (left); the image map is stored flat there.
RENAMES = [
    (r"quant_x_4_qkv\.move_b4\.bias", "input_quantizer.offset_before"),
    (r"quant_x_4_qkv\.move_aft\.bias", "input_quantizer.offset_after"),
    (r"quant_x_4_qkv\.input_quant_fn\.s", "input_quantizer.quantizer.scale"),
    (r"move_b4\.bias", "input_quantizer.offset_before"),
    (r"move_aft\.bias", "input_quantizer.offset_after"),
    (r"input_quant_fn\.signed", "input_quantizer.quantizer.signed"),
    (r"input_quant_fn\.s", "input_quantizer.quantizer.scale"),
    (r"lsqw_fn\.s", "weight_quantizer.scale"),
    (r"quan_a_qkx_fn\.s", "k_quantizer.scale"),
    (r"move_qkx_b4\.bias", "product_offset"),
    (r"quan_a_softmax_fn\.s", "probs_quantizer.scale"),
    (r"quan_a_([qkv])_fn\.s", r"\1_quantizer.quantizer.scale"),
    (r"move_([qkv])_b4\.bias", r"\1_quantizer.offset_before"),
    (r"move_([qv])_aft\.bias", r"\1_quantizer.offset_after"),
    (r"(?<![\w])([qk])\.weight", r"\1_weight"),
]
DEAD = r"clip_val|move_qkx_aft|move_k_aft|relative_position_index"


def renamed(tensors):
    """The reference's tensors under our names; `move_qkv_b4` becomes three offsets, dead entries go."""
    out = {}
    for name, value in tensors.items():
        if re.search(DEAD, name):
            continue
        if name.endswith("move_qkv_b4.bias"):
            prefix = name.removesuffix("move_qkv_b4.bias")
            out |= {
                f"{prefix}{r}_quantizer.offset_before": part
                for r, part in zip("qkv", value.chunk(3), strict=True)
            }
            continue
        for pattern, ours in RENAMES:
            name, hits = re.subn(pattern, ours, name)
            if hits:
                break
        out[name] = value
    return out


def heads_of(state):
    """How many heads a reference's attention has: an offset for each row of its folded matrix, else two, which leave no trace."""
    rows, width = (
        next((v.numel() for k, v in state.items() if k.endswith(name)), 0)
        for name in ("move_qkx_b4.bias", "move_v_b4.bias")
    )
    return rows // width if rows else 2


def source_module(case, sd, x):
    """The float timm module that the case was made from (its weights come from the case)."""
    if case.startswith("qlinear"):
        out_features, in_features = sd["weight"].shape
        return nn.Linear(in_features, out_features)
    if case.startswith("qhead"):
        return nn.Linear(sd["weight"].shape[1], sd["weight"].shape[0])
    if case.startswith("qpatch"):
        out, chans, side, _ = sd["weight"].shape
        return nn.Conv2d(chans, out, side, side)
    dim = x.shape[-1]
    if case.startswith("qmlp"):
        return timm.layers.Mlp(dim, sd["fc1.weight"].shape[0])
    if case.startswith("qattn"):
        return timm.layers.Attention(dim, num_heads=heads_of(sd), qkv_bias=True)
    if case.startswith("qswin"):
        rows, heads = sd["relative_position_bias_table"].shape
        window = (math.isqrt(rows) + 1) // 2
        shift = window // 2 if case.endswith("_shift") else 0
        return Windows(
            SwinTransformerBlock(
                dim, tuple(x.shape[1:3]), heads, window_size=window, shift_size=shift
            )
        )
    hidden = sd["mlp.fc1.weight"].shape[0]
    return Block(
        dim,
        heads_of(sd),
        mlp_ratio=hidden / dim,
        qkv_bias=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-5),
    )


class Windows(nn.Module):
    """The attention of a Swin block between timm's own partition into windows and back: (B, H, W, C) to the same shape."""

    def __init__(self, block):
        super().__init__()
        self.attn = block.attn
        self.block = [block]

    def forward(self, x):
        (block,) = self.block
        block.attn = self.attn
        return block._attn(x)


class Drop(nn.Module):
    """Hands `convert` an image-shaped probe: (B, 1, N, C) to (B, N, C), or (B, 1, 1, C) to (B, C)."""

    def __init__(self, dims):
        super().__init__()
        self.dims = dims

    def forward(self, x):
        return x.flatten(0, self.dims) if self.dims else x


def converted(case):
    """Our module with the state of the case, and the entries that found no place."""
    sd, x = golden.below(OFQ, f"{case}/sd"), ofq(case, "x")
    bits, act_bits = (int(b) for b in re.search(r"w(\d)a(\d)", case).groups())
    attention = "qkr" if "qkr" in case else "standard"
    recipe = qat.recipe("ofq", bits=bits, act_bits=act_bits, attention=attention, steps="absolute")
    module = source_module(case, sd, x)
    size = (
        x.shape[1:] if x.ndim == 4 else (1, *x.shape[1:]) if x.ndim == 3 else (1, 1, *x.shape[1:])
    )
    net = nn.Sequential(Drop(4 - x.ndim), module)
    net.pretrained_cfg = {
        "first_conv": "1" if "patch" in case else "",
        "classifier": "1" if "head" in case else "",
    }
    if re.fullmatch(r"qlinear_.*_u", case):
        mlp = timm.layers.Mlp(module.in_features, module.in_features)
        mlp.fc2 = module
        net[1] = mlp
        qat.convert(net, recipe, input_size=tuple(size))
        net[1] = mlp.fc2
    else:
        qat.convert(net, recipe, input_size=tuple(size))
    owner = net[1].attn if case.startswith("qswin") else net[1]
    ours = owner.state_dict()
    theirs = {k: v.reshape(ours[k].shape) if k in ours else v for k, v in renamed(sd).items()}
    result = owner.load_state_dict(theirs, strict=False)
    return SimpleNamespace(
        module=net[1],
        owner=owner,
        missing=result.missing_keys,
        unexpected=result.unexpected_keys,
        x=x,
    )


FAMILIES = r"q(linear|mlp|attn|attn_qkr|block_qkr|head|patch|swin|swin_qkr)_w\da\d(_[su]|_shift)?"


@golden.parametrize(OFQ, FAMILIES)
def test_output_and_gradients(case):
    made = converted(case)
    assert (made.missing, made.unexpected) == ([], [])
    x = made.x.requires_grad_()
    out = made.module(x)
    assert_close(out, ofq(case, "out"), rtol=1e-5, atol=1e-5)
    expected = renamed(golden.below(OFQ, f"{case}/grad"))
    if not expected:
        return
    out.backward(ofq(case, "upstream"))
    assert_close(x.grad, ofq(case, "grad_x"), rtol=1e-4, atol=1e-4)
    ours = {name: p.grad for name, p in made.owner.named_parameters()}
    assert set(expected) == set(ours)
    for name, grad in expected.items():
        assert_close(
            ours[name],
            grad.reshape(ours[name].shape),
            rtol=1e-4,
            atol=1e-4,
            msg=lambda m, n=name: f"{n}: {m}",
        )
