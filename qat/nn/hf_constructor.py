"""Models of Transformers, built from a class and a config as `timm.create_model` builds its own."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from typing import Any

from timm.models import register_model
from torch import nn

from qat.nn.attention_interface import hf_models


def constructor_of(net: nn.Module) -> tuple[str, dict[str, Any]] | None:
    """Name and arguments with which `timm.create_model` builds a model of Transformers.

    Returns:
        None for any other model, also one whose class is not part of the package.
    """
    if hf_models(net) != [net]:
        return None
    transformers = importlib.import_module("transformers")
    if getattr(transformers, type(net).__name__, None) is not type(net):
        return None
    config: Any = net.config
    settings = json.loads(config.to_json_string(use_diff=False))
    settings.pop("quantization_config", None)
    return transformers_model.__name__, {"architecture": type(net).__name__, "config": settings}


@register_model
def transformers_model(architecture: str, config: Mapping[str, Any], **_: Any) -> nn.Module:
    """A model of Transformers with random weights; no code of a repository is run.

    Args:
        architecture: name of a class of the package.
        config: settings of its config class.

    Raises:
        ValueError: the package is not installed, or has no such class.
    """
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise ValueError("it needs the package transformers, which is not installed") from error
    cls = getattr(transformers, architecture, None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise ValueError(f"transformers has no model {architecture!r}")
    # The weights are in the file that names the class.
    settings = {**config, "use_pretrained_backbone": False}
    config_class: Any = cls.config_class  # type: ignore[attr-defined]
    model: nn.Module = cls(config_class.from_dict(settings))
    return model
