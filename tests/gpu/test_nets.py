"""Whole nets: all ways of running one give the same logits and gradients, on the device as on the CPU.

Oracle: the net run another way. Where operations differ, a value halfway between codes may go to the other side and take along what
depends on it, so each error stands beside that of a control (`tests.gpu.ways`): parameters that differ by a rounding error.
"""

import copy

import pytest
import torch

import qat
from evidence.speed.steps import ARMS
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
    one, none, half, away = (
        {"logits": torch.tensor([1.0, 1.0, x])} for x in (1.0, torch.nan, 1.0005, 1.001)
    )
    zero = {"logits": torch.zeros(3)}
    assert judged(one, one, [one])[0]
    for found, expected, control in (
        (none, one, one),
        (one, none, one),
        (one, one, none),
        (one, zero, one),
    ):
        assert not judged(found, expected, [control, half])[0]
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


@pytest.mark.sample(3)
@pytest.mark.usefixtures("scores_in_memory")
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("family", NETS, ids=lambda f: f.name)
@pytest.mark.parametrize("way", ["apart", "without kernels"])
def test_fused_kernels_change_nothing(anywhere, way, family, bits):
    """Bit for bit forward; sums of gradients may be added in another order."""
    net, images = quantized(family, anywhere, bits)
    expected = results(net, images)
    if way == "apart":
        with Apart():
            found = results(net, images)
    else:
        qat.kernels.use("off")
        found = results(net, images)
    assert torch.equal(found["logits"], expected["logits"])
    for kind in ("weights", "scales"):
        assert (found[kind] - expected[kind]).norm() <= 1e-4 * expected[kind].norm(), kind


def test_scales_from_a_device_are_those_of_the_cpu(device):
    family = NETS[0]
    net, _ = quantized(family, torch.device("cpu"), 4)
    twin, _ = quantized(family, device, 4)
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
    assert len(found) > 10
    assert relative_error(of_device, logits) < 1e-5
    for (x, own, of_given), (expected_x, y) in zip(found, expected, strict=True):
        assert relative_error(of_given, y) < 1e-6
        assert relative_error(x, expected_x) < 1e-5
        assert ((own - y).abs() > 1e-4 * y.abs().max()).float().mean() < 1e-3


def test_a_file_goes_from_device_to_device(anywhere, tmp_path):
    family = NETS[1]
    net, images = quantized(family, anywhere, 2)
    # Older versions of timm do not note the model and its arguments.
    qat.save(net, tmp_path / "net.ckpt", model=family.name, model_kwargs=family.kwargs)
    again = qat.load(tmp_path / "net.ckpt")
    assert {p.device.type for p in again.parameters()} == {"cpu"}
    with torch.no_grad():
        assert torch.equal(again.to(anywhere)(images), copy.deepcopy(net).eval()(images))
