"""Attention with a bias from relative positions, of the block's own or shared. Oracle: timm's nets where nothing is rounded."""

import pytest
import timm
import torch

import qat
from tests.nets import ATTENTIONS
from tests.tiny import float_recipe, logits, shake

SMALL = {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 10}


def net(name, **changes):
    torch.manual_seed(0)
    return shake(timm.create_model(name, **SMALL, **changes)).eval()


@pytest.mark.parametrize("kind", ["qkr", "standard", "float"])
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("vit_relpos_small_patch16_224", {}),
        ("vit_srelpos_small_patch16_224", {}),
        ("vit_relpos_medium_patch16_cls_224", {}),
        ("vit_relpos_small_patch16_224", {"rel_pos_type": "bias"}),
    ],
)
def test_without_rounding_it_is_timms(kind, name, changes):
    x = ATTENTIONS["relpos"].images()
    expected = logits(net(name, **changes), x)
    ours = qat.convert(net(name, **changes), float_recipe(kind), input_size=(3, 32, 32))
    torch.testing.assert_close(logits(ours, x), expected, rtol=1e-5, atol=1e-5)


def test_the_net_that_makes_the_bias_stays_float():
    converted = qat.convert(net("vit_relpos_small_patch16_224"), qat.recipe("ofq"), input_size=(3, 32, 32))
    assert not [site.name for site in qat.iter_quantizers(converted) if "rel_pos" in site.name]
