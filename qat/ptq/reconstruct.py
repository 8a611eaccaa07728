"""Train a calibrated net block by block to give what the float net gives: weights through their rounding, biases, and all steps.

Sources: BRECQ (arXiv 2102.05426: blocks in order, step sizes of activations learned), QDrop (arXiv 2203.05740: float inputs mixed in).
Weights take LSQ's straight-through gradients (arXiv 1902.08153), not AdaRound's.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qat.errors import UsageError
from qat.model.sites import Site, iter_quantizers
from qat.ptq.runner import LOWEST_SCALE, Runner, StopForward, check_finite, find_units, patched
from qat.ptq.state import Progress
from qat.utils.probing import probing
from qat.utils.validate import check_int, check_number

_SETTING = "ptq.method='reconstruct'"
COLUMNS = ("unit", "steps", "loss_before", "loss", "seconds")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReconstructSettings:
    """The knobs of `ptq.reconstruct.*`.

    Attributes:
        steps: of Adam, in every block.
        batch: images of a step.
        lr: of weights and biases at the first step; it falls to zero along a cosine.
        scale_lr: of the logarithm of every step size.
        drop: share of the elements of a block's input that are the float net's (QDrop).
        seed: of batches and of what is mixed in.

    Raises:
        UsageError: a value that cannot work.
    """

    steps: int = 500
    batch: int = 32
    lr: float = 3e-4
    scale_lr: float = 3e-3
    drop: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        for name, lowest in (("steps", 1), ("batch", 1), ("seed", 0)):
            check_int(f"ptq.reconstruct.{name}", getattr(self, name), lowest)
        for name in ("lr", "scale_lr"):
            check_number(f"ptq.reconstruct.{name}", getattr(self, name), 0)
        check_number("ptq.reconstruct.drop", self.drop, 0, highest=1)


def split_batches(images: Tensor, batch: int) -> list[Tensor]:
    """Images (N, C, H, W) in whole batches.

    Raises:
        UsageError: they fill none.
    """
    if len(images) < batch:
        raise UsageError(
            f"ptq.reconstruct.batch={batch}: must be at most the number of calibration images, {len(images)}"
        )
    return list(images[: len(images) // batch * batch].split(batch))


def reconstruct(
    net: nn.Module,
    reference: nn.Module,
    images: Tensor,
    settings: ReconstructSettings,
    *,
    run_dir: str | Path | None = None,
    resume: bool = False,
    run: Mapping[str, Any] | None = None,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> dict[str, Any]:
    """Fit unit after unit (blocks, and quantized layers outside of them) in the order in which they run; in place.

    What a unit does at a training step is a function of the seed, the unit and the number of the step. So a run that was killed goes on
    after the last unit that was finished, to the same weights on the same machine.

    Args:
        net: converted with a `PtqRecipe`, scales filled; runs in eval mode.
        reference: the float net that it was made of, with modules of the same names, on the same device.
        images: (N, C, H, W).
        settings: of the training.
        run_dir: folder of `reconstruct.ckpt`, written after each unit, and `reconstruct.csv`; None = neither is written.
        resume: go on from `reconstruct.ckpt`, where there is one.
        run: see `Progress`.
        context: around every forward of a step, such as autocast.

    Returns:
        `units` (how many), `steps` of each, `images`, `seconds` (those before a resume too).

    Raises:
        UsageError: nothing to reconstruct, a reference that is quantized, too few images, or activations that are not finite.
    """
    device = next(net.parameters()).device
    batches = [batch.to(device) for batch in split_batches(images, settings.batch)]
    tensors = [*net.state_dict().values(), *reference.state_dict().values(), *batches]
    progress = Progress(run_dir, "ptq.reconstruct", COLUMNS, settings, tensors, run)
    state = (progress.resume() if resume else None) or {"units": [], "tensors": {}, "seconds": 0.0}
    frozen = [(p, p.requires_grad) for n in (net, reference) for p in n.parameters()]
    try:
        for parameter, _ in frozen:
            parameter.requires_grad = False
        with probing(net, []), probing(reference, []):
            units, ours, theirs = find_units(net, reference, batches, _SETTING)
            net.load_state_dict(state["tensors"], strict=False)
            done = len(state["units"])
            if done:
                log.info(
                    "reconstruction resumed after %s (%d of %d)",
                    state["units"][-1],
                    done,
                    len(units),
                )
            for number, (unit, layers) in enumerate(list(units.items())[done:], done):
                started = time.monotonic()
                before, after = _fit(ours, theirs, unit, layers, number, settings, context)
                seconds = time.monotonic() - started
                state["units"].append(unit)
                state["tensors"] |= {
                    k: v.clone() for k, v in net.state_dict().items() if k.startswith(f"{unit}.")
                }
                state["seconds"] += seconds
                progress.rows.append((
                    unit,
                    settings.steps,
                    f"{before:.6g}",
                    f"{after:.6g}",
                    f"{seconds:.1f}",
                ))
                progress.save(state)
                log.info(
                    "%d/%d %s: loss %.4g -> %.4g in %.0f s",
                    number + 1,
                    len(units),
                    unit,
                    before,
                    after,
                    seconds,
                )
    finally:
        for parameter, was in frozen:
            parameter.requires_grad_(was)
    return {
        "units": len(units),
        "steps": settings.steps,
        "images": sum(map(len, batches)),
        "seconds": round(state["seconds"], 1),
    }


def _fit(
    ours: Runner,
    theirs: Runner,
    unit: str,
    layers: list[Site],
    number: int,
    settings: ReconstructSettings,
    context: Callable[[], AbstractContextManager[Any]],
) -> tuple[float, float]:
    """Train one unit; mean loss over all batches before and after, with the quantized net's inputs."""
    goal = _goal(theirs, unit)
    spread = _spread([y for _, y in goal])
    module = ours.net.get_submodule(unit)
    scaled: list[Any] = [
        s.quantizer
        for s in iter_quantizers(ours.net)
        if s.name.startswith(f"{unit}.") and s.quantizer.n_scales
    ]

    def loss_of(i: int, generator: torch.Generator | None = None) -> Tensor:
        """Squared error of the unit's output, in units of its spread; with a generator, float inputs are mixed in."""
        float_input, target = goal[i]
        original: Callable[..., Any] = module.forward
        outputs: list[Tensor] = []

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> None:
            if generator is not None and settings.drop:
                mixed = torch.rand(x.shape, generator=generator, device=x.device) < settings.drop
                x = torch.where(mixed, float_input.to(x.dtype), x)
            outputs.append(original(x, *args, **kwargs))
            raise StopForward

        with patched({module: forward}), context(), contextlib.suppress(StopForward):
            ours(i)
        return (outputs[0].float() - target).square().mean() / spread

    @torch.no_grad()
    def mean_loss() -> float:
        return float(torch.stack([loss_of(i) for i in range(len(goal))]).mean())

    def generator(n: int, kind: int, device: torch.device | str = "cpu") -> torch.Generator:
        return torch.Generator(device).manual_seed(
            (((settings.seed * 1_000_003 + number) * 1_000_003 + n) * 2 + kind) % 2**64
        )

    def loss_at(step: int) -> Tensor:
        """On a batch and a mixture that are functions of seed, unit and step."""
        turn, position = divmod(step, len(goal))
        i = int(torch.randperm(len(goal), generator=generator(turn, 1))[position])
        return loss_of(i, generator(step, 0, goal[i][0].device))

    with ours.at(unit), torch.enable_grad():
        before = mean_loss()
        _train(scaled, layers, settings, loss_at)
        after = mean_loss()
    if not math.isfinite(after):
        raise UsageError(
            f"{_SETTING}: the loss of {unit} is {after}; must be a smaller ptq.reconstruct.lr or scale_lr"
        )
    return before, after


def _goal(theirs: Runner, unit: str) -> list[tuple[Tensor, Tensor]]:
    """Input and output of the float unit for each batch."""
    goal = []
    with theirs.at(unit):
        for i in range(len(theirs.batches)):
            args, output = theirs.output(unit, i)
            if not (args and isinstance(args[0], Tensor) and isinstance(output, Tensor)):
                raise UsageError(
                    f"{_SETTING}: {unit} does not map a tensor to a tensor; must be compensate or calibrate"
                )
            check_finite(args[0], unit, _SETTING)
            check_finite(output, unit, _SETTING)
            goal.append((args[0], output))
    return goal


def _train(
    scaled: list[Any],
    layers: list[Site],
    settings: ReconstructSettings,
    loss_at: Callable[[int], Tensor],
) -> None:
    """All steps; the step sizes are exp of what is learned times where they began."""
    starts = [quantizer.scale.clone() for quantizer in scaled]
    changes = [torch.zeros_like(start, requires_grad=True) for start in starts]
    owners = dict.fromkeys(site.owner for site in layers)
    weights = [p.requires_grad_() for owner in owners for p in owner.parameters(recurse=False)]
    adam = torch.optim.Adam([
        {"params": weights, "lr": settings.lr},
        {"params": changes, "lr": settings.scale_lr},
    ])
    cosine = torch.optim.lr_scheduler.LambdaLR(
        adam, lambda step: (1 + math.cos(math.pi * step / settings.steps)) / 2
    )
    buffers = [quantizer._buffers["scale"] for quantizer in scaled]

    def scales() -> list[Tensor]:
        return [
            (start * change.exp()).clamp(min=LOWEST_SCALE)
            for start, change in zip(starts, changes, strict=True)
        ]

    try:
        for step in range(settings.steps):
            for quantizer, scale in zip(scaled, scales(), strict=True):
                quantizer._buffers["scale"] = scale
            loss = loss_at(step)
            adam.zero_grad()
            loss.backward()
            adam.step()
            cosine.step()
    finally:
        for quantizer, buffer in zip(scaled, buffers, strict=True):
            quantizer._buffers["scale"] = buffer
        for weight in weights:
            weight.requires_grad = False
            weight.grad = None
    for quantizer, scale in zip(scaled, scales(), strict=True):
        quantizer.set_scale(scale.detach())


def _spread(values: Sequence[Tensor]) -> float:
    """Mean square about the mean, of all values; for none that differ, 1."""
    total, n = sum(float(v.double().sum()) for v in values), sum(v.numel() for v in values)
    square = sum(float(v.double().square().sum()) for v in values) / n - (total / n) ** 2
    return square if square > 0 else 1.0
