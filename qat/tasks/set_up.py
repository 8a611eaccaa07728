"""The first steps of every command: check settings, fetch a hub model, set kernels and seed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import seed_everything
from omegaconf import DictConfig, open_dict

from qat import kernels
from qat.data.hf_processor import processor_settings
from qat.errors import UsageError
from qat.lit.quiet import quiet_libraries
from qat.model.pretrained import (
    CONFIG,
    PREFIX,
    WEIGHTS,
    fetch,
    is_ours,
    transformers_folder,
)
from qat.model.start import check_model
from qat.nn.hf_constructor import CLASSIFIER
from qat.tasks.build import fill_in_num_classes, to_plain
from qat.tasks.checks import DATASETS, check_trainer
from qat.tasks.settings import check as check_settings
from qat.utils.text import json_object
from qat.utils.validate import check_number, unknown_message

_HF_ARGS = ("architecture", "config", "drop_path_rate", "in_chans", "num_classes")
_PREPROCESSING = ("mean", "std", "crop_pct", "crop_mode", "interpolation")


def set_up(cfg: DictConfig) -> None:
    """Check the settings of a command, set what they imply, and apply kernels and seed.

    Raises:
        UsageError: a setting is unknown, a value is invalid, or the model or the data cannot be
            read.
    """
    check_settings(cfg)
    quiet_libraries()
    _resolve_hub_model(cfg)
    fill_in_num_classes(cfg)
    kernels.use(cfg.get("kernels", "auto"))
    if "trainer" in cfg:
        check_trainer(cfg.trainer)
    seed_everything(cfg.seed, workers=True, verbose=False)


def _resolve_hub_model(cfg: DictConfig) -> None:
    """Apply the settings implied by a model on the hub, or by a folder of Transformers.

    A model that is not cached is downloaded. For a model that qat saved, `ckpt` is set; for a model
    of timm or Transformers, architecture and arguments are set; weights only with
    `model.pretrained`, and preprocessing only where it is null.

    Raises:
        UsageError: the model cannot be fetched or used, or another setting contradicts the model.
    """
    name = cfg.model.name or ""
    if "architecture" in cfg.model.args:
        _apply_transformers_folder(cfg, name)
        return
    if not name.startswith(PREFIX):
        return
    folder = fetch(name.removeprefix(PREFIX), f"model={name}")
    config = json_object(folder / CONFIG)
    if is_ours(folder):
        _apply_qat_folder(cfg, folder)
    else:
        _apply_timm_folder(cfg, folder, config)


def _apply_qat_folder(cfg: DictConfig, folder: Path) -> None:
    """Set `ckpt` to the weights of a folder that qat wrote; refuse training and other weights."""
    cfg.model.pretrained = False
    if cfg.command == "train":
        raise UsageError(
            f"model={cfg.model.name}: training starts from models of qat only with ckpt=FILE; "
            f"set ckpt={folder / WEIGHTS} and model=NAME"
        )
    if cfg.ckpt or cfg.model.weights:
        setting = "ckpt" if cfg.ckpt else "model.weights"
        raise UsageError(
            f"{setting}={cfg.ckpt or cfg.model.weights!r}: must be null with "
            f"model={cfg.model.name}, because the weights come from that model"
        )
    cfg.ckpt = str(folder / WEIGHTS)
    cfg.model.name = None


def _apply_timm_folder(cfg: DictConfig, folder: Path, config: Mapping[str, Any]) -> None:
    """Set architecture, arguments, weights and preprocessing from a timm folder and its config.

    Weights are set only with `model.pretrained`; the user's arguments and preprocessing stay.
    """
    is_pretrained = cfg.model.pretrained
    cfg.model.pretrained = False
    check_model(f"model={cfg.model.name}: architecture", config.get("architecture"))
    user_args = cfg.model.args.items_ex(resolve=False)
    with open_dict(cfg):
        cfg.model.args = {
            **(config.get("model_args") or {}),
            **{key: value for key, value in user_args if value is not None},
        }
    cfg.model.name = config["architecture"]
    if is_pretrained:
        cfg.model.weights = str(folder / WEIGHTS)
    pretrained_cfg = config.get("pretrained_cfg") or {}
    if isinstance(pretrained_cfg, dict):
        dataset_class = DATASETS.get(cfg.data.get("_target_"))
        if dataset_class is None or "model" not in dataset_class.UNREAD:  # may read `data.model`
            set_preprocessing(cfg.data, pretrained_cfg)
        if "default_photos" in cfg:  # the data of a prediction are chosen later
            set_preprocessing(cfg.default_photos, pretrained_cfg)


def _apply_transformers_folder(cfg: DictConfig, name: str) -> None:
    """Set arguments, preprocessing and, if `model.pretrained`, weights of a Transformers model."""
    if cfg.model.weights:
        raise UsageError(
            f"model.weights={cfg.model.weights!r}: must be null with model=hf, "
            "because the weights come from model.name"
        )
    if cfg.model.init != "full":
        raise UsageError(f"model.init={cfg.model.init!r}: must be full with model=hf")
    user_args = dict(cfg.model.args.items_ex(resolve=False))
    for key, value in user_args.items():
        if key not in _HF_ARGS and value is not None:
            raise UsageError(unknown_message(f"model.args.{key}={value!r}", key, _HF_ARGS))
    changes = to_plain(user_args.pop("config")) or {}
    if not isinstance(changes, dict):
        raise UsageError(f"model.args.config={changes!r}: must be a group of settings")
    drop_path_rate = user_args.pop("drop_path_rate", None)
    if drop_path_rate is not None:
        check_number("model.args.drop_path_rate", drop_path_rate, 0, below=1)
        changes["drop_path_rate"] = drop_path_rate
    architecture = user_args.pop("architecture")
    folder, args = transformers_folder(name, f"model.name={name!r}", architecture, changes)
    with open_dict(cfg):
        if cfg.get("predict") is not None and "_target_" not in cfg.data:
            # Images to predict come without preprocessing settings; the processor's are used.
            class_names = args["config"].get("id2label")
            num_classes = len(class_names) if class_names else 2  # the default of Transformers
            null_settings = dict.fromkeys((*_PREPROCESSING, "image_size"))
            cfg.data.update({**null_settings, "num_classes": num_classes})
        if any(key in cfg.data and cfg.data[key] is None for key in _PREPROCESSING):
            settings = processor_settings(folder)
            image_size = settings.pop("image_size")
            set_preprocessing(cfg.data, settings)
            args["images"] = {}
            for key, value in settings.items():
                args["images"][key] = to_plain(cfg.data.get(key, value))
            if cfg.data.image_size is None:
                cfg.data.image_size = image_size
        cfg.model.args = {**args, **user_args}
    if cfg.model.pretrained:
        cfg.model.weights = str(folder / WEIGHTS)
    cfg.model.pretrained = False
    cfg.model.name = CLASSIFIER


def set_preprocessing(data: DictConfig, settings: Mapping[str, Any]) -> None:
    """Fill in the preprocessing settings that are null in a data config."""
    for key in _PREPROCESSING:
        if key in data and data[key] is None:
            data[key] = settings.get(key)
