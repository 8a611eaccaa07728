"""Save and load quantized models with Transformers' own `save_pretrained` and `from_pretrained`.

Importing this module registers the quantization method `qat` with Transformers. `Callback` adds
annealing or freezing to Transformers' `Trainer`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qat.errors import UsageError
from qat.model.convert import apply_recipe, convert
from qat.model.ptq_spec import recipe_from
from qat.nn.attention_interface import NAME, save_in_new_format
from qat.spec import QuantRecipe
from qat.spec import recipe as preset
from qat.utils.files import write_torch

_STATE = "qat_callback.pt"  # in each checkpoint folder


@register_quantization_config(NAME)
class QatConfig(QuantizationConfigMixin):
    """Settings that quantize a model, stored as `quantization_config` in the model's config.

    Args:
        recipe: a recipe, or the name or the settings of a recipe.
        input_size: (channels, height, width) of the images; None = the size in the model's config.
        signs: see `qat.model.convert.Conversion`; used only to load quantized models. A float model
            is always converted with `tails`.
        knobs: more arguments of `qat.recipe`, allowed if `recipe` is a name.

    Raises:
        UsageError: `recipe` is not a recipe, a value is not allowed, or there are `knobs` although
            `recipe` is not a name.
        TypeError: a setting is unknown.
    """

    def __init__(
        self,
        recipe: str | QuantRecipe | Mapping[str, Any],
        *,
        input_size: tuple[int, int, int] | None = None,
        signs: str = "tails",
        **knobs: Any,
    ) -> None:
        self.quant_method = NAME  # type: ignore[assignment]
        knobs.pop("quant_method", None)
        if isinstance(recipe, str):
            recipe = preset(recipe, **knobs)
        elif knobs:
            raise UsageError(f"QatConfig: {knobs}: must be part of the recipe")
        elif isinstance(recipe, Mapping):
            recipe = recipe_from(recipe)
        if not isinstance(recipe, QuantRecipe):
            raise UsageError(
                f"QatConfig: recipe={recipe!r}: must be a recipe, or its name or settings"
            )
        self.recipe = recipe.to_dict()
        self.input_size: Any = input_size
        self.signs = signs


@register_quantizer(NAME)
class QatQuantizer(HfQuantizer):
    """Converts the models that `from_pretrained` loads.

    A conversion runs the model, but not every model can run on the meta device, where
    `from_pretrained` builds it. To load a quantized file, a second model with random weights is
    therefore built and converted on the CPU, and the first model takes over its modules. A float
    model is converted after its weights are loaded; its scales must then be set by
    `qat.initialize_scales`.
    """

    quantization_config: QatConfig
    # Tensors that the float model does not have, with the values that a conversion sets.
    _new_tensors: dict[str, Tensor]

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        if not self.pre_quantized:
            return
        config = self.quantization_config
        architecture: Any = type(model)
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            twin = architecture(copy.deepcopy(model.config))
            recipe = recipe_from(config.recipe)
            apply_recipe(twin, recipe, input_size=config.input_size, signs=config.signs)
        float_names = model.state_dict().keys()
        self._new_tensors = {}
        for name, tensor in twin.state_dict(keep_vars=True).items():
            if name not in float_names:
                if tensor.is_floating_point():
                    # Transformers would round the values of the file to the dtype of the weights.
                    tensor.data = tensor.data.float()
                self._new_tensors[name] = tensor.detach().clone()
        for module in twin.modules():
            # With this mark, Transformers would not fill buffers that files do not store.
            vars(module).pop("_is_hf_initialized", None)
        vars(model).update(vars(twin.to("meta")))
        # The copied `save_pretrained` would save the second model.
        save_in_new_format(model)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        config = self.quantization_config
        if self.pre_quantized:
            # Store a dict, as `qat.convert` does.
            model.config.quantization_config = config.to_dict()
            for name, tensor in model.state_dict(keep_vars=True).items():
                if name not in self._new_tensors:
                    # Older versions of Transformers cast only some of the tensors.
                    if tensor.is_floating_point():
                        tensor.data = tensor.data.to(model.config.dtype)
                elif not getattr(tensor, "_is_hf_initialized", False):
                    # Missing in the file, for example because the head is new.
                    tensor.data.copy_(self._new_tensors[name])
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
        """The quantizers of these models are trained along with the weights."""
        return True


class Callback(TrainerCallback):
    """Adds annealing (`CGA`) or freezing (`IterativeFreezing`) to the `Trainer` of Transformers.

    Each checkpoint stores the state of the callback, so a resumed run continues with it.

    Args:
        callback: a `CGA` or an `IterativeFreezing` of `qat.callbacks`.
    """

    def __init__(self, callback: Any) -> None:
        self.callback = callback
        # Stand-ins with the attributes that callbacks read from Lightning's trainer and module.
        self._lightning_trainer = SimpleNamespace(
            callbacks=[callback], fast_dev_run=False, is_last_batch=False
        )
        # Transformers' `Trainer` does not log the fraction of frozen weights, so no step counts as
        # a logging step.
        self._lightning_trainer.log_every_n_steps = math.inf
        self._lightning_module = SimpleNamespace()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set up the callback as Lightning would; in a resumed run, restore a stored state.

        Raises:
            UsageError: `output_dir` has no checkpoint of the step from which the run resumes, or
                the callback cannot be set up.
        """
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.global_step and not folder.exists():
            raise UsageError(
                f"resume_from_checkpoint: {type(self.callback).__name__} reads its state from "
                f"{folder}, which does not exist; the checkpoint must be in output_dir"
            )
        optimizer = kwargs["optimizer"]
        self._lightning_module.net = kwargs["model"]
        self._lightning_trainer.optimizers = [getattr(optimizer, "optimizer", optimizer)]
        # With `max_steps`, `args.num_train_epochs` is not used.
        self._lightning_trainer.max_epochs = state.num_train_epochs
        self._lightning_trainer.estimated_stepping_batches = state.max_steps
        self._lightning_trainer.global_step = state.global_step
        # Transformers does not end a run that an exception has stopped.
        self.callback.teardown(self._lightning_trainer, self._lightning_module, "fit")
        self.callback.setup(self._lightning_trainer, self._lightning_module, "fit")
        self.callback.on_fit_start(self._lightning_trainer, self._lightning_module)
        self.callback.on_train_start(self._lightning_trainer, self._lightning_module)
        if state.global_step and (folder / _STATE).exists():
            state_of_callback = torch.load(folder / _STATE, map_location="cpu", weights_only=True)
            self.callback.load_state_dict(state_of_callback)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let `CGA` switch its gates and, while annealing, set the learning rate."""
        self._update_progress(state)
        self.callback.on_train_batch_start(self._lightning_trainer, self._lightning_module, None, 0)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Choose the entries of weights that this step must not change."""
        self._update_progress(state)
        optimizer = self._lightning_trainer.optimizers[0]
        self.callback.on_before_optimizer_step(
            self._lightning_trainer, self._lightning_module, optimizer
        )

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Store the state of the callback in the checkpoint folder."""
        if args.should_save:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            write_torch(folder / _STATE, self.callback.state_dict())

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remove the hooks from the optimizer and the model."""
        self.callback.teardown(self._lightning_trainer, self._lightning_module, "fit")

    def _update_progress(self, state: Any) -> None:
        self._lightning_trainer.global_step = state.global_step
        # `state.epoch` is a float, which may be slightly too small at the end of an epoch.
        self._lightning_trainer.current_epoch = int(state.epoch + 1e-6)
