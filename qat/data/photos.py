"""Photographs: what the config leaves open is that of the model's pretrained weights, and the user says how many classes there are."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import timm

from qat.data.arrays import ImageSource, stratified_split
from qat.data.encoded import EncodedImages, load
from qat.data.image_data import ImageData
from qat.data.settings import DataSettings
from qat.errors import UsageError

log = logging.getLogger(__name__)

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "crop_pct": 0.9, "interpolation": "bicubic"}


class Photos(ImageData):
    """Images of any size, scaled and cropped as the model's pretrained weights expect it.

    Args:
        settings: fields of `DataSettings`; None in `mean`, `std`, `crop_pct` and `interpolation` = that of `model`.

    Raises:
        UsageError: unknown setting, a value that cannot work, or `num_classes` is None: the line says how many the data have.
    """

    HELD_OUT = 0.1

    def __init__(self, **settings: Any) -> None:
        if settings.get("num_classes", 0) is None:
            # The model is built from the config, so the number has to stand there, not only here.
            root, found = settings.get("root"), self.count_classes(settings)
            if found < 2:
                raise UsageError(f"data.root={root!r}: has {found} class{'es' * (found != 1)}; must have at least 2")
            raise UsageError(f"data.num_classes is not set: data.root={root!r} has {found} classes; set data.num_classes={found}")
        super().__init__(**settings)

    @classmethod
    def complete(cls, settings: dict[str, Any]) -> DataSettings:
        """The settings, None filled in from `model`."""
        return super().complete(completed(settings))

    def read(self) -> dict[str, ImageSource]:
        """All splits that there are; without val a tenth of train is held out."""
        found = dict(self.encoded())
        if "train" in found and "val" not in found:
            kept, out = stratified_split(found["train"].labels, self.HELD_OUT)
            found |= {"train": found["train"].take(kept), "val": found["train"].take(out)}
        return {split: load(images, self.settings) for split, images in found.items()}

    @abstractmethod
    def encoded(self) -> Mapping[str, EncodedImages]:
        """The splits as they are stored."""

    @abstractmethod
    def count_classes(self, settings: dict[str, Any]) -> int:
        """How many classes the data of these settings have; called where `num_classes` is None, before `settings` are checked.

        Raises:
            UsageError: they cannot be counted.
        """


def completed(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings without None in `mean`, `std`, `crop_pct` and `interpolation`: those of `model`, else ImageNet's.

    Args:
        settings: fields of `DataSettings`.
    """
    missing = [name for name in IMAGENET if settings.get(name) is None]
    if not missing:
        return settings
    config = timm.get_pretrained_cfg(settings["model"]) if settings.get("model") else None
    if config is None:
        names = ", ".join(f"data.{name}" for name in missing)
        log.warning("%s: null, and data.model=%r has no pretrained config: ImageNet's usual values", names, settings.get("model"))
    values: dict[str, Any] = {name: getattr(config, name, None) or IMAGENET[name] for name in missing}
    if settings.get("in_chans") == 1:
        values |= {name: [sum(values[name]) / len(values[name])] for name in {"mean", "std"} & set(missing)}
    return {**settings, **values}
