"""Train a calibrated net block by block to give what the float net gives: weights through their rounding, biases, and all steps.

Sources: BRECQ (arXiv 2102.05426: blocks in order, activations' steps learned), QDrop (arXiv 2203.05740: float inputs mixed in), and the
later output beside the block's own, as GLF-Q has it. Weights take LSQ's straight-through gradients (arXiv 1902.08153), not AdaRound's.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from qat.errors import UsageError
from qat.model.sites import iter_quantizers
from qat.ptq.patching import Enough, Forward, patched
from qat.ptq.state import SearchFiles, fingerprint
from qat.ptq.units import Runner, Unit, check_finite, find_units
from qat.ptq.vector import stored_scale
from qat.quantizers import Quantizer
from qat.utils.probing import probing
from qat.utils.validate import check_int, check_number

_SETTING = "ptq.method='reconstruct'"
STATE_NAME = "reconstruct"
COLUMNS = ("unit", "steps", "loss_before", "loss", "seconds")
_LOWEST_SCALE = torch.finfo(torch.float32).eps
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
        later: weight of the error of the net's output, with all blocks behind in float, beside that of the block's own output.
        seed: of batches and of what is mixed in.

    Raises:
        UsageError: a value that cannot work.
    """

    steps: int = 500
    batch: int = 32
    lr: float = 3e-4
    scale_lr: float = 3e-3
    drop: float = 0.5
    later: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, lowest in (("steps", 1), ("batch", 1), ("seed", 0)):
            check_int(f"ptq.reconstruct.{name}", getattr(self, name), lowest)
        for name in ("lr", "scale_lr", "later"):
            check_number(f"ptq.reconstruct.{name}", getattr(self, name), 0)
        check_number("ptq.reconstruct.drop", self.drop, 0, highest=1)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@dataclass
class ReconstructState:
    """A reconstruction between two units.

    Attributes:
        units: names of those that are done.
        tensors: their weights, biases and scales, by name in the net.
        lines: of `reconstruct.csv`, its header not counted.
        seconds: taken so far, runs before a resume too.
    """

    units: list[str] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    lines: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Reconstructed:
    """What was done.

    Attributes:
        units: number of blocks, and of quantized layers outside of them.
        steps: of each.
        images: that the steps drew from.
        seconds: all of it, runs before a resume too.
    """

    units: int
    steps: int
    images: int
    seconds: float


def split_batches(images: Tensor, batch: int) -> list[Tensor]:
    """Images (N, C, H, W) in whole batches.

    Raises:
        UsageError: they fill none.
    """
    if len(images) < batch:
        raise UsageError(f"ptq.reconstruct.batch={batch}: must be at most the number of calibration images, {len(images)}")
    return list(images[: len(images) // batch * batch].split(batch))


def reconstruct(
    net: nn.Module,
    reference: nn.Module,
    images: Tensor,
    settings: ReconstructSettings,
    *,
    run_dir: str | Path | None = None,
    resume: bool = False,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Reconstructed:
    """Fit unit after unit (blocks, and quantized layers outside of them) in the order in which they run; in place.

    What a unit does at a step is a function of the seed, the unit and the number of the step. So a run that was killed goes on behind the
    last unit that was finished, to the same weights on the same machine.

    Args:
        net: converted with a `PtqRecipe`, scales filled; runs in eval mode.
        reference: the float net that it was made of, with modules of the same names, on the same device.
        images: (N, C, H, W).
        settings: of the training.
        run_dir: folder of `reconstruct.ckpt`, written behind each unit, and `reconstruct.csv`; None = neither is written.
        resume: go on from `reconstruct.ckpt`, where there is one.
        context: around every forward of a step, such as autocast.

    Raises:
        UsageError: nothing to reconstruct, too few images, or activations that are not finite.
    """
    device = next(net.parameters()).device
    batches = [batch.to(device) for batch in split_batches(images, settings.batch)]
    frozen = [(p, p.requires_grad) for n in (net, reference) for p in n.parameters()]
    try:
        for parameter, _ in frozen:
            parameter.requires_grad = False
        with probing(net, []), probing(reference, []):
            return _Reconstruction(net, reference, batches, settings, context).run(run_dir, resume=resume)
    finally:
        for parameter, was in frozen:
            parameter.requires_grad_(was)


class _Reconstruction:
    def __init__(
        self,
        net: nn.Module,
        reference: nn.Module,
        batches: list[Tensor],
        settings: ReconstructSettings,
        context: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.net, self.settings, self.context, self.batches = net, settings, context, batches
        self.inputs = fingerprint([*net.state_dict().values(), *reference.state_dict().values(), *batches])
        self.units = find_units(net, batches[0][:1], _SETTING)
        names = [unit.name for unit in self.units]
        self.runner, self.reference = Runner(net, names, batches), Runner(reference, names, batches)
        self.later = [_joined(reference(batch)) for batch in batches]
        for logits in self.later:
            check_finite(logits, "the float net", _SETTING)

    def run(self, run_dir: str | Path | None, *, resume: bool) -> Reconstructed:
        """All units that are not done yet."""
        files = None if run_dir is None else self._files(Path(run_dir))
        state = (files.read() if files is not None and resume else None) or ReconstructState()
        self.net.load_state_dict(state.tensors, strict=False)
        if files is not None:
            files.start_log(state.lines)
        if state.units:
            log.info("reconstruction resumed behind %s (%d of %d)", state.units[-1], len(state.units), len(self.units))
        began, ran = time.monotonic(), 0
        for number, unit in enumerate(self.units[len(state.units) :], len(state.units)):
            started = time.monotonic()
            before, after = self._fit(unit, number)
            seconds, ran = time.monotonic() - started, ran + 1
            state.units.append(unit.name)
            state.tensors |= {k: v.clone() for k, v in self.net.state_dict().items() if k.startswith(f"{unit.name}.")}
            state.lines, state.seconds = state.lines + 1, state.seconds + seconds
            if files is not None:
                files.log([(unit.name, self.settings.steps, f"{before:.6g}", f"{after:.6g}", f"{seconds:.1f}")])
                files.write(state)
            left = (time.monotonic() - began) / ran * (len(self.units) - number - 1)
            log.info("%d/%d %s: loss %.4g -> %.4g, about %.0f s left", number + 1, len(self.units), unit.name, before, after, left)
        return Reconstructed(len(self.units), self.settings.steps, sum(map(len, self.batches)), round(state.seconds, 1))

    def _files(self, folder: Path) -> SearchFiles:
        names = {"name": STATE_NAME, "setting": "ptq.reconstruct"}
        return SearchFiles(folder, self.settings, self.inputs, ReconstructState, COLUMNS, **names)

    def _fit(self, unit: Unit, number: int) -> tuple[float, float]:
        """Train one unit; mean loss over all batches before and after, with the quantized net's inputs."""
        with self.reference.at(unit.name):
            goal = [self._pair(i, unit) for i in range(len(self.batches))]
        job = _Unit(self, unit, number, goal)
        with self.runner.at(unit.name), patched(job.floats), torch.enable_grad():
            before = job.measure()
            job.train()
            after = job.measure()
        if not math.isfinite(after):
            raise UsageError(f"{_SETTING}: the loss of {unit.name} is {after}; must be a smaller ptq.reconstruct.lr or scale_lr")
        return before, after

    def _pair(self, i: int, unit: Unit) -> tuple[Tensor, Tensor]:
        """What enters and leaves a unit of the float net."""
        args, output = self.reference.output(unit.name, i)
        if not (args and isinstance(args[0], Tensor) and isinstance(output, Tensor)):
            raise UsageError(f"{_SETTING}: {unit.name} does not map a tensor to a tensor; must be compensate or calibrate")
        check_finite(args[0], unit.name, _SETTING)
        check_finite(output, unit.name, _SETTING)
        return args[0], output


class _Unit:
    """One unit while it is trained.

    Attributes:
        floats: stand-ins for the quantizers behind the unit.
    """

    def __init__(self, whole: _Reconstruction, unit: Unit, number: int, goal: list[tuple[Tensor, Tensor]]) -> None:
        self.whole, self.number, self.goal, self.settings = whole, number, goal, whole.settings
        self.module = whole.net.get_submodule(unit.name)
        own = [site.quantizer for site in iter_quantizers(whole.net) if site.name.startswith(f"{unit.name}.")]
        order = whole.runner.order
        later = [s for s in iter_quantizers(whole.net) if order.get(s.name, math.inf) > order[unit.name] and s.quantizer not in set(own)]
        self.floats: dict[nn.Module, Forward] = {site.quantizer: _unchanged for site in later}
        self.scaled = [quantizer for quantizer in own if stored_scale(quantizer) is not None]
        layers = dict.fromkeys(site.owner for site in unit.layers)
        self.weights = [p for layer in layers for p in layer.parameters(recurse=False)]
        self.spread = (_spread([y for _, y in goal]), _spread(whole.later))

    def train(self) -> None:
        """All steps; the step sizes are exp of what is learned times where they began."""
        starts = [quantizer.scale.clone() for quantizer in self.scaled]  # type: ignore[operator]
        changes = [torch.zeros_like(start, requires_grad=True) for start in starts]
        weights, settings = [w.requires_grad_() for w in self.weights], self.settings
        groups = [{"params": weights, "lr": settings.lr}, {"params": changes, "lr": settings.scale_lr}]
        adam = torch.optim.Adam([group for group in groups if group["params"]])
        cosine = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: (1 + math.cos(math.pi * step / settings.steps)) / 2)
        try:
            for step in range(settings.steps):
                with _learning(self.scaled, starts, changes):
                    loss = self._loss(*self._drawn(step))
                    adam.zero_grad()
                    loss.backward()
                adam.step()
                cosine.step()
        finally:
            for weight in weights:
                weight.requires_grad = False
                weight.grad = None
        for quantizer, start, change in zip(self.scaled, starts, changes, strict=True):
            quantizer.set_scale((start * change.detach().exp()).clamp(min=_LOWEST_SCALE))

    @torch.no_grad()
    def measure(self) -> float:
        """Mean loss over all batches; nothing is mixed in."""
        return float(torch.stack([self._loss(i, None) for i in range(len(self.goal))]).mean())

    def _drawn(self, step: int) -> tuple[int, torch.Generator]:
        """Which batch, and the generator of what is mixed in: functions of seed, unit and step."""
        count = len(self.goal)
        generator = torch.Generator().manual_seed(self._seed(step // count, 1))
        batch = int(torch.randperm(count, generator=generator)[step % count])
        x = self.goal[batch][0]
        return batch, torch.Generator(x.device).manual_seed(self._seed(step, 0))

    def _seed(self, n: int, kind: int) -> int:
        return ((self.settings.seed * 1_000_003 + self.number) * 1_000_003 + n) * 2 + kind

    def _loss(self, i: int, generator: torch.Generator | None) -> Tensor:
        """Squared error of the unit's output and of the net's, each in units of its spread."""
        float_input, target = self.goal[i]
        original: Callable[..., Any] = self.module.forward
        outputs: list[Tensor] = []

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if generator is not None and self.settings.drop:
                mixed = torch.rand(x.shape, generator=generator, device=x.device) < self.settings.drop
                x = torch.where(mixed, float_input.to(x.dtype), x)
            outputs.append(original(x, *args, **kwargs))
            if not self.settings.later:
                raise Enough
            return outputs[-1]

        output = None
        with patched({self.module: forward}), self.whole.context(), contextlib.suppress(Enough):
            output = self.whole.runner(i)
        loss = (outputs[0].float() - target).square().mean() / self.spread[0]
        if output is None:
            return loss
        return loss + self.settings.later * (_joined(output) - self.whole.later[i]).square().mean() / self.spread[1]


@contextlib.contextmanager
def _learning(quantizers: Sequence[Quantizer], starts: Sequence[Tensor], changes: Sequence[Tensor]) -> Generator[None]:
    """While it lasts, the scales are functions of what is learned; their buffers are back afterwards."""
    buffers = [quantizer._buffers["scale"] for quantizer in quantizers]
    try:
        for quantizer, start, change in zip(quantizers, starts, changes, strict=True):
            quantizer._buffers["scale"] = (start * change.exp()).clamp(min=_LOWEST_SCALE)
        yield
    finally:
        for quantizer, buffer in zip(quantizers, buffers, strict=True):
            quantizer._buffers["scale"] = buffer


def _joined(output: Any) -> Tensor:
    """Logits (B, K), or the maps of a backbone, (B, all of them), float32."""
    return torch.cat([part.float().flatten(1) for part in tree_leaves(output)], 1)


def _spread(values: Sequence[Tensor]) -> float:
    """Mean square about the mean, of all values; for none that differ, 1."""
    total, n = sum(float(v.double().sum()) for v in values), sum(v.numel() for v in values)
    square = sum(float(v.double().square().sum()) for v in values) / n - (total / n) ** 2
    return square if square > 0 else 1.0


def _unchanged(x: Tensor) -> Tensor:
    return x
