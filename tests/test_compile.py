"""Compilation. Oracle: eager execution.

A value on a rounding threshold may fall to either side in another kernel, and a flipped code moves all logits of its image. So
images are counted, not logits compared; a net with one bit more shows that the count notices a wrong quantizer.
"""

import pytest
import torch
import torch._dynamo as dynamo

from tests.tiny import images, logits, quantized


@pytest.fixture(autouse=True)
def fresh_compiler():
    dynamo.reset()
    dynamo.utils.counters.clear()
    yield
    dynamo.reset()


def step(net, x):
    """Logits and gradients of one training step."""
    net.zero_grad()
    out = net(x)
    out.square().mean().backward()
    return out.detach(), torch.cat([p.grad.flatten() for p in net.parameters()])


def share_of_changed_images(a, b):
    return ((a - b).abs().amax(1) > 1e-4).float().mean()


@pytest.mark.parametrize("preset", ["lsq", "minmax"])
def test_one_graph(preset):
    found = dynamo.explain(quantized(preset, bits=2).train())(images())
    assert (found.graph_count, found.graph_break_count) == (1, 0)


def compare(preset, backend):
    net, x = quantized(preset, bits=2).train(), images(64)
    out, gradient = step(net, x)
    compiled_out, compiled_gradient = step(torch.compile(net, fullgraph=True, backend=backend), x)
    assert dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not dynamo.utils.counters["graph_break"]
    assert share_of_changed_images(out, compiled_out) <= 0.05
    assert share_of_changed_images(out, logits(quantized(preset, bits=3), x)) == 1
    assert torch.cosine_similarity(gradient, compiled_gradient, dim=0) > 0.999
    assert torch.cosine_similarity(gradient, step(quantized(preset, bits=3).train(), x)[1], dim=0) < 0.99


@pytest.mark.parametrize("preset", ["ofq", "ofq_noqkr"])
def test_traced_forward_and_backward(preset):
    compare(preset, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["ofq", pytest.param("ofq_noqkr", marks=pytest.mark.long)])
def test_compiled_forward_and_backward(preset):
    compare(preset, "inductor")
