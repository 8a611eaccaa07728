"""Quantized models in Transformers' own files: `save_pretrained` and `from_pretrained`.

Importing this module registers the quantization method `qat` with Transformers.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qat.model.convert import apply_recipe, convert
from qat.model.ptq_spec import recipe_from
from qat.nn.attention_interface import NAME
from qat.spec import QuantRecipe
from qat.spec import recipe as preset


@register_quantization_config(NAME)
class QatConfig(QuantizationConfigMixin):
    """How a model is quantized, as `quantization_config` of its config.

    Args:
        recipe: name of a recipe, a recipe, or its settings.
        input_size: (channels, height, width) of the images; None = those of the model's config.
        signs: see `qat.model.convert.Conversion`.
        knobs: further arguments of `qat.recipe`, if `recipe` is a name.
    """

    def __init__(
        self,
        recipe: str | QuantRecipe | Mapping[str, Any],
        *,
        input_size: tuple[int, int, int] | None = None,
        signs: str = "probe",
        **knobs: Any,
    ) -> None:
        self.quant_method = NAME  # type: ignore[assignment]
        knobs.pop("quant_method", None)
        if isinstance(recipe, str):
            recipe = preset(recipe, **knobs)
        elif isinstance(recipe, Mapping):
            recipe = recipe_from(recipe)
        self.recipe = recipe.to_dict()
        self.input_size: Any = input_size
        self.signs = signs


@register_quantizer(NAME)
class QatQuantizer(HfQuantizer):
    """Converts models of `from_pretrained`.

    A quantized file gets the modules for its tensors, of a model with random weights that is
    converted, as not every model runs on the meta device; a float model is converted when it has
    its weights, and has to be calibrated with `qat.initialize_scales`.
    """

    quantization_config: QatConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        if not self.pre_quantized:
            return
        config = self.quantization_config
        architecture: Any = type(model)
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            twin = architecture(copy.deepcopy(model.config))
            recipe = recipe_from(config.recipe)
            apply_recipe(twin, recipe, input_size=config.input_size, signs=config.signs)
        for module in twin.modules():
            # Else buffers that no file stores would keep no values.
            vars(module).pop("_is_hf_initialized", None)
        vars(model).update(vars(twin.to("meta")))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        config = self.quantization_config
        if self.pre_quantized:
            model.config.quantization_config = config.to_dict()  # as `qat.convert` notes it
            nn.Module.to(model, model.config.dtype)  # older versions cast only some tensors
        else:
            convert(model, recipe_from(config.recipe), input_size=config.input_size)

    def is_serializable(self) -> bool:
        """Quantized models can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Quantized models can be trained."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Their quantizers are trained with them."""
        return True
