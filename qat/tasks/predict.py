"""`eval.py predict=FOLDER_OR_IMAGE`: the likeliest classes of images without labels."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from omegaconf import DictConfig
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from qat.data import DataSettings, image_transform
from qat.data.imagefolder import EXTENSIONS, is_image_file
from qat.data.sources import SKIP_ADVICE, ImageError
from qat.errors import UsageError
from qat.lit.accuracy import check_logits
from qat.tasks import summary
from qat.tasks.subject import EvaluatedNet
from qat.utils.files import csv_lines, files_below, write_text
from qat.utils.text import one_line

log = logging.getLogger(__name__)

TOP_K = 5
NUM_LOGGED_IMAGES = 10
PREDICTIONS_FILE = "predictions.csv"


def find_images(source: str) -> list[Path]:
    """The image at a path, or all images below a folder except hidden ones, sorted by path.

    Raises:
        UsageError: the file or folder does not exist, or the folder contains no images.
    """
    root = Path(source)
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise UsageError(f"predict={source!r}: no such file or folder")
    paths = [Path(path) for path in files_below(root, hidden=False) if is_image_file(path)]
    if not paths:
        raise UsageError(
            f"predict={source!r}: the folder has no images; "
            f"must contain files that end in {', '.join(EXTENSIONS)}"
        )
    return sorted(paths)


def check_one_device(cfg: DictConfig, trainer: Trainer) -> None:
    """Raise `UsageError` if a prediction has more than one device."""
    if trainer.world_size > 1:
        raise UsageError(
            f"trainer.devices={cfg.trainer.devices!r}: predictions are made on one device; "
            "must be 1"
        )


def predict(cfg: DictConfig, subject: EvaluatedNet, paths: list[Path], trainer: Trainer) -> None:
    """Write the likeliest classes of images to `predictions.csv`, and log the first rows.

    A row contains the path of an image, then classes and probabilities by rank. Skipped
    images have no row.

    Raises:
        UsageError: an image cannot be decoded (with `data.on_error=skip`, no image can be
            decoded), or a logit is not finite.
    """
    setting = f"predict={str(cfg.predict)!r}"
    num_ranks = min(TOP_K, len(subject.classes))
    rows = _predicted_rows(subject, paths, trainer, num_ranks, setting)
    if not rows:
        raise UsageError(f"data.on_error=skip: {setting} has no image that can be decoded")
    header = ["path"]
    for rank in range(1, num_ranks + 1):
        header += [f"class_{rank}", f"probability_{rank}"]
    file = Path(cfg.run_dir) / PREDICTIONS_FILE
    write_text(file, csv_lines([header, *rows]))
    entries = {}
    for path, name, probability, *_ in rows[:NUM_LOGGED_IMAGES]:
        first_name = one_line(name).partition(",")[0]
        entries[one_line(path)] = f"{first_name} {100 * float(probability):.1f} %"
    log.info(summary.aligned_lines("predictions", entries))
    log.info("%d of %d images: %s", len(rows), len(paths), file)


def _predicted_rows(
    subject: EvaluatedNet, paths: list[Path], trainer: Trainer, num_ranks: int, setting: str
) -> list[list[str]]:
    """Rows of the table, without skipped images."""
    settings = subject.data.settings
    loader = DataLoader(
        _PredictedImages(paths, settings),
        batch_size=settings.batch_size,
        num_workers=settings.workers(len(paths)),
    )
    device = trainer.strategy.root_device
    precision = trainer.precision_plugin
    net = precision.convert_module(subject.net.to(device)).eval()
    rows = []
    for indices, images in loader:
        with torch.inference_mode(), precision.forward_context():
            logits = net(precision.convert_input(images.to(device))).float()
            top = logits.softmax(dim=-1).topk(num_ranks)
            probabilities = top.values.cpu().tolist()
            classes = top.indices.cpu().tolist()
        # The sum is 0, or NaN if a logit is not finite.
        check_logits(float((0 * logits).sum()), setting)
        for row, index in enumerate(indices.tolist()):
            if index < 0:
                continue
            cells = [str(paths[index])]
            for class_id, probability in zip(classes[row], probabilities[row], strict=True):
                cells += [subject.classes[class_id], f"{probability:.6f}"]
            rows.append(cells)
    return rows


class _PredictedImages(Dataset[tuple[int, Tensor]]):
    """Dataset of (index, transformed image); the index is -1 if the image is skipped."""

    def __init__(self, paths: list[Path], settings: DataSettings) -> None:
        self.paths = paths
        self.settings = settings
        self.transform = image_transform(settings)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        try:
            return index, self.transform(self.paths[index])
        except ImageError as error:
            if self.settings.on_error == "raise":
                raise ImageError(f"{error}; {SKIP_ADVICE}") from error
            log.warning("data.on_error=skip: %s; left out", error)
            size = self.settings.image_size
            return -1, torch.zeros(self.settings.in_chans, size, size)
