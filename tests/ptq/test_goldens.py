"""A tiny ViT calibrated and quantized as Evol-Q's code does it: every scale, every zero point, the logits. Oracle: tests/goldens."""

import re

import timm
import torch
from torch.testing import assert_close

import qat
from qat.model.ptq_spec import PtqRecipe
from qat.ptq import calibrate, in_float
from tests import golden
from tests.ptq.ties import Ties

PTQ = "ptq_goldens.npz"
TAGS = r"vit/(?!weights)[^/]+"

# The reference's names of quantizers (left) for ours; what is left are layers with weights.
NAMES = [
    ("qact_input", "patch_embed.proj.input_quantizer"),
    (r"patch_embed\.qact", "patch_embed.output_quantizer"),
    ("qact_embed", "tokens_quantizer"),
    ("qact_pos", "positions_quantizer"),
    ("qact1", "embedding_quantizer"),
    (r"(blocks\.\d+)\.qact1", r"\1.attn.qkv.input_quantizer"),
    (r"(.*\.attn)\.qact1", r"\1.qkv_quantizer"),
    (r"(.*\.attn)\.qact_attn1", r"\1.scores_quantizer"),
    (r"(.*\.attn)\.log_int_softmax", r"\1.probs_quantizer"),
    (r"(.*\.attn)\.qact2", r"\1.proj.input_quantizer"),
    (r"(.*\.attn)\.qact3", r"\1.output_quantizer"),
    (r"(blocks\.\d+)\.qact2", r"\1.residual1_quantizer"),
    (r"(blocks\.\d+)\.qact3", r"\1.mlp.fc1.input_quantizer"),
    (r"(.*)\.mlp\.qact1", r"\1.mlp.fc2.input_quantizer"),
    (r"(.*)\.mlp\.qact2", r"\1.mlp_quantizer"),
    (r"(blocks\.\d+)\.qact4", r"\1.residual2_quantizer"),
    ("qact2", "head.input_quantizer"),
    ("act_out", "head.output_quantizer"),
    (r"(.*)", r"\1.weight_quantizer"),
]


def ours(name):
    return next(
        re.sub(f"^{theirs}$", mine, name) for theirs, mine in NAMES if re.fullmatch(theirs, name)
    )


def recipe_of(case):
    """What a tag says: config_fq (`fq`) has min-max weights and with PTF integer norms, config (`cfg`) OMSE weights and float norms."""
    tag = case.removeprefix("vit/")
    method = next(m for m in ("omse", "ema", "percentile", "minmax") if m in tag)
    has_ptf = golden.tensor(PTQ, f"{case}/scale/qact1").numel() > 1
    return PtqRecipe(
        bits=int(re.search(r"_w(\d)", tag)[1]),
        act_bits=8,
        weight_observer="minmax" if tag.startswith("fq") else "omse",
        act_observer=method,
        residual_observer="ptf" if has_ptf else None,
        bias_correction="bcorr" in tag,
        layernorm="integer" if has_ptf and tag.startswith("fq") else "float",
    )


LOGITS = 1e-4  # largest difference where no code differs
HEADS = 3  # the only size that weights do not show


def float_net():
    """Of the size that the weights have."""
    weights = golden.below(PTQ, "vit/weights")
    patches, hidden, head = (
        weights[f"{name}.weight"] for name in ("patch_embed.proj", "blocks.0.mlp.fc1", "head")
    )
    net = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=batches()[0].shape[-1],
        patch_size=patches.shape[-1],
        in_chans=patches.shape[1],
        embed_dim=patches.shape[0],
        depth=len({name.split(".")[1] for name in weights if name.startswith("blocks.")}),
        num_heads=HEADS,
        mlp_ratio=len(hidden) / hidden.shape[1],
        num_classes=len(head),
    )
    net.load_state_dict(weights)
    return net.eval()


def calibrated(case):
    net = qat.convert(float_net(), recipe_of(case), input_size=tuple(batches()[0].shape[1:]))
    calibrate(net, batches())
    return net


def batches():
    return list(golden.tensor(PTQ, "vit/x"))


@torch.no_grad()
def assert_logits(net, expected):
    """Equal, but for what codes on a threshold change: flipping them must give the expected logits."""
    ties = Ties(net)
    for batch, logits in zip(batches(), expected, strict=True):
        flips = ties.explain(
            lambda batch=batch: net(batch),
            lambda y, logits=logits: float((y - logits).abs().max()),
            LOGITS,
        )
        assert flips is not None, (
            f"logits differ by more than {LOGITS}, and no codes on thresholds explain it"
        )


@golden.parametrize(PTQ, TAGS)
def test_scales_zero_points_and_logits(case):
    net = calibrated(case)
    quantizers = {site.name: site.quantizer for site in qat.iter_quantizers(net)}
    scales, zero_points = (golden.below(PTQ, f"{case}/{kind}") for kind in ("scale", "zp"))
    assert {ours(name) for name in scales} == set(quantizers)
    for name, scale in scales.items():
        quantizer = quantizers[ours(name)]
        assert_close(
            quantizer.scale,
            scale.flatten().expand_as(quantizer.scale),
            rtol=1e-6,
            atol=0,
            msg=lambda m, name=name: f"{name}: {m}",
        )
        zero_point = zero_points[name].flatten().float()
        assert torch.equal(quantizer.zero_point, zero_point.expand_as(quantizer.zero_point)), name
    assert_logits(net, golden.tensor(PTQ, f"{case}/out_q0"))
    with torch.no_grad(), in_float(net):
        logits = torch.stack([net(batch) for batch in batches()])
    assert_close(logits, golden.tensor(PTQ, f"{case}/out_fp"), rtol=1e-5, atol=1e-5)
