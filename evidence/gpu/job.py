"""One run on CIFAR-10: a float net from the beginning, or a quantized one from the float net of its seed, which is its teacher.

Behind every epoch the state of the run is kept, so that one which was killed goes on as if it had not been: order and augmentation are
functions of seed and epoch, nothing else is random. The net of the epoch that is best on validation is tested, once.
"""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import qat
from evidence.gpu.cifar import CLASSES, SIZE, Cifar
from evidence.gpu.plan import Run
from evidence.gpu.records import Row, append, commit
from qat.functional.confidence import near_threshold
from qat.lit.compiled import compile_in_place
from qat.lit.optim import build_optimizer, cosine_schedule
from qat.lit.teacher import Teacher
from qat.losses import CompositeLoss, CrossEntropy, Distillation, StepContext
from qat.model.entry_freezer import EntryFreezer
from qat.nn.execution import kept_weights
from qat.quantizers import StatsQ
from qat.utils.files import read_torch, write_torch

NET = {"img_size": SIZE, "patch_size": 4, "num_classes": CLASSES}
TINY = {"embed_dim": 24, "depth": 1, "num_heads": 3}
EVAL_BATCH, CALIBRATION = 1000, 128
# Float nets train from the beginning with shifts; quantized ones at half the rate without, as those of docs/results.md do.
FLOAT_LR, LR, WEIGHT_DECAY, SHIFT, WARM_UP, TEMPERATURE = 1e-3, 5e-4, 0.05, 4, 0.05, 4.0
# As conf/callbacks/cga.yaml has it.
CGA_SHARE, CGA_LR, CGA_BAND = 0.1, 1e-5, 0.005


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all runs share.

    Attributes:
        out: JSON lines.
        data: the tensors of `cifar.prepare`.
        epochs: of a quantized run.
        float_epochs: of a float run.
        batch: images.
        dry_run: tiny nets on the CPU, without the compiler.
    """

    out: Path
    data: Path
    epochs: int
    float_epochs: int
    batch: int
    dry_run: bool

    @property
    def annealed_from(self) -> int:
        """The first epoch of annealing."""
        return self.epochs - math.ceil(CGA_SHARE * self.epochs)

    def file(self, name: str, kind: str) -> Path:
        """Where a run's `state` is kept, its state at the `branch` where annealing begins, or its `best` net."""
        return self.out.parent / "runs" / f"{name.replace(' ', '-')}.{kind}"


class Job:
    """Trains a run, or goes on with it.

    Args:
        run: which.
        setting: of all.
    """

    def __init__(self, run: Run, setting: Setting) -> None:
        self.run, self.setting = run, setting
        self.device = torch.device("cpu" if setting.dry_run else "cuda")
        self.data = Cifar(setting.data, self.device)
        self.epochs = setting.float_epochs if run.knobs is None else setting.epochs
        self.net, self.teacher = self._nets()
        lr = FLOAT_LR if run.knobs is None else LR
        self.optimizer = build_optimizer(self.net, lr=lr, weight_decay=WEIGHT_DECAY, fused=True)
        steps = self.epochs * (len(self.data.parts["train"][0]) // setting.batch)
        warm_up = int(WARM_UP * steps) if run.knobs is None else 0
        self.schedule = cosine_schedule(self.optimizer, periods=steps, warmup=warm_up, interval="step")
        self.loss = CompositeLoss({"ce": CrossEntropy()} if self.teacher is None else {"kd": Distillation(temperature=TEMPERATURE)})
        self.freezer = EntryFreezer()
        self.freezer.attach([self.optimizer])

    def _nets(self) -> tuple[nn.Module, Teacher | None]:
        torch.manual_seed(self.run.seed)
        net = self._float_net()
        if self.run.knobs is None:
            self._compile(net)
            return net, None
        trained = read_torch(self.setting.file(f"float seed{self.run.seed}", "best"), map_location=self.device)
        net.load_state_dict(trained)
        teacher = self._float_net()
        teacher.load_state_dict(trained)
        qat.convert(net, qat.recipe("ofq", **dict(self.run.knobs)), input_size=(3, SIZE, SIZE))
        images, _ = next(self.data.batches("train", CALIBRATION))
        qat.initialize_scales(net, [images])
        self._compile(net)
        self._compile(teacher)
        return net, Teacher(teacher)

    def _float_net(self) -> nn.Module:
        return timm.create_model("deit_tiny_patch16_224", **NET, **(TINY if self.setting.dry_run else {})).to(self.device)

    def _compile(self, net: nn.Module) -> None:
        """One graph that all blocks share: whole nets take three times as long to compile, a large part of a short run."""
        for block in () if self.setting.dry_run else net.blocks:
            compile_in_place(block)

    def train(self, until: float) -> Row:
        """Go on up to the end, or while there is time for one epoch more.

        Args:
            until: by `time.monotonic`.
        """
        state = self._restored()
        first, seconds = state["epoch"], 0.0
        for epoch in range(first, self.epochs):
            if time.monotonic() + seconds > until:
                return {"stopped": epoch}
            began = time.monotonic()
            loss = self._epoch(epoch)
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss of epoch {epoch} is {loss}")
            val = self._accuracy("val")
            seconds = time.monotonic() - began
            if val > state["best_val"]:
                state |= {"best_val": val, "best_epoch": epoch, "best": {k: v.clone() for k, v in self.net.state_dict().items()}}
            self._save(state, epoch + 1)
            row = {"variant": self.run.variant, "seed": self.run.seed, "epoch": epoch, "val": val, "loss": loss, "seconds": seconds}
            append(self.setting.out, row)
            if epoch < first + 2:  # the first one compiles
                print(f"{self.run.name}: epoch {epoch + 1} of {self.epochs}, {seconds:.1f} s, validation {val:.2f}", flush=True)
        return self._finished(state)

    def _restored(self) -> dict[str, Any]:
        own, fresh = self.setting.file(self.run.name, "state"), {"epoch": 0, "best_val": -1.0, "best_epoch": -1, "best": {}}
        if not own.exists() and self.run.branch_of:
            own = self.setting.file(self.run.needs, "branch")
        if not own.exists():
            return fresh
        state = read_torch(own, map_location=self.device)
        self.net.load_state_dict(state.pop("net"))
        self.optimizer.load_state_dict(state.pop("optimizer"))
        return state

    def _save(self, state: dict[str, Any], epoch: int) -> None:
        state["epoch"] = epoch
        whole = {**state, "net": self.net.state_dict(), "optimizer": self.optimizer.state_dict()}
        write_torch(self.setting.file(self.run.name, "state"), whole)
        if epoch == self.setting.annealed_from and self.run.knobs is not None and not self.run.branch_of:
            write_torch(self.setting.file(self.run.name, "branch"), whole)

    def _epoch(self, epoch: int) -> float:
        self.net.train()
        total, setting = torch.zeros((), device=self.device), self.setting
        anneals = bool(self.run.branch_of) and epoch >= setting.annealed_from
        step = epoch * (len(self.data.parts["train"][0]) // setting.batch)
        for images, target in self.data.epoch(self.run.seed, epoch, setting.batch, SHIFT if self.run.knobs is None else 0):
            self._rate(step, anneals=anneals)
            with torch.autocast(self.device.type, torch.bfloat16):
                followed = None if self.teacher is None else self.teacher(images)
                loss, _ = self.loss(StepContext(self.net(images), target, followed, self.net))
            loss.backward()
            if anneals:
                self._freeze()
            self.optimizer.step()
            self.optimizer.zero_grad()
            total += loss.detach()
            step += 1
        return total.item() / max(len(self.data.parts["train"][0]) // setting.batch, 1)

    def _rate(self, step: int, *, anneals: bool) -> None:
        self.schedule.step_update(step)
        for group in self.optimizer.param_groups if anneals else ():
            group["lr"] = CGA_LR * group["lr_scale"]

    def _freeze(self) -> None:
        """Freeze all weights that are not near a threshold, as `qat.callbacks.CGA` does."""
        sites = [s for s in qat.iter_quantizers(self.net) if s.role == "weight" and isinstance(s.quantizer, StatsQ)]
        self.freezer.freeze((s.owner.weight, ~near_threshold(s.owner.weight, s.quantizer.spec.bits, CGA_BAND)) for s in sites)

    @torch.no_grad()
    def _accuracy(self, part: str) -> float:
        """Top-1 in percent; runs eagerly, for the sake of one graph less."""
        self.net.eval()
        right = torch.zeros((), device=self.device, dtype=torch.long)
        eager = torch.compiler.set_stance("force_eager")
        with eager, kept_weights(self.net), torch.autocast(self.device.type, torch.bfloat16):
            for images, target in self.data.batches(part, EVAL_BATCH):
                right += (self.net(images).argmax(1) == target).sum()
        return 100 * right.item() / len(self.data.parts[part][1])

    def _finished(self, state: dict[str, Any]) -> Row:
        self.net.load_state_dict(state["best"])
        write_torch(self.setting.file(self.run.name, "best"), self.net.state_dict())
        chosen = {"val": state["best_val"], "best_epoch": state["best_epoch"], "epochs": self.epochs}
        row = {"variant": self.run.variant, "seed": self.run.seed, **chosen, "test": self._accuracy("test"), "commit": commit()}
        append(self.setting.out, row)
        self.setting.file(self.run.name, "state").unlink(missing_ok=True)
        return row
