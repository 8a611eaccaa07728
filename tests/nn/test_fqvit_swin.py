"""Quantizers behind the layers of Swin. Oracle: timm's own net where nothing is rounded, FQ-ViT's list of places."""

import pytest
from torch.testing import assert_close

import qat
from qat.model.ptq_spec import PtqRecipe
from qat.ptq import in_float
from tests.nets import FAMILIES
from tests.tiny import fitted, logits

SWIN = FAMILIES["swin"]


def placed(**knobs):
    return fitted(SWIN.build(), SWIN.images(4), PtqRecipe(bits=8, **knobs))


@pytest.mark.parametrize("placement", ["inputs", "fqvit"])
def test_without_rounding_it_is_timms_net(placement):
    net, x = placed(placement=placement), SWIN.images(4)
    expected = logits(SWIN.build(), x)
    with in_float(net):
        assert_close(logits(net, x), expected, rtol=1e-4, atol=1e-4)
    assert 1e-3 < (logits(net, x) - expected).norm() / expected.norm() < 0.1


def test_where_activations_are_quantized():
    sites = {site.name for site in qat.iter_quantizers(placed()) if not site.is_weight}
    attention = "qkv.input qkv table scores biased probs proj.input output"
    block = ["residual1", "mlp.fc1.input", "mlp.fc2.input", "mlp", "residual2"]
    block += [f"attn.{site}" for site in attention.split()]
    merging = ("layers.1.downsample.reduction.input", "layers.1.downsample.output")
    outside = {
        "patch_embed.proj.input",
        "patch_embed.output",
        *merging,
        "head.fc.input",
        "head.fc.output",
    }
    blocks = ("layers.0.blocks.0", "layers.0.blocks.1", "layers.1.blocks.0", "layers.1.blocks.1")
    expected = outside | {f"{name}.{site}" for name in blocks for site in block}
    assert sites == {f"{site}_quantizer" for site in expected}


def test_a_map_of_tokens_has_one_scale_where_a_sequence_has_one_a_token():
    net = placed(placement="fqvit", act_scales="token")
    found = {site.name: site.quantizer.scale.numel() for site in qat.iter_quantizers(net)}
    block = "layers.0.blocks.0"
    for name in ("patch_embed.output", f"{block}.residual1", "layers.1.downsample.output"):
        assert found[f"{name}_quantizer"] == 1
    assert found[f"{block}.residual2_quantizer"] > 1
