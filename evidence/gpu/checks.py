"""Whether all ways of running a net give the same logits and gradients: errors as |found - expected| / |expected|.

A value that lies halfway between codes goes to either side, and takes all that depends on it along, so every error stands beside that of a
control: the expected way of running with parameters that differ by a rounding error, the worst of several such nets, as some meet a value
halfway between codes and others do not; or in bfloat16 autocast instead of float32. Kernels and fused Functions do the same operations, so
nothing changes forward.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from evidence.gpu.kernels import relative_error
from evidence.gpu.nets import build, images_of
from evidence.gpu.records import Row
from evidence.step_arms import ARMS
from qat import kernels
from qat.lit.compiled import CompiledCall
from qat.model.decay import quantizer_parameters

# At two bits a net of random weights gives something else for every rounding error, so that nothing could be told from it.
MODEL, DEPTH, BATCH, BITS = "deit_tiny_patch16_224", 2, 16, 8
KINDS = ("kernels", "fused", "device", "compiled", "compiled bfloat16")
# Errors that rounding explains; by how much more than the control's one may be.
SMALL, FACTOR, CONTROLS = 1e-5, 3.0, 8
Found = dict[str, Tensor]


class Apart(TorchFunctionMode):
    """Somebody who watches torch's functions: quantizers and products then run one after the other."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Changes nothing."""
        return func(*args, **(kwargs or {}))


def results(net: nn.Module, images: Tensor, call: Callable[[Tensor], Tensor] | None = None, *, autocast: bool = False) -> Found:
    """Logits, and gradients of their mean square by the weights and by scales and offsets."""
    net.zero_grad()
    with torch.autocast(images.device.type, torch.bfloat16) if autocast else contextlib.nullcontext():
        logits = (net if call is None else call)(images)
    logits.float().square().mean().backward()
    steps = set().union(*quantizer_parameters(net))
    found = {"logits": logits.detach().float()}
    for kind, members in (("weights", set(net.parameters()) - steps), ("scales", steps)):
        gradients = [p.grad.flatten() for p in net.parameters() if p in members and p.grad is not None]
        if gradients:
            found[kind] = torch.cat(gradients)
    return {kind: x.cpu() for kind, x in found.items()}


@torch.no_grad()
def moved(net: nn.Module) -> nn.Module:
    """A copy whose parameters differ by a rounding error."""
    net = copy.deepcopy(net)
    for parameter in net.parameters():
        parameter.mul_(1 + 1e-7 * torch.randn_like(parameter))
    return net


def names(*, dry_run: bool) -> list[str]:
    """Of all checks: the ways of running that an arm has."""
    arms = ["ofq"] if dry_run else [arm for arm, settings in ARMS.items() if settings.knobs is not None and not settings.teacher]
    return [f"{kind}, {arm}" for kind in KINDS for arm in arms]


class Checks:
    """Runs one check at a time.

    Args:
        dry_run: a tiny net on the CPU, without the compiler.
    """

    def __init__(self, *, dry_run: bool) -> None:
        self.dry_run = dry_run
        self.device = torch.device("cpu" if dry_run else "cuda")
        self.batch = 2 if dry_run else BATCH

    def check(self, name: str) -> Row:
        """Errors of what `names` calls it, and of its control."""
        kind, _, arm = name.partition(", ")
        images = images_of(self.batch, self.device, tiny=self.dry_run)
        net = build(MODEL, arm, images, tiny=self.dry_run, bits=BITS, **({} if self.dry_run else {"depth": DEPTH}))
        kernels.use("off" if kind in {"device", "kernels"} else "auto")
        expected = results(net, images)
        is_half = kind == "compiled bfloat16"
        controls = [results(net if is_half else moved(net), images, autocast=is_half) for _ in range(1 if is_half else CONTROLS)]
        return self._judged(self._found(kind, net, images), expected, controls)

    def _found(self, kind: str, net: nn.Module, images: Tensor) -> Found:
        if kind == "kernels":
            kernels.use("auto" if self.dry_run else "triton")
            return results(net, images)
        if kind == "fused":
            with Apart():
                return results(net, images)
        if kind == "device":
            return results(net.cpu(), images.cpu())
        torch._dynamo.reset()
        call = None if self.dry_run else CompiledCall(net, net)
        return results(net, images, call, autocast="bfloat16" in kind)

    @staticmethod
    def _judged(found: Found, expected: Found, controls: list[Found]) -> Row:
        errors = {kind: relative_error(found[kind], expected[kind]) for kind in expected}
        # Not Python's `max`, which drops NaN.
        allowed = {k: torch.tensor([relative_error(control[k], expected[k]) for control in controls]).max().item() for k in expected}
        # A NaN is below no limit.
        right = all(errors[kind] <= max(FACTOR * allowed[kind], SMALL) and allowed[kind] < 1 for kind in expected)
        return {"errors": errors, "control": allowed, "right": right}
