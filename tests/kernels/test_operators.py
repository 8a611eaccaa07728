"""The operators of the kernels. Oracle: `torch.library.opcheck`, and eager mode for what is compiled."""

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.fx.experimental.proxy_tensor import make_fx

import qat.kernels.fused  # noqa: F401  (registers operators)
from qat import kernels
from qat.kernels import Producer
from tests.errors import usage_error
from tests.kernels.calls import ITSELF
from tests.nets import FAMILIES
from tests.tiny import fitted, identical, randn

X = randn(2, 5, 6)
OFFSET = randn(6, seed=1)
STEPS = torch.linspace(0.2, 1, 6)
FACTORS = randn(3, 2, 5, 4), randn(3, 2, 4, 6)
LSQ = STEPS, OFFSET, OFFSET, None, -4, 3, -1, False
HALF = STEPS[:5], None, None, None, -4, 3, -2, True


def backward(quantizer, dequantized=torch.float32, *, norm=(None, None), made=ITSELF, x=X):
    """Arguments of `lsq_backward`; the gradient of an offset after the quantizer is requested."""
    with_after = quantizer is LSQ
    out = torch.empty_like(x)
    return randn(2, 5, 6, seed=2), x, *quantizer, with_after, out, dequantized, *norm, *made


SAMPLES = {
    "lsq_forward": (X, *LSQ, torch.float32),
    "lsq_backward": backward(LSQ, None),
    "lsq_backward levels": backward(HALF, torch.bfloat16),
    "lsq_backward norm": backward(LSQ, norm=(OFFSET, 2 * OFFSET), made=Producer("norm", 1e-5)),
    "lsq_backward gelu": backward(HALF, made=Producer("gelu")),
    "lsq_backward scores": backward(HALF, made=Producer("scores", factor=0.5)),
    "lsq_backward softmax": backward(HALF, made=Producer("softmax", factor=0.5), x=X.softmax(-1)),
    "statsq_forward": (randn(5, 6), torch.ones(5, 1), 2, torch.float32),
    "statsq": (randn(5, 6), 2, torch.bfloat16),
    "step_and_slope": (STEPS, OFFSET.exp(), OFFSET, 0.5),
    "round_blocks": (randn(2, 5, 37), None, None, 4),
    "heads_product": (*FACTORS, torch.empty(3, 2, 5, 6), 0.3),
    "add_products": (*FACTORS, randn(2, 5, 6, seed=1)),
}


@pytest.mark.sample(4)
@pytest.mark.parametrize("name", SAMPLES)
def test_operators_are_what_torch_wants_them_to_be(name):
    torch.library.opcheck(getattr(torch.ops.qat, name.partition(" ")[0]), SAMPLES[name])


def deit(preset="ofq", n=4, **knobs):
    """A quantized DeiT and `n` images."""
    family = FAMILIES["deit"]
    images = family.images(n)
    return fitted(family.build(depth=1), images, preset, **knobs), images


def step(net, function, images):
    net.zero_grad()
    out = function(images)
    out.square().sum().backward()
    return [
        out.detach(),
        *(parameter.grad for parameter in net.parameters() if parameter.grad is not None),
    ]


@pytest.mark.long
@pytest.mark.parametrize("recipe", ["ofq", "ofq_noqkr", "seq", "lsq", "deploy_w4a8"])
def test_a_traced_step_is_the_eager_one_to_the_last_bit(recipe):
    net, images = deit(recipe)
    eager = step(net.train(), net, images)
    torch._dynamo.reset()
    traced = step(net, torch.compile(net, fullgraph=True, backend="aot_eager"), images)
    assert len(eager) == len(traced)
    assert identical(eager, traced)


@pytest.mark.long
def test_a_traced_step_goes_back_through_norms_and_gelus_in_the_pass_of_the_quantizer():
    net, images = deit()
    kinds = []

    def seen(graph, _):
        for node in graph.graph.nodes:
            if torch.ops.qat.lsq_backward.default in {node.target, *node.args[:1]}:
                arguments = (*node.kwargs.values(), *node.args)
                kinds.append(next(x for x in arguments if isinstance(x, str)))
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=seen, bw_compiler=seen)
    step(net.train(), torch.compile(net, fullgraph=True, backend=backend), images)
    depth = len(net.blocks)
    counts = [kinds.count(kind) for kind in ("norm", "gelu", "softmax")]
    assert counts == [2 * depth, depth, depth]


def penalty(net, images):
    out = torch.autograd.grad(
        net(images).square().sum(), list(net.parameters()), create_graph=True, allow_unused=True
    )
    return sum(one.square().sum() for one in out if one is not None).backward()


def one_by_one(net, images):
    return torch.func.vmap(lambda image: net(image[None]))(images)


def gradients(net, images):
    return torch.func.grad(lambda x: net(x).square().sum())(images)


def jacobian(net, images):
    return torch.autograd.functional.jacobian(lambda x: net(x).sum(0), images, vectorize=True)


@pytest.mark.parametrize("way", [penalty, one_by_one, gradients, jacobian])
@pytest.mark.parametrize("attention", ["qkr", "standard"])
def test_what_goes_beyond_one_gradient_needs_kernels_off(way, attention, monkeypatch):
    net, images = deit(n=2, attention=attention)
    with usage_error("kernels=off"):
        way(net.eval(), images)
    monkeypatch.setattr(kernels, "_choice", "off")
    way(net, images)


@pytest.mark.sample(1)
@torch.no_grad()
@pytest.mark.parametrize(
    "trace",
    [lambda net, x: torch.jit.trace(net, x, check_trace=False), lambda net, x: make_fx(net)(x)],
    ids=["jit", "fx"],
)
@pytest.mark.parametrize("attention", ["qkr", "standard"])
@pytest.mark.filterwarnings("ignore")  # torch's, of `torch.jit` and of sizes that become constants
def test_what_traces_a_net_sees_what_it_computes(trace, attention):
    net, images = deit(n=2, attention=attention)
    traced = trace(net.eval(), images)
    images = images.flip(-1)
    assert torch.equal(traced(images), net(images))


class Written(nn.Module):
    """Writes into the output of a LayerNorm, or into a copy of it."""

    def __init__(self, *, in_place):
        super().__init__()
        self.norm, self.fc, self.in_place = nn.LayerNorm(8), nn.Linear(8, 8), in_place

    def forward(self, x):
        x = self.norm(x)
        if self.in_place:
            x.mul_(2)
        else:
            x = x * 2
        return self.fc(x)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_graph_does_not_go_through_what_was_written_into(in_place):
    x = randn(4, 3, 5, 8)
    net = nn.Sequential(Written(in_place=in_place))
    fitted(net, x, "lsq", bits=4, attention="float")
    expected = step(net, net, x)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    if in_place:
        with pytest.raises(
            Exception, match="writes in place into the output of a LayerNorm or GELU"
        ):
            compiled(x)
        return
    assert identical(step(net, compiled, x), expected)
