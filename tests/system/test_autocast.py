"""Mixed precision: quantizers compute in float32, products in bfloat16. Oracle: float32 on the same inputs, and the modules one by one.

A forward hook on a quantizer makes its module run unfused, so what hooks see is the plain form; without hooks the fused Functions run.
"""

import contextlib
import copy

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch.utils._python_dispatch import TorchDispatchMode

import qat
from qat.model.cost import cost
from tests.callbacks.fitting import batches, fit, module, weights
from tests.tiny import SIZE, images, quantized, watched

PRESETS = ("ofq_noqkr", "ofq")
BF16 = torch.bfloat16


def autocast(dtype=BF16):
    return torch.autocast("cpu", dtype)


@contextlib.contextmanager
def hooked(modules):
    """With a forward hook on each of the modules, which run unfused therefore."""
    handles = [module.register_forward_hook(lambda *_: None) for module in modules]
    yield
    for handle in handles:
        handle.remove()


class Products(TorchDispatchMode):
    """Dtypes that products and softmaxes are asked for."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__.strip("_")
        if name in {"mm", "bmm", "addmm", "addmm_", "baddbmm", "softmax"}:
            self.seen.setdefault(name if name == "softmax" else "product", []).append(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module", params=PRESETS)
def net(request):
    return quantized(request.param, bits=4).train()


@pytest.fixture(scope="module")
def seen(net):
    def run(net):
        with autocast():
            net(images())

    return watched(net, run)


def test_every_quantizer_gives_what_it_gives_in_float32(net, seen):
    dtypes = set()
    for site in qat.iter_quantizers(net):
        x, out = seen[site.name]
        dtypes.add(x.dtype)
        with torch.no_grad():
            plain = site.quantizer(x.float())
            with autocast():
                codes = site.quantizer.codes(x)
        assert out.dtype == x.dtype
        assert torch.equal(out, plain.to(x.dtype)), site.name
        assert torch.equal(codes, site.quantizer.codes(x.float())), site.name
    assert dtypes == {torch.float32, BF16}


@pytest.mark.parametrize("fused", [True, False])
def test_products_are_in_bfloat16(net, fused):
    with (
        hooked([] if fused else net.modules()),
        torch.no_grad(),
        autocast(),
        Products() as products,
    ):
        out = net(images())
    assert out.dtype == BF16
    assert set(products.seen["softmax"]) == {torch.float32}
    # The matrix of query-key reparameterization is a weight: it is made in float32, one product a block.
    folds = products.seen["product"].count(torch.float32)
    assert folds == sum(isinstance(m, qat.nn.QkrAttention) for m in net.modules())
    assert set(products.seen["product"]) <= {torch.float32, BF16}
    assert products.seen["product"].count(BF16) > folds


def gradients(net):
    net.zero_grad()
    with autocast():
        out = net(images(64))
    out.float().square().mean().backward()
    return out.detach(), {name: p.grad.clone() for name, p in net.named_parameters()}


def test_fused_and_unfused_agree(net):
    out, fused = gradients(net)
    with hooked(net.modules()):
        plain_out, plain = gradients(net)
    assert torch.equal(out, plain_out)
    largest = max(g.norm() for g in plain.values())
    for name, gradient in fused.items():
        assert gradient.isfinite().all()
        # A softmax is blind to most of this offset: what is left of its gradient is rounding.
        if name.endswith("product_offset"):
            assert gradient.norm() < 1e-2 * largest
        else:
            assert (gradient - plain[name]).norm() <= 1e-2 * plain[name].norm(), name


@pytest.mark.parametrize("memory", ["save", "recompute"])
def test_a_backward_pass_inside_autocast_whose_forward_pass_was_not(net, memory):
    net = qat.set_execution(copy.deepcopy(net), memory=memory)
    loss = net(images()).square().mean()
    tensors = list(net.parameters())
    expected = torch.autograd.grad(loss, tensors, retain_graph=True)
    with autocast():
        found = torch.autograd.grad(loss, tensors)
    largest = max(gradient.norm() for gradient in expected)
    for gradient, in_float32 in zip(found, expected, strict=True):
        assert (gradient - in_float32).norm() <= 1e-2 * largest


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16-mixed", torch.float32), ("bf16-true", BF16)]
)
def test_a_net_trains(precision, dtype):
    learner = module(quantized(), lr=0.05)
    before = weights(learner.net)
    trainer = fit(learner, precision=precision, accumulate_grad_batches=2)
    assert trainer.global_step == 4
    moved = [name for name, p in learner.net.named_parameters() if (p != before[name]).any()]
    assert len(moved) > 0.9 * len(before)
    assert all(p.isfinite().all() and p.dtype == dtype for p in learner.net.parameters())


def test_float16_with_a_gradient_scaler_trains():
    learner = module(quantized())
    before = learner.net.head.weight.detach().clone()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    fit(learner, plugins=[MixedPrecision("16-mixed", "cpu", scaler)], data=batches(8))
    assert scaler.get_scale() == 1024  # no step was skipped
    assert (learner.net.head.weight != before).any()
    assert all(p.isfinite().all() for p in learner.net.parameters())


@pytest.mark.sample(1)
@pytest.mark.parametrize("dtype", [torch.float64, BF16])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_net_of_another_dtype_runs_whether_watched_or_not(preset, dtype):
    net = quantized(preset, bits=4).eval().to(dtype)
    x = images().to(dtype)
    alone = net(x)
    with hooked(site.quantizer for site in qat.iter_quantizers(net)):
        among = net(x)
    assert alone.dtype == among.dtype == dtype
    if dtype == torch.float64:  # roundings of bfloat16 move values over thresholds
        torch.testing.assert_close(among, alone, rtol=0, atol=1e-9)
    assert cost(net, SIZE).size_bytes == cost(quantized(preset, bits=4), SIZE).size_bytes
