"""`python -m evidence.peers library=brevitas bits=2 ...`: train with another library.

Everything except the quantizers is as in `train.py` with the same overrides: start, teacher, loss,
data order and augmentation, optimizer, schedule, validation, choice of the best epoch, and test.
Run it from the root of the repository with `outputs/peers/bin/python`, which has the libraries. An
interrupted run starts over.
"""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

import hydra
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import DictConfig

from evidence.peers.nets import PEERS, quantized
from evidence.peers.parq import optimizer_factory
from qat.lit import QATModule
from qat.lit.loggers import end_wandb_runs
from qat.tasks import build, fit
from qat.tasks.conf import CONF
from qat.tasks.results import correct_field, library_versions, write_results
from qat.tasks.set_up import set_up
from qat.tasks.summary import announce_teacher
from qat.tasks.teacher import build_teacher
from qat.utils.files import read_torch

# A run cannot be resumed, so it writes no last.ckpt.
FIXED = ("quant=fp", "callbacks.last=null", "callbacks.preemption=null", "report=false")


def train(library: str, bits: int, cfg: DictConfig) -> dict[str, Any]:
    """Train a model and write `results.json`.

    Args:
        library: a key of `PEERS`.
        bits: width of weights and activations.
        cfg: config of `train.py`.

    Returns:
        Content of `results.json`.

    Raises:
        UsageError: a setting is invalid.
    """
    start_time = time.monotonic()
    set_up(cfg)
    loss = build.build_loss(cfg)
    trainer = fit.build_trainer(cfg, fit.build_callbacks(cfg), fit.build_loggers(cfg))
    data = build.build_data(cfg)
    start = build.build_start(cfg)
    teacher = build_teacher(cfg, loss, data)
    batches = data.calibration_batches(cfg.data.batch_size)
    module = QATModule(
        quantized(library, start.net, batches, bits),
        loss,
        num_classes=data.settings.num_classes,
        optimizer=optimizer_factory(
            library, fit.build_optimizer_factory(cfg, trainer), bits, trainer
        ),
        scheduler=fit.build_scheduler_factory(cfg),
        teacher=teacher,
        lsq_grad_batch=cfg.lsq_grad_batch,
    )
    data.share_images(trainer)
    top1_fp = announce_teacher(teacher, data, trainer)
    with end_wandb_runs(trainer.loggers):
        trainer.fit(module, datamodule=data)
        (best,) = (
            callback
            for callback in trainer.checkpoint_callbacks
            if isinstance(callback, ModelCheckpoint)
        )
        module.load_state_dict(read_torch(best.best_model_path)["state_dict"])
        (metrics,) = trainer.test(module, datamodule=data, verbose=False)
    return write_results(
        cfg,
        command="peers",
        quant=f"{library}_{bits}bit",
        split=data.evaluation_split,
        weights="best.ckpt",
        **{key: metrics[f"test/{key}"] for key in ("top1", "top5", "loss")},
        **correct_field(module.correct),
        val_top1=float(best.best_model_score),  # type: ignore[arg-type]
        top1_fp=top1_fp,
        wall_seconds=round(time.monotonic() - start_time, 1),
        library=library,
        bits=bits,
        versions=library_versions(PEERS[library][0]),
    )


def main(arguments: list[str]) -> None:
    """Train with `library=`, `bits=` and overrides of `train.py`, including `run_dir=`."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stdout
    )
    own = {}
    overrides = list(FIXED)
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key in {"library", "bits"}:
            own[key] = value
        else:
            overrides.append(argument)
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = hydra.compose("train", overrides=overrides)
    train(own["library"], int(own["bits"]), cfg)


if __name__ == "__main__":
    main(sys.argv[1:])
