"""Compare ways of running a model: errors of logits and gradients as |found - expected| / |expected|.

A value that lies halfway between codes goes to either side, and takes all that depends on it along, so every error stands beside that of a
control: the expected way of running with parameters that differ by a rounding error, the worst of several such nets, as some meet a value
halfway between codes and others do not; or in bfloat16 autocast instead of float32.
"""

import copy

import torch
from torch.overrides import TorchFunctionMode

from evidence.speed.steps import ARMS, build
from qat import kernels
from qat.lit.compiled import CompiledCall
from qat.model.sites import quantizer_parameters

KINDS = ("kernels", "device", "compiled", "compiled bfloat16")
# Errors that rounding explains; by how much more than the control's one may be.
SMALL, FACTOR, CONTROLS = 1e-5, 3.0, 8


class Apart(TorchFunctionMode):
    """Somebody who watches torch's functions: quantizers and products then run one after the other."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def relative_error(found, expected):
    """|found - expected| / |expected|; NaN where one of them holds NaN, or nothing is expected."""
    found, expected = found.detach().double(), expected.detach().double()
    return ((found - expected).norm() / expected.norm()).item()


def results(net, images, call=None, *, autocast=False):
    """Logits, and gradients of their mean square by the weights and by scales and offsets."""
    net.zero_grad()
    with torch.autocast(images.device.type, torch.bfloat16, enabled=autocast):
        logits = (net if call is None else call)(images)
    logits.float().square().mean().backward()
    steps = set().union(*quantizer_parameters(net))
    found = {"logits": logits.detach().float()}
    for kind, members in (("weights", set(net.parameters()) - steps), ("scales", steps)):
        gradients = [
            p.grad.flatten() for p in net.parameters() if p in members and p.grad is not None
        ]
        if gradients:
            found[kind] = torch.cat(gradients)
    return {kind: x.cpu() for kind, x in found.items()}


def compared(kind, arm, device):
    """Whether a way of running is right, with its errors and those of its control.

    At 8 bits: at two a net of random weights gives something else for every rounding error, so that nothing could be told from it.
    """
    images = torch.randn(16, 3, 224, 224, device=device)
    net = build("deit_tiny_patch16_224", ARMS[arm], images, bits=8, depth=2)
    kernels.use("off" if kind in {"device", "kernels"} else "auto")
    expected, is_half = results(net, images), kind == "compiled bfloat16"
    controls = (
        [results(net, images, autocast=True)]
        if is_half
        else [results(moved(net), images) for _ in range(CONTROLS)]
    )
    if kind == "kernels":
        kernels.use("triton")
    elif kind == "device":
        net, images = net.cpu(), images.cpu()
    torch._dynamo.reset()
    call = CompiledCall(net, net) if "compiled" in kind else None
    found = results(net, images, call, autocast=is_half)
    return judged(found, expected, controls)


@torch.no_grad()
def moved(net):
    """A copy whose parameters differ by a rounding error."""
    net = copy.deepcopy(net)
    for parameter in net.parameters():
        parameter.mul_(1 + 1e-7 * torch.randn_like(parameter))
    return net


def judged(found, expected, controls):
    """Errors, those of the control, and whether the former are explained by the latter; a NaN is below no limit."""
    errors = {kind: relative_error(found[kind], expected[kind]) for kind in expected}
    allowed = {}
    for kind in expected:
        of_controls = [relative_error(control[kind], expected[kind]) for control in controls]
        allowed[kind] = torch.tensor(of_controls).max().item()  # Python's `max` drops NaN
    right = all(
        errors[kind] <= max(FACTOR * allowed[kind], SMALL) and allowed[kind] < 1
        for kind in expected
    )
    return right, errors, allowed
