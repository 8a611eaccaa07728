"""Compilation of the families with a file of their own. Oracle: eager execution (see tests/test_compile.py for the yardstick)."""

import pytest
import torch
import torch._dynamo as dynamo

import qat
from tests.nets import ATTENTIONS
from tests.test_compile import share_of_changed_images, step
from tests.tiny import logits


@pytest.fixture(autouse=True)
def fresh_compiler():
    dynamo.reset()
    dynamo.utils.counters.clear()
    yield
    dynamo.reset()


def quantized(name, bits):
    """Without paths that drop out by chance, and as shallow as it can be with a shifted window."""
    family = ATTENTIONS[name]
    depth = {"depths": (2, 1)} if name.startswith("swin") else {"depth": 1}
    net = qat.convert(
        family.build(drop_path_rate=0.0, **depth), qat.recipe("ofq", bits=bits, attention=family.attention), input_size=family.input_size
    )
    return qat.initialize_scales(net, [family.images(8, seed=1)])


def compare(name, backend):
    net, x = quantized(name, 2).train(), ATTENTIONS[name].images(16)
    out, gradient = step(net, x)
    compiled_out, compiled_gradient = step(torch.compile(net, fullgraph=True, backend=backend), x)
    assert dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not dynamo.utils.counters["graph_break"]
    assert share_of_changed_images(out, compiled_out) <= 0.1
    assert share_of_changed_images(out, logits(quantized(name, 3), x)) == 1
    assert torch.cosine_similarity(gradient, compiled_gradient, dim=0) > 0.99


@pytest.mark.long
@pytest.mark.parametrize("name", ["swin", "eva02", "swinv2", "dinov3", "beit", "siglip"])
def test_traced_forward_and_backward(name):
    compare(name, "aot_eager")
