"""Train a calibrated net block by block to reproduce the outputs of the float net.

Weights, biases and all step sizes are trained. Weights are trained with LSQ's straight-through
gradients (arXiv 1902.08153), not with AdaRound.

Sources: BRECQ (arXiv 2102.05426) for the order of the blocks and the learned step sizes of
activations; QDrop (arXiv 2203.05740) for random input elements that come from the float net.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qat.errors import UsageError
from qat.model.sites import Site, iter_quantizers
from qat.ptq.runner import (
    MIN_SCALE,
    Runner,
    StopForward,
    check_unit_finite,
    find_units,
    patch_forwards,
)
from qat.ptq.state import Progress
from qat.utils.probing import probing
from qat.utils.validate import check_int, check_number

_SETTING = "ptq.method='reconstruct'"
COLUMNS = ("unit", "steps", "loss_before", "loss", "seconds")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReconstructSettings:
    """Settings of `ptq.reconstruct.*`.

    Attributes:
        steps: number of training steps of each unit (a block, or a layer outside blocks), with
            Adam.
        batch: number of images in a training step.
        lr: initial learning rate of weights and biases.
        scale_lr: initial learning rate of the logarithm of step sizes. Both learning rates fall to
            zero along a cosine.
        drop: fraction of the elements of a unit's input that come from the float net (QDrop).
        seed: seed for the order of batches and for the choice of elements from the float net.

    Raises:
        UsageError: a value is out of range.
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
    """Split images (N, C, H, W) into batches of `batch` images; the remaining images are dropped.

    Raises:
        UsageError: there are too few images for one batch.
    """
    if len(images) < batch:
        raise UsageError(
            f"ptq.reconstruct.batch={batch}: must be at most the number of calibration images, "
            f"{len(images)}"
        )
    num_batches = len(images) // batch
    return list(images[: num_batches * batch].split(batch))


@contextlib.contextmanager
def _disable_gradients(*nets: nn.Module) -> Generator[None]:
    """Switch gradients off for all parameters of the nets; code inside may switch some on again."""
    flags = [(p, p.requires_grad) for net in nets for p in net.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad = False
        yield
    finally:
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)


def reconstruct(
    net: nn.Module,
    float_net: nn.Module,
    images: Tensor,
    settings: ReconstructSettings,
    *,
    run_dir: str | Path | None = None,
    resume: bool = False,
    run: Mapping[str, Any] | None = None,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> dict[str, Any]:
    """Fit the units that `find_units` finds (blocks and other layers) in place, one by one.

    Units are fitted in the order in which they run. The random numbers of a training step depend
    only on the seed, the unit and the number of the step. With `resume`, a killed run therefore
    starts after the last finished unit, and ends with the same weights on the same machine.

    Args:
        net: a net converted with a `PtqRecipe`, whose scales are set; it runs in eval mode.
        float_net: the float net before conversion, with the same module names, on the same device.
        images: (N, C, H, W), in the dtype of the net.
        settings: settings of the reconstruction.
        run_dir: folder of `reconstruct.ckpt` and `reconstruct.csv`, written after each unit; None =
            write no files.
        resume: resume from `reconstruct.ckpt`, if the file exists.
        run: settings of the whole run; see `Progress`.
        context: returns a context manager for each forward of a unit, such as autocast.

    Returns:
        A dict: `units` (number of units), `steps` (training steps per unit), `images` (number of
        images), `seconds` (duration, including runs before a resume).

    Raises:
        UsageError: there is no unit to reconstruct, a unit does not map a tensor to a tensor, the
            float net is quantized, there are too few images, activations or a loss are not finite,
            or `reconstruct.ckpt` belongs to other settings or inputs.
    """
    device = next(net.parameters()).device
    batches = [batch.to(device) for batch in split_batches(images, settings.batch)]
    tensors = [*net.state_dict().values(), *float_net.state_dict().values(), *batches]
    progress = Progress(run_dir, "ptq.reconstruct", COLUMNS, settings, tensors, run)
    state = progress.resume() if resume else None
    if state is None:
        state = {"units": [], "tensors": {}, "seconds": 0.0}
    with _disable_gradients(net, float_net), probing(net, []), probing(float_net, []):
        units, runner, float_runner = find_units(net, float_net, batches, _SETTING)
        net.load_state_dict(state["tensors"], strict=False)
        num_finished = len(state["units"])
        if num_finished:
            log.info(
                "reconstruction resumed after %s (%d of %d)",
                state["units"][-1],
                num_finished,
                len(units),
            )
        for unit_index, (unit, layers) in enumerate(units.items()):
            if unit_index < num_finished:
                continue
            start_time = time.monotonic()
            loss_before, loss_after = _fit_unit(
                runner, float_runner, unit, layers, unit_index, settings, context
            )
            seconds = time.monotonic() - start_time
            state["units"].append(unit)
            for name, tensor in net.state_dict().items():
                if name.startswith(f"{unit}."):
                    state["tensors"][name] = tensor.clone()
            state["seconds"] += seconds
            losses = (f"{loss_before:.6g}", f"{loss_after:.6g}")
            progress.rows.append((unit, settings.steps, *losses, f"{seconds:.1f}"))
            progress.save(state)
            log.info(
                "%d/%d %s: loss %.4g -> %.4g in %.0f s",
                unit_index + 1,
                len(units),
                unit,
                loss_before,
                loss_after,
                seconds,
            )
    return {
        "units": len(units),
        "steps": settings.steps,
        "images": sum(map(len, batches)),
        "seconds": round(state["seconds"], 1),
    }


def _fit_unit(
    runner: Runner,
    float_runner: Runner,
    unit: str,
    layers: list[Site],
    unit_index: int,
    settings: ReconstructSettings,
    context: Callable[[], AbstractContextManager[Any]],
) -> tuple[float, float]:
    """Train one unit; return its mean loss on inputs of the quantized net before and after.

    Args:
        runner: runner of the quantized net.
        float_runner: runner of the float net.
        unit: name of the unit.
        layers: sites of the quantized weights of the unit.
        unit_index: index of the unit, on which the random numbers depend.
        settings: settings of the reconstruction.
        context: returns a context manager for each forward.
    """
    float_pairs = _float_pairs(float_runner, unit)
    variance = _variance([target for _, target in float_pairs])
    module = runner.net.get_submodule(unit)
    scale_quantizers: list[Any] = []
    for site in iter_quantizers(runner.net):
        if site.name.startswith(f"{unit}.") and site.quantizer.num_stored_scales:
            scale_quantizers.append(site.quantizer)

    def batch_loss(i: int, generator: torch.Generator | None = None) -> Tensor:
        """Squared error of the output for batch `i`, relative to the variance in the float net.

        With a generator, random elements of the input are replaced by elements from the float net.
        """
        float_input, target = float_pairs[i]
        original: Callable[..., Any] = module.forward
        outputs: list[Tensor] = []

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> None:
            if generator is not None and settings.drop:
                is_float = torch.rand(x.shape, generator=generator, device=x.device) < settings.drop
                x = torch.where(is_float, float_input.to(x.dtype), x)
            outputs.append(original(x, *args, **kwargs))
            raise StopForward

        with patch_forwards({module: forward}), context(), contextlib.suppress(StopForward):
            runner(i)
        return (outputs[0].float() - target).square().mean() / variance

    @torch.no_grad()
    def mean_loss() -> float:
        return float(torch.stack([batch_loss(i) for i in range(len(float_pairs))]).mean())

    def make_generator(n: int, stream: int, device: torch.device | str = "cpu") -> torch.Generator:
        """Generator for the elements of step n (stream 0) or the order of epoch n (stream 1)."""
        seed = ((settings.seed * 1_000_003 + unit_index) * 1_000_003 + n) * 2 + stream
        return torch.Generator(device).manual_seed(seed % 2**64)

    def step_loss(step: int) -> Tensor:
        """Loss of a training step, whose batch and random numbers depend on seed, unit and step."""
        epoch, position = divmod(step, len(float_pairs))
        order = torch.randperm(len(float_pairs), generator=make_generator(epoch, 1))
        i = int(order[position])
        return batch_loss(i, make_generator(step, 0, float_pairs[i][0].device))

    with runner.at(unit), torch.enable_grad():
        loss_before = mean_loss()
        _train(scale_quantizers, layers, settings, step_loss)
        loss_after = mean_loss()
    if not math.isfinite(loss_after):
        raise UsageError(
            f"{_SETTING}: the loss of {unit} is {loss_after} after training; use a smaller "
            "ptq.reconstruct.lr or ptq.reconstruct.scale_lr"
        )
    return loss_before, loss_after


def _float_pairs(float_runner: Runner, unit: str) -> list[tuple[Tensor, Tensor]]:
    """The input and the output of the unit in the float net, for each batch."""
    float_pairs = []
    with float_runner.at(unit):
        for i in range(len(float_runner.batches)):
            args, output = float_runner.output(unit, i)
            if not args or not isinstance(args[0], Tensor) or not isinstance(output, Tensor):
                raise UsageError(
                    f"{_SETTING}: must be compensate or calibrate for this model, because {unit} "
                    "does not map a tensor to a tensor"
                )
            check_unit_finite(args[0], unit, _SETTING)
            check_unit_finite(output, unit, _SETTING)
            float_pairs.append((args[0], output))
    return float_pairs


def _train(
    scale_quantizers: list[Any],
    layers: list[Site],
    settings: ReconstructSettings,
    step_loss: Callable[[int], Tensor],
) -> None:
    """Run all training steps.

    A step size is its initial value times exp(c), but at least `MIN_SCALE`. The log change c is
    learned.
    """
    initial_scales = [quantizer.scale.clone() for quantizer in scale_quantizers]
    log_changes = [
        torch.zeros_like(initial_scale, requires_grad=True) for initial_scale in initial_scales
    ]
    owners = dict.fromkeys(site.owner for site in layers)
    weights: list[Tensor] = []
    for owner in owners:
        weights += [parameter.requires_grad_() for parameter in owner.parameters(recurse=False)]
    adam = torch.optim.Adam([
        {"params": weights, "lr": settings.lr},
        {"params": log_changes, "lr": settings.scale_lr},
    ])

    def cosine_factor(step: int) -> float:
        return (1 + math.cos(math.pi * step / settings.steps)) / 2

    schedule = torch.optim.lr_scheduler.LambdaLR(adam, cosine_factor)
    buffers = [quantizer._buffers["scale"] for quantizer in scale_quantizers]

    def learned_scales() -> list[Tensor]:
        scales = []
        for initial_scale, log_change in zip(initial_scales, log_changes, strict=True):
            scales.append((initial_scale * log_change.exp()).clamp(min=MIN_SCALE))
        return scales

    try:
        for step in range(settings.steps):
            for quantizer, scale in zip(scale_quantizers, learned_scales(), strict=True):
                quantizer._buffers["scale"] = scale
            loss = step_loss(step)
            adam.zero_grad()
            loss.backward()
            adam.step()
            schedule.step()
    finally:
        for quantizer, buffer in zip(scale_quantizers, buffers, strict=True):
            quantizer._buffers["scale"] = buffer
        for weight in weights:
            weight.requires_grad = False
            weight.grad = None
    for quantizer, scale in zip(scale_quantizers, learned_scales(), strict=True):
        quantizer.set_scale(scale.detach())


def _variance(tensors: Sequence[Tensor]) -> float:
    """Variance of the values of all tensors; 1 if all values are equal."""
    count = sum(tensor.numel() for tensor in tensors)
    total = sum(float(tensor.double().sum()) for tensor in tensors)
    total_square = sum(float(tensor.double().square().sum()) for tensor in tensors)
    variance = total_square / count - (total / count) ** 2
    if variance > 0:
        return variance
    return 1.0
