"""Build models of Transformers from a class and a config, through `timm.create_model`."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from timm.layers import to_2tuple
from timm.models import load_pretrained, register_model
from torch import Tensor, nn

from qat.nn.attention_interface import hf_models

CLASSIFIER = "transformers_classifier"  # name of the constructor, for `timm.create_model`


def constructor_of(net: nn.Module) -> tuple[str, dict[str, Any]] | None:
    """Name and arguments with which `timm.create_model` builds a model of Transformers.

    Returns:
        The name and the arguments. None for any other model, and for a model whose class
        `transformers` does not export.
    """
    if hf_models(net) != [net]:
        return None
    transformers = importlib.import_module("transformers")
    if getattr(transformers, type(net).__name__, None) is not type(net):
        return None
    config: Any = net.config
    settings = without_origin(json.loads(config.to_json_string(use_diff=False)))
    settings.pop("quantization_config", None)
    return transformers_model.__name__, {"architecture": type(net).__name__, "config": settings}


def without_origin(config: Mapping[str, Any]) -> dict[str, Any]:
    """Copy a config and its nested configs without `_name_or_path`, which may be a local folder."""
    settings = dict(config)
    settings.pop("_name_or_path", None)
    for key, value in settings.items():
        if isinstance(value, Mapping):
            settings[key] = without_origin(value)
    return settings


@register_model
def transformers_model(architecture: str, config: Mapping[str, Any], **_: Any) -> nn.Module:
    """Build a model of Transformers with random weights. No code from a model repository is run.

    Args:
        architecture: name of a class of the package.
        config: settings of its config class.
        _: other arguments of `timm.create_model`, such as `pretrained`; not used.

    Raises:
        ValueError: the package is not installed, or has no such class; or a setting is invalid.
    """
    # Weights are random or loaded later, so do not download those of a backbone.
    settings = {**config, "use_pretrained_backbone": False}
    model: nn.Module = model_class(architecture)(model_config(architecture, settings))
    return model


def model_config(architecture: str, settings: Mapping[str, Any]) -> Any:
    """The config of a model of Transformers.

    Args:
        architecture: name of a class of the package.
        settings: settings of its config class.

    Raises:
        ValueError: the package is not installed, or has no such class; or a setting is invalid.
    """
    config_class = model_class(architecture).config_class
    try:
        return config_class.from_dict(dict(settings))
    except (AttributeError, LookupError, TypeError, StrictDataclassError) as error:
        raise ValueError(f"{config_class.__name__}: {error}") from error


def package() -> Any:
    """Import the package `transformers`.

    Raises:
        ValueError: the package is not installed.
    """
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise ValueError(
            "the model needs the package transformers, which is not installed"
        ) from error


def model_class(architecture: str) -> Any:
    """The model class of Transformers with this name.

    Raises:
        ValueError: the package is not installed, or has no such class.
    """
    transformers = package()
    cls = getattr(transformers, architecture, None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise ValueError(f"transformers has no model {architecture!r}")
    return cls


class TransformersClassifier(nn.Module):
    """An image classifier of Transformers with some methods of timm's models.

    Args:
        architecture: name of a class of the package.
        config: settings of its config class.
        num_classes: number of classes.
        in_chans: number of image channels; replaces `num_channels` of `config`.
        images: preprocessing of images, with the keys of timm's `pretrained_cfg`.

    Raises:
        ValueError: the package is not installed, or has no such class; a setting is invalid; or the
            model has no classifier.
    """

    def __init__(
        self,
        architecture: str,
        config: Mapping[str, Any],
        num_classes: int,
        in_chans: int = 3,
        images: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        labels = config.get("id2label") or {}
        if len(labels) != num_classes:
            labels = {str(number): f"LABEL_{number}" for number in range(num_classes)}
        settings = {
            **config,
            "id2label": labels,
            "label2id": {label: int(number) for number, label in labels.items()},
            "num_channels": in_chans,
            "return_dict": True,
        }
        if isinstance(config.get("vision_config"), Mapping):  # as in CLIP
            settings["vision_config"] = {**config["vision_config"], "num_channels": in_chans}
        self.model: Any = transformers_model(architecture, settings)
        image_config = getattr(self.model.config, "vision_config", self.model.config)
        image_size = getattr(image_config, "image_size", None) or 224
        self.num_classes = num_classes
        self.in_chans = in_chans
        convolutions = []
        classifiers = []
        body = f"model.{self.model.base_model_prefix}."
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d):
                convolutions.append(name)
            fits_classes = isinstance(module, nn.Linear) and module.out_features == num_classes
            # A layer of the body may have `num_classes` outputs by chance.
            if fits_classes and not name.startswith(body):
                classifiers.append(name)
        if not classifiers:
            raise ValueError(f"{architecture} has no classifier")
        self.pretrained_cfg = {
            "architecture": CLASSIFIER,
            "num_classes": num_classes,
            "input_size": (in_chans, *to_2tuple(image_size)),
            "first_conv": convolutions[0] if convolutions else "",
            "classifier": classifiers,
            **(images or {}),
        }

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, C, H, W)."""
        logits: Tensor = self.model(images).logits
        return logits

    def set_grad_checkpointing(self, enable: bool = True) -> None:  # noqa: FBT001, FBT002
        """Turn gradient checkpointing on or off, as in timm's models.

        If it is on, only the inputs of blocks are stored for the backward pass.

        Raises:
            ValueError: Transformers cannot do this for the model.
        """
        # Older versions have only the `gradient_` names; newer versions warn if these are used.
        has_new_names = hasattr(self.model, "activation_checkpointing_enable")
        prefix = "activation" if has_new_names else "gradient"
        if enable:
            getattr(self.model, f"{prefix}_checkpointing_enable")({"use_reentrant": False})
        else:
            getattr(self.model, f"{prefix}_checkpointing_disable")()

    def get_classifier(self) -> nn.Module:
        """The layer that computes the logits, or the first of several."""
        return self.get_submodule(self.pretrained_cfg["classifier"][0])

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay: tokens, positions, bias tables and others.

        These are the weights of embeddings, and all parameters that are not called `weight` or
        `bias`.
        """
        names = set()
        for name, module in self.named_modules():
            for own_name, _ in module.named_parameters(recurse=False):
                if own_name not in {"weight", "bias"} or isinstance(module, nn.Embedding):
                    names.add(f"{name}.{own_name}")
        return names


@register_model
def transformers_classifier(
    *,
    pretrained: bool = False,
    pretrained_cfg: object = None,  # noqa: ARG001
    pretrained_cfg_overlay: Mapping[str, Any] | None = None,
    cache_dir: object = None,  # noqa: ARG001
    **arguments: Any,
) -> nn.Module:
    """Build a `TransformersClassifier`, with random or, on request, pretrained weights.

    Args:
        pretrained: see `timm.create_model`.
        pretrained_cfg: see `timm.create_model`; not used.
        pretrained_cfg_overlay: see `timm.create_model`.
        cache_dir: see `timm.create_model`; not used.
        arguments: arguments of `TransformersClassifier`.
    """
    net = TransformersClassifier(**arguments)
    net.pretrained_cfg.update(pretrained_cfg_overlay or {})
    if pretrained:
        load_pretrained(net, net.pretrained_cfg, net.num_classes, net.in_chans)
    return net
