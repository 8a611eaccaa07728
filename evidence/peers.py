"""`python -m evidence.peers library=brevitas bits=2 ...`: quantization-aware training with another library, in the place of `train.py`.

Everything else is what `train.py` does with the same overrides: start, teacher, loss, data in the same order with the same augmentation,
optimizer, schedule, validation, choice of the best epoch, test. It needs the libraries: `make peers` installs them, and
`outputs/peers/bin/python` runs this from the root of the repository. `library=qat quant=ofq_2bit` trains our own net, for its time and
memory beside theirs. A run that was cut short begins anew; one that has results is left alone.
"""

from __future__ import annotations

import logging
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.errors import HydraException
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import DictConfig, OmegaConf
from torch import nn

from evidence.step_arms import MIB, saved_bytes
from qat.data import ImageData
from qat.errors import UsageError
from qat.lit import QATModule
from qat.lit.accuracy import evaluate
from qat.lit.loggers import closing
from qat.model.start import Start
from qat.tasks import build, fit, summary
from qat.tasks.checks import check_settings
from qat.tasks.results import library_versions, recipe_fields, write_results
from qat.tasks.teacher import build_teacher
from qat.utils.files import read_torch, write_text
from evidence.peer_nets import PEERS, quantized

log = logging.getLogger("qat.evidence")

CONF = Path(__file__).resolve().parents[1] / "conf"
OURS = "qat"
# Nothing goes on from a last.ckpt here, and nothing but this command could read it.
FIXED = ("callbacks.last=null", "callbacks.preemption=null", "report=false")


@dataclass(frozen=True)
class Choice:
    """What is trained: a key of `PEERS` or `qat`, and its bits; None for `qat`, whose recipe says them."""

    library: str
    bits: int | None


class Watch(Callback):
    """Seconds of each training step (teacher, forward, backward, optimizer; not the loader), and the peak of resident memory.

    Attributes:
        seconds: by the clock.
        cpu_seconds: of the process, which other work on the machine changes less.
        peak: bytes, from the first step on; 0 where the system does not tell.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self.peak = 0
        self._began = (0.0, 0.0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the peak so far: images are decoded by then."""
        forget = Path("/proc/self/clear_refs")
        if forget.exists():
            forget.write_text("5", encoding="ascii")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin a step."""
        self._began = time.perf_counter(), time.process_time()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """End it."""
        self.seconds.append(time.perf_counter() - self._began[0])
        self.cpu_seconds.append(time.process_time() - self._began[1])

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the peak."""
        status = Path("/proc/self/status")
        lines = status.read_text(encoding="ascii").splitlines() if status.exists() else []
        self.peak = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def composed(arguments: Sequence[str]) -> tuple[Choice, DictConfig]:
    """What to train, and the config of `train.py`.

    Args:
        arguments: `library=`, `bits=` and overrides of `train.py`, `run_dir=` among them.

    Raises:
        UsageError: the library needs bits, or gets settings that it does not read.
    """
    own = dict(argument.split("=", 1) for argument in arguments if argument.startswith(("library=", "bits=")))
    rest = [argument for argument in arguments if not argument.startswith(("library=", "bits="))]
    library, bits = own.get("library", ""), own.get("bits")
    if library not in {OURS, *PEERS}:
        raise UsageError(f"library={library!r}: must be one of {OURS}, {', '.join(PEERS)}")
    if (library == OURS) != (bits is None) or (bits is not None and not bits.isdecimal()):
        raise UsageError(f"bits={bits!r}: must be a whole number, for {', '.join(PEERS)}; of {OURS} quant=... says them")
    if library != OURS and any(one.startswith("quant") for one in rest):
        raise UsageError(f"quant: only {OURS} reads it; library={library} has bits=...")
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = hydra.compose("train", overrides=[*FIXED, *([] if library == OURS else ["quant=fp"]), *rest])
    return Choice(library, None if bits is None else int(bits)), cfg


def train(choice: Choice, cfg: DictConfig) -> dict[str, Any]:
    """Train one net; the last thing to be written is `results.json`.

    Returns:
        What is in it.

    Raises:
        UsageError: a setting cannot work.
    """
    began = time.monotonic()
    check_settings(cfg)
    seed_everything(cfg.seed, workers=True, verbose=False)
    loss, watch = build.build_loss(cfg), Watch()
    trainer = fit.build_trainer(cfg, [*fit.build_callbacks(cfg), watch], fit.build_loggers(cfg))
    data, start = build.build_data(cfg), build.build_start(cfg)
    teacher = build_teacher(cfg, loss, data, start.net)
    net, what = _net(choice, start, cfg, data)
    module = QATModule(
        net,
        loss,
        num_classes=data.settings.num_classes,
        optimizer=fit.build_optimizer_factory(cfg, trainer),
        scheduler=fit.build_scheduler_factory(cfg),
        teacher=teacher,
        lsq_grad_batch=cfg.lsq_grad_batch,
    )
    _make_place(cfg)
    log.info("%s: %s; %d epochs, lr %g, seed %d", choice.library, what, cfg.trainer.max_epochs, cfg.optimizer.lr, cfg.seed)
    data.trainer = trainer
    top1_fp = None if teacher is None else evaluate(teacher, data.test_dataloader(), data.settings.num_classes, module.device)["top1"]
    with closing(trainer.loggers):
        trainer.fit(module, datamodule=data)
        saved = _saved_mb(module, data)
        val_top1 = _take_best(trainer, module)
        (metrics,) = trainer.test(module, datamodule=data, verbose=False)
    figures = {
        **{key: metrics[f"test/{key}"] for key in ("top1", "top5", "loss")},
        "val_top1": val_top1,
        "top1_fp": top1_fp,
        "n_params": sum(parameter.numel() for parameter in module.net.parameters()),
        "wall_seconds": round(time.monotonic() - began, 1),
    }
    costs = {"step_seconds": statistics.median(watch.seconds), "step_cpu_seconds": statistics.median(watch.cpu_seconds)}
    costs |= {"peak_rss_mb": round(watch.peak / MIB), "saved_mb": saved}
    return _write(choice, cfg, {"split": data.evaluation_split, "weights": "best.ckpt", **figures, "what": what, **costs})


def _net(choice: Choice, start: Start, cfg: DictConfig, data: ImageData) -> tuple[nn.Module, str]:
    """The quantized net, and a line on what is quantized in it."""
    if choice.bits is None:
        recipe = build.build_recipe(cfg)
        build.quantize(start, recipe, data, init=cfg.model.init)
        return start.net, summary.describe_recipe(recipe)
    net = quantized(choice.library, start.net, data.calibration_batches(cfg.data.batch_size), choice.bits)
    return net, PEERS[choice.library].what.format(bits=choice.bits)


def _make_place(cfg: DictConfig) -> None:
    """The run's directory, without what a run that was cut short has left there."""
    place = Path(cfg.run_dir)
    for left in (*place.glob("checkpoints/*.ckpt"), place / "metrics.csv"):
        left.unlink(missing_ok=True)
    place.mkdir(parents=True, exist_ok=True)
    write_text(place / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))


def _saved_mb(module: QATModule, data: ImageData) -> float:
    """MiB that a training step keeps for its backward pass."""
    images = data.calibration_batches()[0]
    target = torch.zeros(len(images), dtype=torch.int64)

    def run() -> None:
        module.loss(module.context((images, target)))[0].backward()

    module.net.train()
    found = saved_bytes(module.net, run)
    module.net.zero_grad()
    return round(found / MIB, 1)


def _take_best(trainer: Trainer, module: QATModule) -> float:
    """Put the weights of the best epoch into the module.

    Returns:
        Its validation top-1 in percent.
    """
    (best,) = (one for one in trainer.checkpoint_callbacks if isinstance(one, ModelCheckpoint))
    module.load_state_dict(read_torch(best.best_model_path)["state_dict"])
    return float(best.best_model_score)  # type: ignore[arg-type]


def _write(choice: Choice, cfg: DictConfig, figures: dict[str, Any]) -> dict[str, Any]:
    versions = library_versions(*([] if choice.bits is None else [PEERS[choice.library].package]))
    quant = recipe_fields(build.build_recipe(cfg))["quant"] if choice.bits is None else f"{choice.library}_{choice.bits}bit"
    results = write_results(cfg, command="peers", quant=quant, **figures, library=choice.library, bits=choice.bits, versions=versions)
    log.info("test top-1 %.2f %%, step %.3f s; outputs in %s", results["top1"], results["step_seconds"], cfg.run_dir)
    return results


def main(arguments: Sequence[str]) -> int:
    """Exit code: 1 on a known mistake, which is said in one line."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stdout)
    try:
        choice, cfg = composed(arguments)
        if (Path(cfg.run_dir) / "results.json").exists():
            log.info("%s has results already", cfg.run_dir)
        else:
            train(choice, cfg)
    except (UsageError, HydraException) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
