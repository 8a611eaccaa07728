"""The operators of the kernels. Oracle: `torch.library.opcheck`, and eager mode for what is compiled."""

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.fx.experimental.proxy_tensor import make_fx

import qat
import qat.kernels.fused  # noqa: F401  (registers operators)
from qat import kernels
from qat.kernels import Made
from tests.nets import FAMILIES
from tests.tiny import randn

CODES = (-4, 3, -1, False)
STEPS = torch.linspace(0.2, 1, 6)


def sample(name):
    """Arguments of an operator."""
    x, offset = randn(2, 5, 6), randn(6, seed=1)
    lsq, half = (
        (x, STEPS, offset, offset, None, *CODES),
        (x, STEPS[:5], None, None, None, -4, 3, -2, True),
    )
    grad = randn(2, 5, 6, seed=2)
    return {
        "lsq_forward": (*lsq, torch.float32),
        "lsq_backward": (grad, *lsq, True, torch.empty_like(x), None, None, None, *Made()),
        "lsq_backward levels": (
            grad,
            *half,
            False,
            torch.empty_like(x),
            torch.bfloat16,
            None,
            None,
            *Made(),
        ),
        "lsq_backward norm": (
            grad,
            *lsq,
            False,
            torch.empty_like(x),
            torch.float32,
            offset,
            2 * offset,
            *Made("norm", 1e-5),
        ),
        "lsq_backward gelu": (
            grad,
            *half,
            False,
            torch.empty_like(x),
            torch.float32,
            None,
            None,
            *Made("none"),
        ),
        "step_and_slope": (STEPS, offset.exp(), offset, 0.5),
        "statsq": (randn(5, 6), 2, torch.bfloat16),
        "statsq_forward": (randn(5, 6), torch.ones(5, 1), 2, torch.float32),
        "lsq_backward scores": (
            grad,
            *half,
            False,
            torch.empty_like(x),
            torch.float32,
            None,
            None,
            *Made("scores", 0.5),
        ),
        "lsq_backward softmax": (
            grad,
            x.softmax(-1),
            *half[1:],
            False,
            torch.empty_like(x),
            torch.float32,
            None,
            None,
            *Made("softmax", 0.5),
        ),
        "round_blocks": (randn(2, 5, 37), None, None, 4),
        "heads_product": (randn(3, 2, 5, 4), randn(3, 2, 4, 6), torch.empty(3, 2, 5, 6), 0.3),
        "add_products": (randn(3, 2, 5, 4), randn(3, 2, 4, 6), randn(2, 5, 6, seed=1)),
    }[name]


NAMES = (
    "lsq_forward",
    *(f"lsq_backward{kind}" for kind in ("", " levels", " norm", " gelu", " scores", " softmax")),
    "statsq_forward",
    "statsq",
    "step_and_slope",
    "round_blocks",
    "heads_product",
    "add_products",
)


@pytest.mark.parametrize("name", NAMES)
def test_operators_are_what_torch_wants_them_to_be(name):
    torch.library.opcheck(getattr(torch.ops.qat, name.partition(" ")[0]), sample(name))


def step(net, function, images):
    net.zero_grad()
    out = function(images)
    out.square().sum().backward()
    return [
        out.detach(),
        *(parameter.grad for parameter in net.parameters() if parameter.grad is not None),
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "knobs"),
    [
        ("ofq", {}),
        ("ofq", {"attention": "standard"}),
        ("seq", {}),
        ("lsq", {}),
        ("deploy_w4a8", {}),
    ],
)
def test_a_traced_step_is_the_eager_one_to_the_last_bit(recipe, knobs):
    family = FAMILIES["deit"]
    images = family.images(4)
    net = qat.convert(family.build(), qat.recipe(recipe, **knobs), input_size=family.input_size)
    qat.initialize_scales(net, [images]).train()
    eager = step(net, net, images)
    torch._dynamo.reset()
    traced = step(net, torch.compile(net, fullgraph=True, backend="aot_eager"), images)
    assert len(eager) == len(traced)
    assert all(torch.equal(one, other) for one, other in zip(eager, traced, strict=True))


def test_a_traced_step_goes_back_through_norms_and_gelus_in_the_pass_of_the_quantizer():
    family, kinds = FAMILIES["deit"], []
    images = family.images(4)
    net = qat.convert(family.build(), qat.recipe("ofq"), input_size=family.input_size)
    qat.initialize_scales(net, [images]).train()

    def seen(graph, _):
        nodes = [
            node
            for node in graph.graph.nodes
            if torch.ops.qat.lsq_backward.default in {node.target, *node.args[:1]}
        ]
        kinds.extend(
            next(x for x in (*node.kwargs.values(), *node.args) if isinstance(x, str))
            for node in nodes
        )
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    step(
        net,
        torch.compile(
            net, fullgraph=True, backend=aot_autograd(fw_compiler=seen, bw_compiler=seen)
        ),
        images,
    )
    assert (kinds.count("norm"), kinds.count("none"), kinds.count("softmax")) == (
        2 * len(net.blocks),
        len(net.blocks),
        len(net.blocks),
    )


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
    family = FAMILIES["deit"]
    images = family.images(2)
    net = qat.convert(
        family.build(), qat.recipe("ofq", attention=attention), input_size=family.input_size
    )
    qat.initialize_scales(net, [images]).eval()
    with pytest.raises(qat.UsageError, match="kernels=off"):
        way(net, images)
    monkeypatch.setattr(kernels, "_choice", "off")
    way(net, images)


@torch.no_grad()
@pytest.mark.parametrize(
    "trace",
    [lambda net, x: torch.jit.trace(net, x, check_trace=False), lambda net, x: make_fx(net)(x)],
    ids=["jit", "fx"],
)
@pytest.mark.parametrize("attention", ["qkr", "standard"])
@pytest.mark.filterwarnings("ignore")  # torch's, of `torch.jit` and of sizes that become constants
def test_what_traces_a_net_sees_what_it_computes(trace, attention):
    family = FAMILIES["deit"]
    net = qat.convert(
        family.build(), qat.recipe("ofq", attention=attention), input_size=family.input_size
    )
    qat.initialize_scales(net, [family.images(2)]).eval()
    traced, images = trace(net, family.images(2)), family.images(2, seed=1)
    assert torch.equal(traced(images), net(images))


class Written(nn.Module):
    """Writes into what a LayerNorm gave, in place or beside it."""

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


def test_a_graph_does_not_go_through_what_was_written_into():
    x = randn(4, 3, 5, 8)
    for in_place in (False, True):
        net = qat.convert(
            nn.Sequential(Written(in_place=in_place)),
            qat.recipe("lsq", bits=4, attention="float"),
            input_size=(3, 5, 8),
        )
        qat.initialize_scales(net, [x])
        expected = step(net, net, x)
        compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
        if in_place:
            with pytest.raises(
                Exception, match="writes in place into what a LayerNorm or GELU gave"
            ):
                compiled(x)
        else:
            assert all(
                torch.equal(a, b) for a, b in zip(step(net, compiled, x), expected, strict=True)
            )
