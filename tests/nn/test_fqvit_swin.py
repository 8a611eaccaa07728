"""Quantizers behind the layers of Swin. Oracle: timm's own net where nothing is rounded, FQ-ViT's list of places."""

import pytest
import torch
from torch.testing import assert_close

import qat
from qat.model.ptq_spec import PtqRecipe
from qat.ptq import calibrate, in_float
from tests.nets import FAMILIES
from tests.tiny import logits

SWIN = FAMILIES["swin"]


def placed(**knobs):
    net = qat.convert(SWIN.build(), PtqRecipe(**{"bits": 8, **knobs}), input_size=SWIN.input_size)
    calibrate(net, [SWIN.images(4)])
    return net


@pytest.mark.parametrize("placement", ["inputs", "fqvit"])
def test_without_rounding_it_is_timms_net(placement):
    net, x = placed(placement=placement), SWIN.images(4)
    with in_float(net):
        assert_close(logits(net, x), logits(SWIN.build(), x), rtol=1e-4, atol=1e-4)
    error = (logits(net, x) - logits(SWIN.build(), x)).norm() / logits(SWIN.build(), x).norm()
    assert 1e-3 < error < 0.1


def test_where_activations_are_quantized():
    sites = {site.name for site in qat.iter_quantizers(placed()) if not site.is_weight}
    block = {
        *(
            "attn.qkv.input_quantizer",
            "attn.qkv_quantizer",
            "attn.scores_quantizer",
            "attn.table_quantizer",
            "attn.biased_quantizer",
        ),
        *(
            "attn.probs_quantizer",
            "attn.proj.input_quantizer",
            "attn.output_quantizer",
            "residual1_quantizer",
        ),
        *(
            "mlp.fc1.input_quantizer",
            "mlp.fc2.input_quantizer",
            "mlp_quantizer",
            "residual2_quantizer",
        ),
    }
    outside = {
        *(
            "patch_embed.proj.input_quantizer",
            "patch_embed.output_quantizer",
            "layers.1.downsample.reduction.input_quantizer",
        ),
        *(
            "layers.1.downsample.output_quantizer",
            "head.fc.input_quantizer",
            "head.fc.output_quantizer",
        ),
    }
    assert sites == outside | {
        f"layers.{stage}.blocks.{i}.{site}"
        for stage in range(2)
        for i in range(2)
        for site in block
    }


def test_a_file_gives_the_same_logits(tmp_path):
    net, x = placed(residual_observer="ptf", bits=4), SWIN.images(2)
    qat.save(net, tmp_path / "net.ckpt")
    assert torch.equal(logits(qat.load(tmp_path / "net.ckpt"), x), logits(net, x))
