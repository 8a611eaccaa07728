"""Whole nets: all ways of running one give the same logits and gradients, on the device as on the CPU.

Oracle: the net run another way. Where operations differ, a value halfway between codes may go to the other side and take along what
depends on it, so each error stands beside that of a control (`tests.gpu.ways`): parameters that differ by a rounding error.
"""

import copy

import pytest
import torch

import qat
from evidence.speed.steps import ARMS, TINY, build
from qat.kernels import attention
from qat.quantizers import LSQ
from tests.gpu.ways import KINDS, Apart, compared, judged, relative_error, results
from tests.nets import FAMILIES

QUANTIZED = [
    arm for arm, settings in ARMS.items() if settings.knobs is not None and not settings.teacher
]
NETS = [FAMILIES[name] for name in ("vit", "deit", "swin")]


@pytest.fixture(autouse=True)
def kernels_as_they_were():
    """Kernels by themselves again, and products in float32 as on a CPU."""
    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    qat.kernels.use("auto")
    torch.backends.cuda.matmul.allow_tf32 = tf32


@pytest.mark.parametrize("arm", QUANTIZED)
@pytest.mark.parametrize("kind", KINDS)
def test_ways_of_running_agree(device, kind, arm):
    torch.manual_seed(0)
    right, *errors = compared(kind, arm, device)
    assert right, errors


def test_a_nan_is_never_right():
    one, none, half = ({"logits": torch.tensor([1.0, 1.0, x])} for x in (1.0, torch.nan, 1.0005))
    assert judged(one, one, [one])[0]
    for found, expected, control in (
        (none, one, one),
        (one, none, one),
        (one, one, none),
        (one, {"logits": torch.zeros(3)}, one),
    ):
        assert not judged(found, expected, [control, half])[0]
    away = {"logits": torch.tensor([1.0, 1.0, 1.001])}
    assert [judged(away, one, controls)[0] for controls in ([one], [one, half])] == [False, True]


def quantized(family, device, bits):
    net = qat.convert(
        family.build().to(device),
        qat.recipe("ofq", bits=bits, attention="standard"),
        input_size=family.input_size,
    )
    images = family.images(4).to(device)
    return qat.initialize_scales(net, [images]), images


@pytest.fixture
def scores_in_memory(monkeypatch):
    """What adds up scores in another order is left out."""
    monkeypatch.setattr(attention, "fits", lambda *_: False)


@pytest.mark.usefixtures("scores_in_memory")
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("family", NETS, ids=lambda f: f.name)
def test_fused_and_apart_agree(anywhere, family, bits):
    """The same operations: bit for bit forward; sums of gradients may be added in another order."""
    net, images = quantized(family, anywhere, bits)
    fused = results(net, images)
    with Apart():
        apart = results(net, images)
    assert torch.equal(fused["logits"], apart["logits"])
    for kind in ("weights", "scales"):
        assert (fused[kind] - apart[kind]).norm() <= 1e-4 * apart[kind].norm(), kind


@pytest.mark.usefixtures("scores_in_memory")
@pytest.mark.parametrize("family", NETS, ids=lambda f: f.name)
def test_with_kernels_and_without(device, family):
    net, images = quantized(family, device, 2)
    qat.kernels.use("triton")
    ours = results(net, images)
    qat.kernels.use("off")
    plain = results(net, images)
    assert torch.equal(ours["logits"], plain["logits"])
    for kind in ("weights", "scales"):
        assert (ours[kind] - plain[kind]).norm() <= 1e-4 * plain[kind].norm(), kind


def test_scales_from_a_device_are_those_of_the_cpu(device):
    family = NETS[0]
    net, images = quantized(family, torch.device("cpu"), 4)
    twin = qat.convert(
        family.build().to(device),
        qat.recipe("ofq", bits=4, attention="standard"),
        input_size=family.input_size,
    )
    qat.initialize_scales(twin, [images.to(device)])
    expected, found = (
        {n: m.scale.detach().cpu() for n, m in one.named_modules() if isinstance(m, LSQ)}
        for one in (net, twin)
    )
    first = next(iter(expected))
    assert torch.allclose(found[first], expected[first], rtol=1e-5)
    # Behind the first quantizer a code on a tie moves what later ones see.
    errors = {n: relative_error(found[n], step) for n, step in expected.items()}
    assert max(errors.values()) < 0.05, errors


def calls(net, images, given=None):
    """Input and output of each quantizer in the order of calls, and the logits.

    With `given`, what another net's calls were: its outputs go on in place of the own ones, and what its inputs give here is there, too.
    """
    seen = []

    def look(module, args, output):
        if given is None:
            seen.append((args[0].cpu(), output.cpu()))
            return None
        x, y = given[len(seen)]
        seen.append((args[0].cpu(), output.cpu(), module.forward(x.to(output.device)).cpu()))
        return y.to(output.device)

    hooks = [site.quantizer.register_forward_hook(look) for site in qat.iter_quantizers(net)]
    with torch.no_grad():
        logits = net(images).cpu()
    for hook in hooks:
        hook.remove()
    return seen, logits


@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("family", NETS, ids=lambda f: f.name)
def test_what_differs_between_device_and_cpu_are_ties(anywhere, family, bits):
    """The device gives the CPU's codes for the CPU's inputs; with these codes everywhere what lies between quantizers differs by rounding.

    So a code that differs belongs to a value that rounding takes over a threshold, and there is hardly one.
    """
    net, images = quantized(family, torch.device("cpu"), bits)
    expected, logits = calls(net, images)
    found, of_device = calls(copy.deepcopy(net).to(anywhere), images.to(anywhere), expected)
    assert len(found) == len(expected) > 10
    assert (
        max(relative_error(again, y) for (*_, again), (_, y) in zip(found, expected, strict=True))
        < 1e-6
    )
    assert max(relative_error(x, y) for (x, *_), (y, _) in zip(found, expected, strict=True)) < 1e-5
    assert relative_error(of_device, logits) < 1e-5
    moved = [
        ((x - y).abs() > 1e-4 * y.abs().max()).float().mean().item()
        for (_, x, _), (_, y) in zip(found, expected, strict=True)
    ]
    assert max(moved) < 1e-3, moved


@pytest.mark.parametrize("arm", QUANTIZED)
def test_bfloat16_autocast_is_finite(anywhere, arm):
    images = torch.randn(2, 3, TINY["img_size"], TINY["img_size"], device=anywhere)
    found = results(
        build("deit_tiny_patch16_224", ARMS[arm], images, **TINY, depth=1), images, autocast=True
    )
    assert all(x.isfinite().all() for x in found.values())


def test_a_file_goes_from_device_to_device(anywhere, tmp_path):
    family = NETS[1]
    net, images = quantized(family, anywhere, 2)
    qat.save(
        net, tmp_path / "net.ckpt", model=family.name, model_kwargs=family.kwargs
    )  # which older versions of timm do not note
    again = qat.load(tmp_path / "net.ckpt")
    assert {p.device.type for p in again.parameters()} == {"cpu"}
    with torch.no_grad():
        assert torch.equal(again.to(anywhere)(images), copy.deepcopy(net).eval()(images))
