"""The data config of an evaluation: the user's, else that of a checkpoint, else a default.

Checkpoints may be untrusted: a stored config builds only datasets of qat, downloads nothing, and
does not read a whole disk.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from qat.data import ImageData
from qat.data.settings import DataSettings
from qat.errors import UsageError
from qat.model.checkpoint import Checkpoint
from qat.model.storage import build_from
from qat.model.transform import data_config
from qat.nn.hf_constructor import CLASSIFIER
from qat.tasks import build
from qat.tasks.checks import DATASETS
from qat.tasks.set_up import set_preprocessing
from qat.utils.validate import check_images

# timm readers that download a dataset by its name (`qat.data.Timm`).
DOWNLOAD_PREFIXES = ("hfds/", "hfids/", "tfds/")


def choose_data(cfg: DictConfig, checkpoint: Checkpoint | None) -> None:
    """Set `cfg.data` to the config of the user, or else of the checkpoint, or else to a default.

    A prediction only needs to know how images are prepared, so the folder of the checkpoint's data
    may be missing. If the data of a model are unknown, a prediction prepares images as
    `qat.transform` does, or without a file of qat as `data=imagenet` does for this model.

    Raises:
        UsageError: the checkpoint names data that cannot be used, or not without the user's
            consent; or its model cannot be built.
    """
    own_settings = {k: v for k, v in build.to_plain(cfg.data).items() if v is not None}
    meta: Mapping[str, Any] = {}
    if checkpoint is not None:
        meta = checkpoint.meta or {}
    if "_target_" in own_settings:
        dataset_class = DATASETS.get(own_settings["_target_"], ImageData)
        reads_model = "model" in cfg.data and "model" not in dataset_class.UNREAD
        if meta and reads_model and cfg.data.model in {None, meta["model"]["name"]}:
            # Crop and normalize photos as the file states, else as the model expects.
            stored = meta.get("data") or {}
            in_chans = cfg.data.get("in_chans") or 3
            if stored.get("in_chans", 3) == in_chans:
                set_preprocessing(cfg.data, stored)
            cfg.data.model = meta["model"]["name"]
            # The name does not say which of timm's weights the file has, and timm does not know
            # `CLASSIFIER`.
            if cfg.data.model == CLASSIFIER or ("_target_" not in stored and in_chans == 3):
                image_config = meta.get("pretrained_cfg") or {}
                check_images(f"ckpt={str(cfg.ckpt)!r}: pretrained_cfg", image_config)
                set_preprocessing(cfg.data, image_config)
        return
    is_prediction = cfg.get("predict") is not None
    settings = _stored_settings(meta, cfg.ckpt, is_prediction=is_prediction)
    if "_target_" not in settings:
        settings = build.to_plain(cfg.default_photos if is_prediction else cfg.default_data)
        if is_prediction and checkpoint is not None and meta:
            settings |= {"_target_": "qat.data.ImageFolder", **data_config(build_from(checkpoint))}
    if is_prediction:
        settings["root"] = None
    elif settings.get("root") is not None and "root" not in own_settings:
        _check_stored_root(cfg.ckpt, str(settings["root"]))
    # The number of workers depends on this machine, not on the machine that wrote the file.
    settings["num_workers"] = None
    with open_dict(cfg):
        cfg.data = OmegaConf.create({**settings, **own_settings})


def _stored_settings(meta: Mapping[str, Any], ckpt: str, *, is_prediction: bool) -> dict[str, Any]:
    """Check the data config in a checkpoint's metadata; return the settings to use, {} if none.

    A class that a file names could run code, so only datasets of qat are built, from plain
    values. Datasets that would be downloaded must be set by the user, unless the command predicts,
    which needs none of their images.

    Raises:
        UsageError: the class is not a dataset of qat, the data would be downloaded, or a value
            contains a class name or an interpolation.
    """
    settings = dict(meta.get("data") or {})
    target = settings.get("_target_")
    # The text also contains the keys and values of nested dicts and lists.
    text_of_values = repr([value for key, value in settings.items() if key != "_target_"])
    if "_target_" in settings and target not in DATASETS:
        raise UsageError(
            f"ckpt={ckpt!r} was trained on {target!r}, which is not a dataset of qat; "
            "choose it with data=..."
        )
    if "'_target_'" in text_of_values or "${" in text_of_values:
        raise UsageError(
            f"ckpt={ckpt!r}: a value in its data config contains a class name or '${{'; "
            "choose the data with data=..."
        )
    if target in DATASETS:
        # Files of older versions may have settings that the dataset ignored.
        unread_names = DATASETS[target].UNREAD
        settings = {key: value for key, value in settings.items() if key not in unread_names}
    name = str(settings.get("name"))
    is_downloaded = settings.get("download") or name.lower().startswith(DOWNLOAD_PREFIXES)
    if target != "qat.data.Timm" or not is_downloaded:
        return settings
    if not is_prediction:
        download = " data.download=true" if settings.get("download") else ""
        raise UsageError(
            f"ckpt={ckpt!r} was trained on {name!r}, which is downloaded only if you ask for it: "
            f"set data=timm data.name={name}{download}"
        )
    shared_names = {field.name for field in dataclasses.fields(DataSettings)}
    shared_settings = {key: value for key, value in settings.items() if key in shared_names}
    return {"_target_": "qat.data.ImageFolder", **shared_settings}


def _check_stored_root(ckpt: str, root: str) -> None:
    """Raise `UsageError` for a folder above the home directory: reading it would take hours."""
    home = Path(os.path.expanduser("~")).resolve()
    folder = Path(root).resolve()
    if folder in {Path(folder.anchor), *home.parents}:
        raise UsageError(
            f"ckpt={ckpt!r}: names data.root={root!r}; must be the folder of a dataset; "
            "set data.root=FOLDER"
        )
