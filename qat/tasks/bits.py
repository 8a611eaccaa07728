"""The step of `ptq.py` between calibration and evaluation: `search=bits` chooses the bits of weights, and reports size against accuracy."""

from __future__ import annotations

import copy
import csv
import io
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from omegaconf import DictConfig
from torch import Tensor

from qat.conversion import conversion_of, conversion_report
from qat.cost import size_bytes
from qat.files import json_text, write_text
from qat.functional.allocation import average_bits, spread
from qat.lit import QATModule
from qat.losses import CompositeLoss, CrossEntropy
from qat.ptq.bits import search_bits
from qat.ptq.bits_settings import BitsSettings
from qat.ptq.points import BitsResult
from qat.ptq.ranks import Ranks
from qat.ptq.widths import set_bits
from qat.tasks.predict import Subject

log = logging.getLogger(__name__)

OVERRIDES = "overrides.txt"
COLUMNS = ("size_bytes", "average_bits", "fitness", "top1", "selected", "bits")


def run_bits(
    cfg: DictConfig, settings: BitsSettings, subject: Subject, batches: list[Tensor], targets: list[Tensor], trainer: Trainer, ranks: Ranks
) -> dict[str, Any]:
    """Search on a calibrated net, in place, and report the front; gives what `results.json` says of it.

    Args:
        cfg: the job's config; all files go to its `run_dir`.
        settings: of the search.
        subject: the net, which is on its device.
        batches: calibration images, the same in every process.
        targets: their float logits.
        trainer: evaluates points of the front.
        ranks: processes that share the work.
    """
    net, run_dir = subject.net, Path(cfg.run_dir)
    size = size_bytes(net)
    found = search_bits(net, batches, targets, settings, size_bytes=size, run_dir=run_dir, resume=bool(cfg.resume), group=ranks.group)
    rows = _measured(found, settings, subject, trainer)
    done = conversion_of(net)
    if trainer.is_global_zero and done is not None:
        text = hydra_text(done.recipe.overrides)
        write_text(run_dir / OVERRIDES, text + "\n")
        write_text(run_dir / "conversion.txt", conversion_report(net).to_text() + "\n")
        _write(run_dir, found, rows, subject)
        log.info("to go on from these bits (%s; in training quant.overrides): 'ptq.overrides=%s'", OVERRIDES, text)
    log.info("search: fitness %.6g with %d of %d bytes", found.best.fitness, found.best.size_bytes, found.budget_bytes)
    return {"search": found.to_dict()}


def hydra_text(value: Any) -> str:
    """Plain data as the value of an override on the command line."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{hydra_text(entry)}" for key, entry in value.items()) + "}"
    return {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else str(value)


def _measured(found: BitsResult, settings: BitsSettings, subject: Subject, trainer: Trainer) -> list[dict[str, Any]]:
    """The front, by ascending size; some of its points with their accuracy on the evaluation split, which is looked at for no choice."""
    chosen = spread(len(found.front), settings.front_points, found.front.index(found.best))
    rows = []
    loggers, trainer.loggers = trainer.loggers, []
    for number, point in enumerate(found.front):
        accuracy = _accuracy(found.named(point), subject, trainer) if number in chosen else None
        if accuracy is not None:
            log.info(
                "front: %d bytes, fitness %.6f, %s top-1 %.2f %%", point.size_bytes, point.fitness, subject.data.evaluation_split, accuracy
            )
        row: dict[str, Any] = {
            "size_bytes": point.size_bytes,
            "average_bits": round(average_bits(found.numels, point.bits), 4),
            "fitness": point.fitness,
        }
        rows.append(row | {"top1": accuracy, "selected": point == found.best, "bits": found.named(point)})
    trainer.loggers = loggers
    return rows


def _accuracy(bits: dict[str, int], subject: Subject, trainer: Trainer) -> float:
    # A copy: the device on which a trainer leaves a net is not always the one on which its scales were made.
    net = copy.deepcopy(subject.net)
    set_bits(net, bits)
    module = QATModule(net, CompositeLoss({"ce": CrossEntropy()}), num_classes=subject.data.settings.num_classes)
    (metrics,) = trainer.test(module, datamodule=subject.data, verbose=False)
    return float(metrics["test/top1"])


def _write(run_dir: Path, found: BitsResult, rows: list[dict[str, Any]], subject: Subject) -> None:
    """`front.json`, `front.csv` and a drawing."""
    from qat.report.front import draw_front

    shared = {"selected_on": "calibration", "split": subject.data.evaluation_split, "budget_bytes": found.budget_bytes}
    write_text(run_dir / "front.json", json_text(shared | {"layers": found.layers, "points": rows}))
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(COLUMNS)
    lines.writerows([*(row[key] for key in COLUMNS[:-2]), int(row["selected"]), " ".join(map(str, row["bits"].values()))] for row in rows)
    write_text(run_dir / "front.csv", text.getvalue())
    others = [(point.size_bytes, point.fitness) for point in found.points]
    uniform = {point.bits[0]: (point.size_bytes, point.fitness) for point in found.points if len(set(point.bits)) == 1}
    draw_front(run_dir, rows, others, budget=found.budget_bytes, uniform=uniform)
