"""The search on other families than ViT. Oracle: whole forwards of the net that it leaves behind, bit for bit."""

import copy
import functools

import pytest
import torch

import qat
from qat.model.blocks import find_blocks
from qat.ptq.block_cache import trace
from qat.ptq.distributed import Ranks
from qat.ptq.fitness import Evaluator, logits_of, plain_fitness
from qat.ptq.search import search
from qat.ptq.search_settings import SearchSettings
from qat.ptq.vector import scale_vectors
from tests.nets import FAMILIES
from tests.ptq.searching import changed, state

KNOBS = {"passes": 1, "cycles": 4, "radius": 0.05, "relative": True, "micro_batch": 4}
SEARCHED = {
    "deit_distilled": 2,
    "deit3": 2,
    "beit": 2,
    "swin": 4,
    "levit": 5,  # three blocks and the two attentions that make the map smaller
    "cait": 2,
    "pvt_v2": 4,
}


@functools.cache
def _made(name):
    family = FAMILIES[name]
    net, images = family.build(), [family.images(8, seed) for seed in range(2)]
    logits = [logits_of(net, batch, 8) for batch in images]
    qat.convert(net, qat.PtqRecipe(bits=4, act_bits=8), input_size=family.input_size)
    qat.ptq.calibrate(net, images)
    return net, images, logits


@pytest.mark.parametrize("name", SEARCHED)
def test_scales_of_every_attention_change_for_the_better(name, caplog):
    net, images, logits = _made(name)
    net, settings = copy.deepcopy(net), SearchSettings(**KNOBS)
    before, vectors = state(net), scale_vectors(net, settings.targets, trace(net, find_blocks(net), images[0][:1]).order)
    assert len(vectors) == len(find_blocks(net)) == SEARCHED[name]
    result = search(net, images, logits, settings)
    assert result.fitness < result.fitness_before
    assert result.fitness == plain_fitness(net, images, logits, settings)
    names = changed(before, net)
    assert names
    assert all(name.endswith("weight_quantizer.scale") and ".attn" in name for name in names)
    assert "cannot be run from its input" not in caplog.text


@pytest.mark.parametrize("name", SEARCHED)
def test_gradients_reach_the_scales_of_every_block(name):
    net, images, logits = _made(name)
    net, settings = copy.deepcopy(net).eval(), SearchSettings(**KNOBS)
    traced = trace(net, find_blocks(net), images[0][:1])
    evaluator = Evaluator(net, images, logits, settings, traced, Ranks())
    vectors = scale_vectors(net, settings.targets, traced.order)
    with torch.no_grad(), evaluator.active():
        for block, vector in vectors.items():
            _, gradient = evaluator.gradient(block, vector)
            assert gradient.isfinite().all()
            assert gradient.abs().max() > 0
