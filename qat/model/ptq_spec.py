"""What post-training quantization does to a net: `PtqRecipe`, a `QuantRecipe` whose ranges are found on calibration images."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from qat.errors import UsageError
from qat.functional.observers import OBSERVERS
from qat.spec import QuantRecipe, QuantSpec, summed_axis
from qat.utils.validate import BLOCK_FLOATS, FLOAT_BITS, check_bits, check_text

# Powers of two tell the channels of sums apart; those of a weight have scales of their own, other activations one scale.
_WITHOUT_PTF = tuple(name for name in OBSERVERS if name != "ptf")
_CHOICES = {
    "rule_bits": ("both", "weights"),
    "placement": ("inputs", "fqvit"),
    "attention": ("standard", "float"),
    "weight_quantizer": ("affine", *BLOCK_FLOATS, "float"),
    "act_quantizer": ("affine", *BLOCK_FLOATS, "float"),
    "softmax_quantizer": ("affine", "log2", *BLOCK_FLOATS, "float"),
    "weight_observer": _WITHOUT_PTF,
    "act_observer": _WITHOUT_PTF,
    "residual_observer": OBSERVERS,
    "act_scales": ("tensor", "token", "channel"),
    "weight_scales": ("channel", "tensor"),
    "layernorm": ("float", "integer"),
    "method": ("calibrate", "compensate", "reconstruct"),
}
# What None stands for.
_FOLLOWS = {
    "act_bits": "bits",
    "softmax_bits": "act_bits",
    "outer_act_bits": "act_bits",
    "softmax_quantizer": "act_quantizer",
    "stem_bits": "bits",
    "head_bits": "bits",
    "residual_observer": "act_observer",
}
_OUTSIDE = ("stem_bits", "head_bits", "outer_act_bits")
# What floats in blocks can have: nothing else is defined by their scales alone.
_WITH_BLOCKS = {"method": "calibrate", "placement": "inputs", "bias_correction": False}
# Knobs of training, which `QuantRecipe` has; they mean nothing here.
_OF_TRAINING = ("qk_bias", "offsets", "map_scales", "step_init", "steps", "fits_int8")
# Axis of activations with more scales than one: heads of scores (B, h, N, M), channels of an image (B, C, H, W); the last one of all else.
_AXES: dict[str, dict[str, int | None]] = {
    "tensor": {},
    "token": {"image": None},
    "channel": {"scores": 1, "probs": 1, "image": 1},
}


@dataclass(frozen=True)
class PtqRecipe(QuantRecipe):
    """The knobs of `ptq/*.yaml`.

    Attributes:
        name: what the recipe is called in results.
        bits: width of the weights, those of the first convolution and the heads too.
        act_bits: width of all activations; None = `bits`.
        softmax_bits: width of attention probabilities; None = `act_bits`.
        stem_bits: weights of the first convolution; None = `bits`.
        head_bits: weights of the classifier(s); None = `bits`.
        outer_act_bits: width of the image and of what enters the classifier(s); None = `act_bits`.
        method: what follows the calibration: nothing (`calibrate`), a gain and a bias for each channel (`compensate`), or training block by
            block (`reconstruct`). After the last two the weights are not those of the float net any more.
        placement: `inputs` (what enters a product, as in training) or `fqvit` (what leaves a layer too; FQ-ViT, arXiv 2111.13824).
        attention: `standard`, or `float` (only the Linears of an attention are quantized).
        weight_quantizer: `affine`, `mxfp`, `nvfp4` (floats in blocks; stem and heads are affine then) or `float`.
        act_quantizer: the same.
        softmax_quantizer: the same, or `log2` (powers of two); None = `act_quantizer`.
        weight_observer: how the range of a weight is found, one of `OBSERVERS` but `ptf`.
        act_observer: how the range of an activation is found, one of `OBSERVERS` but `ptf`.
        residual_observer: how the range is found of sums on the residual stream (`fqvit`); `ptf` = a power of two per channel;
            None = `act_observer`.
        weight_signed: symmetric signed codes; False = unsigned ones with a zero point.
        act_signed: whether activations have a symmetric signed grid; probabilities are always unsigned.
        weight_scales: weights have a scale per output `channel`, or one for the `tensor`.
        act_scales: activations have a scale per `tensor`, `token` or `channel` (attention scores and probabilities: per head).
        bias_correction: give each output channel of a quantized weight the mean and the spread of the float one.
        layernorm: `float`, or `integer` arithmetic on the scales around it (`fqvit` only).
        overrides: `{module name glob: {knob: value}}`; later rules win.

    Raises:
        UsageError: a knob has a value that cannot work.
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
        *_OF_TRAINING,
    }

    def __post_init__(self) -> None:
        check_text("ptq.name", self.name)
        if self.name == "fp":
            raise UsageError(
                "ptq.name='fp': must be another name, as a recipe called fp leaves the model in float"
            )
        self._settle_rule_bits()
        for knob, source in _FOLLOWS.items():
            if getattr(self, knob) is None:
                object.__setattr__(self, knob, getattr(self, source))
        self._check_choices(_CHOICES, ("weight_signed", "act_signed", "bias_correction"))
        for knobs, quantizer in (
            (("bits", "stem_bits", "head_bits"), self.weight_quantizer),
            (("act_bits", "outer_act_bits"), self.act_quantizer),
            (("softmax_bits",), str(self.softmax_quantizer)),
        ):
            for knob in knobs:
                check_bits(
                    f"ptq.{knob}",
                    getattr(self, knob),
                    "" if knob in _OUTSIDE and quantizer in BLOCK_FLOATS else quantizer,
                )
        blocks = [
            q
            for q in (self.weight_quantizer, self.act_quantizer, str(self.softmax_quantizer))
            if q in BLOCK_FLOATS
        ]
        for knob, only in _WITH_BLOCKS.items():
            if blocks and getattr(self, knob) != only:
                raise UsageError(
                    f"ptq.{knob}={getattr(self, knob)!r}: must be {only} with {blocks[0]}"
                )
        if self.layernorm == "integer" and (self.placement, self.act_quantizer) != (
            "fqvit",
            "affine",
        ):
            raise UsageError(
                "ptq.layernorm='integer': needs the scales on both sides of a norm; must be with ptq.placement=fqvit"
            )
        self._check_overrides()

    def _with_following(self, rule: Mapping[str, Any]) -> dict[str, Any]:
        """A rule holds for one module, whatever enters it."""
        knobs = super()._with_following(rule)
        return ({"outer_act_bits": knobs["act_bits"]} if "act_bits" in knobs else {}) | knobs

    def weight_spec(self, place: str, role: str = "weight") -> QuantSpec:
        """Spec of a weight (out, ...) at `place`."""
        name, bits = (
            self._at(place, self.weight_quantizer),
            {"stem": self.stem_bits, "block": self.bits, "head": self.head_bits}[place],
        )
        return QuantSpec(
            role,
            name,
            FLOAT_BITS if name == "float" else int(bits or 0),
            signed=self.weight_signed,
            axis=summed_axis(role)
            if name in BLOCK_FLOATS
            else 0
            if self.weight_scales == "channel"
            else None,
            observer=self.weight_observer,
            bias_correction=self.bias_correction and name != "float",
        )

    @staticmethod
    def _at(place: str, quantizer: str) -> str:
        return "affine" if place != "block" and quantizer in BLOCK_FLOATS else quantizer

    def act_spec(self, role: str, place: str, *, signed: bool | None = True) -> QuantSpec:
        """Spec of an activation; its sign does not matter: the zero point serves any range.

        Args:
            role: one of `ROLES` and `OUTPUT_ROLES` but `weight` and `qk`.
            place: one of `PLACES`.
            signed: as `QuantRecipe` has it.
        """
        name, bits = (
            self._at(place, self.act_quantizer),
            self.act_bits if place == "block" else self.outer_act_bits,
        )
        if role == "probs":
            name, bits = str(self.softmax_quantizer), self.softmax_bits
        if self.attention == "float" and role in {"q", "k", "v", "qkv", "scores", "probs"}:
            name = "float"
        observer = self.residual_observer if role == "residual" else self.act_observer
        usual = {"tensor": None, "token": -2, "channel": -1}[self.act_scales]
        axis = (
            summed_axis(role)
            if name in BLOCK_FLOATS
            else -1
            if observer == "ptf"
            else _AXES[self.act_scales].get(role, usual)
        )
        return QuantSpec(
            role,
            name,
            FLOAT_BITS if name == "float" else int(bits or 0),
            signed=self.act_signed and role != "probs",
            axis=axis,
            map_scales="tensor" if axis is None or axis == -2 else "column",
            observer=observer,
        )


def recipe_from(stored: Mapping[str, Any]) -> QuantRecipe:
    """The recipe of a checkpoint, of the kind whose knobs it has.

    Args:
        stored: what `to_dict` gave.

    Raises:
        TypeError: a knob is none of either kind.
        UsageError: a value that cannot work, a quantizer `package.module:Class` of a module that is not imported.
    """
    known = {
        "rule_bits": "weights",
        **stored,
    }  # in a file without it, rules have never set other bits
    known.pop("compensation", None)  # of older files
    names = {f.name for f in dataclasses.fields(PtqRecipe)} - {
        f.name for f in dataclasses.fields(QuantRecipe)
    }
    recipe = PtqRecipe(**known) if names & set(stored) else QuantRecipe(**known)
    for name in custom_quantizers(recipe):
        check_imported("quantizer", name)
    return recipe


def custom_quantizers(recipe: QuantRecipe) -> list[str]:
    """The quantizers `package.module:Class` that a recipe names, its overrides included."""
    rules: list[Mapping[str, Any]] = [vars(recipe), *recipe.overrides.values()]
    named = [rule.get(knob, "") for rule in rules for knob in ("weight_quantizer", "act_quantizer")]
    return [name for name in dict.fromkeys(named) if ":" in name]


def check_imported(setting: str, name: str) -> None:
    """Raise `UsageError` unless the class `package.module:Class` is there already: nothing that a file names is imported."""
    module, _, attribute = name.partition(":")
    # Of the module's own names: a lookup of another one might import further modules.
    if not isinstance(
        vars(sys.modules[module]).get(attribute) if module in sys.modules else None, type
    ):
        hint = f"model.imports=[{module}], in Python qat.load(path, imports=[{module!r}])"
        raise UsageError(
            f"{setting}={name!r}: must be built in or from an imported module; a file never imports one: {hint}"
        )
