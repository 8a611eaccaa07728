"""`eval.py predict=FOLDER_OR_IMAGE`: the likeliest classes of images without labels."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from qat.data import DataSettings, ImageData, image_transform
from qat.data.imagefolder import EXTENSIONS, is_image
from qat.data.sources import SKIP, ImageError
from qat.errors import UsageError
from qat.lit.accuracy import check_logits
from qat.spec import QuantRecipe
from qat.tasks import summary
from qat.utils.files import csv_lines, files_below, write_text
from qat.utils.text import one_line

log = logging.getLogger(__name__)

RANKS = 5
SHOWN_IMAGES = 10
FILE = "predictions.csv"


@dataclass(frozen=True)
class EvaluatedNet:
    """A net and what it is evaluated on, built and checked.

    Attributes:
        name: the net's, by timm.
        recipe: how it is quantized.
        data: how its images are prepared; read only for an accuracy.
        classes: names of its classes, or their ids as text.
        assumed: settings of its images that nothing states, see `summary.assumed_settings`.
    """

    net: nn.Module
    name: str
    recipe: QuantRecipe
    data: ImageData
    classes: list[str]
    assumed: Sequence[str] = ()


def find_images(where: str) -> list[Path]:
    """One image, or all below a folder in the order of their paths, hidden ones left out.

    Raises:
        UsageError: there is no such file or folder, or it holds no images.
    """
    root = Path(where)
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise UsageError(f"predict={where!r}: no such file or folder")
    found = sorted(Path(path) for path in files_below(root, hidden=False) if is_image(path))
    if not found:
        raise UsageError(
            f"predict={where!r}: the folder holds no images; must hold {', '.join(EXTENSIONS)}"
        )
    return found


def predict(cfg: DictConfig, subject: EvaluatedNet, paths: list[Path], trainer: Trainer) -> None:
    """Write `predictions.csv` into the run directory, a line per image: path, then class and probability by rank; show its first lines.

    Raises:
        UsageError: more than one device is asked for, or an image cannot be decoded (under `data.on_error=skip`, all of them),
            or a logit is not finite.
    """
    if trainer.world_size > 1:
        raise UsageError(
            f"trainer.devices={cfg.trainer.devices!r}: predictions are made on one device; must be 1"
        )
    settings, ranks = subject.data.settings, min(RANKS, len(subject.classes))
    loader = DataLoader(
        _Files(paths, settings),
        batch_size=settings.batch_size,
        num_workers=settings.workers(len(paths)),
    )
    device, rows = trainer.strategy.root_device, []
    net = subject.net.to(device).eval()
    for numbers, images in loader:
        with torch.inference_mode(), trainer.precision_plugin.forward_context():
            logits = net(images.to(device)).float()
            shares, classes = (found.cpu().tolist() for found in logits.softmax(dim=-1).topk(ranks))
        check_logits(float((0 * logits).sum()), f"predict={str(cfg.predict)!r}")
        for number, best in zip(numbers.tolist(), map(zip, classes, shares), strict=True):
            if number >= 0:
                rows.append([
                    str(paths[number]),
                    *(
                        cell
                        for one, share in best
                        for cell in (subject.classes[one], f"{share:.6f}")
                    ),
                ])
    if not rows:
        raise UsageError(
            f"data.on_error=skip: none of {len(paths)} images below predict={str(cfg.predict)!r} can be decoded"
        )
    columns = [
        f"{what}_{rank}" for rank in range(1, ranks + 1) for what in ("class", "probability")
    ]
    file = Path(cfg.run_dir) / FILE
    write_text(file, csv_lines([["path", *columns], *rows]))
    shown = {
        one_line(row[0]): f"{one_line(row[1]).partition(',')[0]} {100 * float(row[2]):.1f} %"
        for row in rows[:SHOWN_IMAGES]
    }
    log.info(summary.lines("predictions", shown))
    log.info("%d of %d images: %s", len(rows), len(paths), file)


class _Files(Dataset[tuple[int, Tensor]]):
    """Number and image after the evaluation transform; -1 for an image that is skipped."""

    def __init__(self, paths: list[Path], settings: DataSettings) -> None:
        self.paths, self.settings, self.transform = paths, settings, image_transform(settings)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> tuple[int, Tensor]:
        try:
            return row, self.transform(self.paths[row])
        except ImageError as error:
            if self.settings.on_error == "raise":
                raise ImageError(f"{error}; {SKIP}") from error
            log.warning("data.on_error=skip: %s; left out", error)
            return -1, torch.zeros(
                self.settings.in_chans, self.settings.image_size, self.settings.image_size
            )


def class_names(stored: object, data: ImageData) -> list[str]:
    """Names of the classes of the data: those stored with the net, else those known for the data, else ids."""
    ids = range(data.settings.num_classes)
    found = (
        names
        for names in (stored, data.named_classes())
        if isinstance(names, list) and len(names) == len(ids)
    )
    return [str(name) for name in next(found, ids)]
