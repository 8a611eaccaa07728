"""`python -m evidence.peers library=brevitas bits=2 ...`: quantization-aware training with another library, in the place of `train.py`.

Everything else is what `train.py` does with the same overrides: start, teacher, loss, data in the same order with the same augmentation,
optimizer, schedule, validation, choice of the best epoch, test. `outputs/peers/bin/python` has the libraries and runs this from the root of
the repository. A run that was cut short begins anew; one that has results is left alone.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import HydraException
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import DictConfig, OmegaConf

from evidence.peer_nets import PEERS, quantized
from qat.errors import UsageError
from qat.lit import QATModule
from qat.lit.loggers import closing
from qat.tasks import build, fit
from qat.tasks.checks import check_settings
from qat.tasks.conf import CONF
from qat.tasks.results import library_versions, write_results
from qat.tasks.summary import announce_teacher
from qat.tasks.teacher import build_teacher
from qat.utils.files import read_torch, write_text

log = logging.getLogger("qat.evidence")

# Nothing goes on from a last.ckpt here, and nothing but this command could read it.
FIXED = ("quant=fp", "callbacks.last=null", "callbacks.preemption=null", "report=false")


def composed(arguments: Sequence[str]) -> tuple[str, int, DictConfig]:
    """A library, its bits, and the config of `train.py`.

    Args:
        arguments: `library=`, `bits=` and overrides of `train.py`, `run_dir=` among them.

    Raises:
        UsageError: no such library, no bits, or settings that it does not read.
    """
    own = dict(argument.split("=", 1) for argument in arguments if argument.startswith(("library=", "bits=")))
    rest = [argument for argument in arguments if not argument.startswith(("library=", "bits="))]
    library, bits = own.get("library", ""), own.get("bits", "")
    if library not in PEERS or not bits.isdecimal():
        raise UsageError(f"library={library!r}, bits={bits!r}: must be one of {', '.join(PEERS)}, and a whole number")
    if any(one.startswith("quant") for one in rest):
        raise UsageError(f"quant: only qat reads it; library={library} has bits=...")
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return library, int(bits), hydra.compose("train", overrides=[*FIXED, *rest])


def train(library: str, bits: int, cfg: DictConfig) -> dict[str, Any]:
    """Train one net; the last thing to be written is `results.json`.

    Returns:
        What is in it.

    Raises:
        UsageError: a setting cannot work.
    """
    began = time.monotonic()
    check_settings(cfg)
    loss = build.build_loss(cfg)
    trainer = fit.build_trainer(cfg, fit.build_callbacks(cfg), fit.build_loggers(cfg))
    data, start = build.build_data(cfg), build.build_start(cfg)
    teacher = build_teacher(cfg, loss, data, start.net)
    module = QATModule(
        quantized(library, start.net, data.calibration_batches(cfg.data.batch_size), bits),
        loss,
        num_classes=data.settings.num_classes,
        optimizer=fit.build_optimizer_factory(cfg, trainer),
        scheduler=fit.build_scheduler_factory(cfg),
        teacher=teacher,
        lsq_grad_batch=cfg.lsq_grad_batch,
    )
    place = Path(cfg.run_dir)
    for left in (*place.glob("checkpoints/*.ckpt"), place / "metrics.csv"):
        left.unlink(missing_ok=True)
    place.mkdir(parents=True, exist_ok=True)
    write_text(place / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
    data.trainer = trainer
    top1_fp = announce_teacher(teacher, data, trainer)
    with closing(trainer.loggers):
        trainer.fit(module, datamodule=data)
        (best,) = (one for one in trainer.checkpoint_callbacks if isinstance(one, ModelCheckpoint))
        module.load_state_dict(read_torch(best.best_model_path)["state_dict"])
        (metrics,) = trainer.test(module, datamodule=data, verbose=False)
    package, what, _ = PEERS[library]
    return write_results(
        cfg,
        command="peers",
        quant=f"{library}_{bits}bit",
        split=data.evaluation_split,
        weights="best.ckpt",
        **{key: metrics[f"test/{key}"] for key in ("top1", "top5", "loss")},
        val_top1=float(best.best_model_score),  # type: ignore[arg-type]
        top1_fp=top1_fp,
        n_params=sum(parameter.numel() for parameter in module.net.parameters()),
        wall_seconds=round(time.monotonic() - began, 1),
        what=what.format(bits=bits),
        library=library,
        bits=bits,
        versions=library_versions(package),
    )


def main(arguments: Sequence[str]) -> int:
    """Exit code: 1 on a known mistake, which is said in one line."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stdout)
    try:
        library, bits, cfg = composed(arguments)
        if (Path(cfg.run_dir) / "results.json").exists():
            log.info("%s has results already", cfg.run_dir)
        else:
            log.info("test top-1 %.2f %%; outputs in %s", train(library, bits, cfg)["top1"], cfg.run_dir)
    except (UsageError, HydraException) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
