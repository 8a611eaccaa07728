"""`PtqRecipe`: a recipe for post-training quantization, with ranges from calibration images."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from qat.errors import UsageError
from qat.functional.observers import OBSERVERS
from qat.spec import QuantRecipe, QuantSpec, summed_axis
from qat.utils.validate import BLOCK_FLOATS, FLOAT_BITS, FP8, check_bits, check_text

# Observers without `ptf`, which works only for sums on the residual stream.
_WITHOUT_PTF = tuple(name for name in OBSERVERS if name != "ptf")
_CHOICES = {
    "rule_bits": ("both", "weights"),
    "placement": ("inputs", "fqvit"),
    "attention": ("standard", "float"),
    "weight_quantizer": ("affine", *BLOCK_FLOATS, "fp8", "float"),
    "act_quantizer": ("affine", *BLOCK_FLOATS, "fp8", "float"),
    "softmax_quantizer": ("affine", "log2", *BLOCK_FLOATS, "fp8", "float"),
    "weight_observer": _WITHOUT_PTF,
    "act_observer": _WITHOUT_PTF,
    "residual_observer": OBSERVERS,
    "act_scales": ("tensor", "token", "channel"),
    "weight_scales": ("channel", "tensor"),
    "layernorm": ("float", "integer"),
    "method": ("calibrate", "compensate", "reconstruct"),
}
# Settings that take the value of another setting if they are None.
_DEFAULT_SOURCES = {
    "act_bits": "bits",
    "softmax_bits": "act_bits",
    "outer_act_bits": "act_bits",
    "softmax_quantizer": "act_quantizer",
    "stem_bits": "bits",
    "head_bits": "bits",
    "residual_observer": "act_observer",
}
_OUTER_BITS = ("stem_bits", "head_bits", "outer_act_bits")
# Values that these settings must have if a quantizer uses blocks of floats.
_REQUIRED_WITH_BLOCKS = {"method": "calibrate", "placement": "inputs", "bias_correction": False}
_REQUIRED_WITH_FP8 = {
    **_REQUIRED_WITH_BLOCKS,
    "weight_observer": "minmax",
    "act_observer": "minmax",
    "weight_scales": "channel",
    "act_scales": "tensor",
}
# Settings of `QuantRecipe` for training, which have no meaning here.
TRAINING_KNOBS = (
    "qk_bias",
    "offsets",
    "offset_init",
    "map_scales",
    "step_init",
    "steps",
    "fits_int8",
)
# Axes that differ from the default in `_act_axis`: with `channel`, attention heads (B, h, N, M) and
# channels of an image (B, C, H, W); with `token`, an image has one scale.
_SCALE_AXES: dict[str, dict[str, int | None]] = {
    "tensor": {},
    "token": {"image": None},
    "channel": {"scores": 1, "probs": 1, "image": 1},
}


@dataclass(frozen=True)
class PtqRecipe(QuantRecipe):
    """The settings of `ptq/*.yaml`.

    Attributes:
        name: name of the recipe, which results show.
        bits: bits of the weights in blocks, and default of `stem_bits` and `head_bits`.
        act_bits: bits of the activations in blocks, and default of `softmax_bits` and
            `outer_act_bits`; None = `bits`.
        softmax_bits: bits of attention probabilities; None = `act_bits`.
        stem_bits: bits of the weights of the first convolution; None = `bits`.
        head_bits: bits of the weights of heads: classifiers and other last layers; None = `bits`.
        outer_act_bits: bits of the image and of the input of heads; None = `act_bits`.
        method: what follows calibration: nothing (`calibrate`), a gain and a bias per channel
            (`compensate`), or training block by block (`reconstruct`). The last two change weights.
        placement: `inputs` quantizes the inputs of matrix products, as in training; `fqvit` also
            quantizes the outputs of layers (FQ-ViT, arXiv 2111.13824).
        attention: `standard`; or `float`, which quantizes only the linear layers of an attention.
        weight_quantizer: `affine`; `mxfp` or `nvfp4` (blocks of floats, but stem and heads are
            affine); `fp8` (8-bit floats); or `float`.
        act_quantizer: one of the values of `weight_quantizer`.
        softmax_quantizer: a value of `weight_quantizer`, or `log2` (powers of two); None =
            `act_quantizer`.
        weight_observer: method that chooses the range of a weight, one of `OBSERVERS` except `ptf`.
        act_observer: method that chooses the range of an activation, one of `OBSERVERS` except
            `ptf`.
        residual_observer: method that chooses the range of sums on the residual stream (only with
            `fqvit`); `ptf` = one scale times a power of two per channel; None = `act_observer`.
        weight_signed: True = signed codes, symmetric except with `omse`; False = unsigned codes
            with a zero point.
        act_signed: True = activations except probabilities have signed codes, symmetric except with
            `omse` and `ptf`; False = as with `weight_signed`.
        weight_scales: `channel` = one scale per output channel, `tensor` = one scale per weight.
        act_scales: activations have one scale per `tensor`, per `token` or per `channel`; with
            `channel`, attention scores and probabilities have one scale per head.
        bias_correction: True = each output channel of a quantized weight keeps the mean and the
            standard deviation that it has in the float weight.
        layernorm: `float`; or `integer`, which computes with the scales of the quantizers around
            the norm (only with `fqvit`).
        overrides: `{module name glob: {setting: value}}`; later rules win.
        rule_bits: see `QuantRecipe`.

    Raises:
        UsageError: a setting has a value that is not allowed.
    """

    name: str = "ptq"
    bits: int = 8
    act_bits: int | None = 8
    attention: str = "standard"
    weight_quantizer: str = "affine"
    act_quantizer: str = "affine"
    stem_bits: int | None = None  # type: ignore[assignment]
    head_bits: int | None = None  # type: ignore[assignment]
    outer_act_bits: int | None = None
    method: str = "calibrate"
    offsets: bool = False
    placement: str = "fqvit"  # type: ignore[misc]
    softmax_bits: int | None = None
    softmax_quantizer: str | None = None
    weight_observer: str = "minmax"
    act_observer: str = "minmax"
    residual_observer: str | None = None
    weight_signed: bool = False
    act_signed: bool = False
    weight_scales: str = "channel"
    act_scales: str = "tensor"
    bias_correction: bool = False
    layernorm: str = "float"  # type: ignore[misc]

    GROUP: ClassVar[str] = "ptq"
    NET_WIDE: ClassVar[frozenset[str]] = QuantRecipe.NET_WIDE | {
        "placement",
        "layernorm",
        "method",
        *TRAINING_KNOBS,
    }

    def __post_init__(self) -> None:
        check_text("ptq.name", self.name)
        if self.name == "fp":
            raise UsageError(
                "ptq.name='fp': must be another name, "
                "as a recipe called fp leaves the model in float"
            )
        self._settle_rule_bits()
        for knob, source in _DEFAULT_SOURCES.items():
            if getattr(self, knob) is None:
                object.__setattr__(self, knob, getattr(self, source))
        self._check_choices(_CHOICES, ("weight_signed", "act_signed", "bias_correction"))
        self._check_bits(("bits", "stem_bits", "head_bits"), self.weight_quantizer)
        self._check_bits(("act_bits", "outer_act_bits"), self.act_quantizer)
        self._check_bits(("softmax_bits",), str(self.softmax_quantizer))
        self._check_floats()
        # `FqNet.connect_norms` checks the quantizers around each norm.
        if self.layernorm == "integer" and self.placement != "fqvit":
            raise UsageError(
                "ptq.layernorm='integer': needs affine quantizers on both sides of a norm; "
                "must be float, or set ptq.placement=fqvit"
            )
        self._check_overrides()

    def _check_bits(self, knobs: tuple[str, ...], quantizer: str) -> None:
        for knob in knobs:
            # With blocks of floats, stem and heads are affine, so they may have 2 to 8 bits.
            is_affine = knob in _OUTER_BITS and quantizer in BLOCK_FLOATS
            check_bits(f"ptq.{knob}", getattr(self, knob), "" if is_affine else quantizer)

    def _check_floats(self) -> None:
        for name in (self.weight_quantizer, self.act_quantizer, str(self.softmax_quantizer)):
            if name not in (*BLOCK_FLOATS, *FP8):
                continue
            required = _REQUIRED_WITH_FP8 if name in FP8 else _REQUIRED_WITH_BLOCKS
            for knob, value in required.items():
                if getattr(self, knob) != value:
                    raise UsageError(
                        f"ptq.{knob}={getattr(self, knob)!r}: must be {value} with {name}"
                    )

    def _with_implied_bits(self, rule: Mapping[str, Any]) -> dict[str, Any]:
        """A rule, plus the settings that its `bits` and `act_bits` imply; explicit settings win."""
        knobs = super()._with_implied_bits(rule)
        if "act_bits" in knobs:
            return {"outer_act_bits": knobs["act_bits"], **knobs}
        return knobs

    def weight_spec(self, place: str, role: str = "weight") -> QuantSpec:
        """The spec of a weight (out, ...) at `place`."""
        name = self._quantizer_at(place, self.weight_quantizer)
        bits = {"stem": self.stem_bits, "block": self.bits, "head": self.head_bits}[place]
        axis = 0 if self.weight_scales == "channel" else None
        if name in BLOCK_FLOATS:
            axis = summed_axis(role)
        return QuantSpec(
            role,
            name,
            FLOAT_BITS if name == "float" else int(bits or 0),
            signed=self.weight_signed,
            axis=axis,
            observer=self.weight_observer,
            bias_correction=self.bias_correction and name != "float",
        )

    @staticmethod
    def _quantizer_at(place: str, quantizer: str) -> str:
        """The quantizer at a place: block floats are used only inside the model's blocks."""
        return "affine" if place != "block" and quantizer in BLOCK_FLOATS else quantizer

    def act_spec(self, role: str, place: str, *, signed: bool | None = True) -> QuantSpec:
        """Spec of an activation.

        Args:
            role: any of `ROLES` or `OUTPUT_ROLES`, except `weight` and `qk`.
            place: one of `PLACES`.
            signed: ignored; `act_signed` decides.
        """
        name = self._quantizer_at(place, self.act_quantizer)
        bits = self.act_bits if place == "block" else self.outer_act_bits
        if role == "probs":
            name = str(self.softmax_quantizer)
            bits = self.softmax_bits
        if self.attention == "float" and role in {"q", "k", "v", "qkv", "scores", "probs"}:
            name = "float"
        observer = self.residual_observer if role == "residual" else self.act_observer
        axis = self._act_axis(role, name, observer)
        return QuantSpec(
            role,
            name,
            FLOAT_BITS if name == "float" else int(bits or 0),
            signed=name in FP8 or (self.act_signed and role != "probs"),
            axis=axis,
            map_scales="tensor" if axis is None or axis == -2 else "column",
            observer=observer,
        )

    def _act_axis(self, role: str, quantizer: str, observer: str | None) -> int | None:
        if quantizer in BLOCK_FLOATS:
            return summed_axis(role)
        if observer == "ptf":
            return -1
        default_axis = {"tensor": None, "token": -2, "channel": -1}[self.act_scales]
        return _SCALE_AXES[self.act_scales].get(role, default_axis)


def recipe_from(stored: Mapping[str, Any]) -> QuantRecipe:
    """The recipe of a checkpoint: a `PtqRecipe` if the dict has a setting that only that class has.

    Args:
        stored: the dict that `to_dict` returned.

    Raises:
        TypeError: there is an unknown setting.
        UsageError: a value is not allowed, or a quantizer `package.module:Class` is in a module
            that is not imported.
    """
    # Files without `rule_bits` come from versions in which rules set only the bits of weights.
    knobs = {"rule_bits": "weights", **stored}
    knobs.pop("compensation", None)  # in older files
    training_knobs = {field.name for field in dataclasses.fields(QuantRecipe)}
    ptq_knobs = {field.name for field in dataclasses.fields(PtqRecipe)} - training_knobs
    recipe = PtqRecipe(**knobs) if ptq_knobs & set(stored) else QuantRecipe(**knobs)
    for name in custom_quantizers(recipe):
        check_imported("quantizer", name)
    return recipe


def custom_quantizers(recipe: QuantRecipe) -> list[str]:
    """Quantizers `package.module:Class` that a recipe or its overrides name, without duplicates."""
    rules: list[Mapping[str, Any]] = [vars(recipe), *recipe.overrides.values()]
    names = []
    for rule in rules:
        for knob in ("weight_quantizer", "act_quantizer"):
            name = rule.get(knob, "")
            if ":" in name and name not in names:
                names.append(name)
    return names


def check_imported(setting: str, name: str) -> None:
    """Raise `UsageError` unless the class `package.module:Class` is in an imported module.

    Names from files are never imported.
    """
    module, _, attribute = name.partition(":")
    # Do not use `getattr`, which could import other modules.
    names = vars(sys.modules[module]) if module in sys.modules else {}
    if not isinstance(names.get(attribute), type):
        raise UsageError(
            f"{setting}={name!r}: must be built in or from an imported module; "
            f"import it with model.imports=[{module}] "
            f"(in Python: qat.load(path, imports=[{module!r}]))"
        )
