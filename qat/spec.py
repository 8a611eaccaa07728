"""Quantization settings: a `QuantSpec` for each tensor, and a `QuantRecipe` for each model.

Both are frozen dataclasses of plain data. A new recipe checks all its values, a new spec only some.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from qat.errors import UsageError
from qat.utils.validate import (
    BLOCK_FLOATS,
    FLOAT_BITS,
    FP8,
    check_bits,
    check_bool,
    check_choice,
    check_text,
    unknown_message,
)

ROLES = ("weight", "input", "q", "k", "v", "qk", "probs", "image")
# Outputs of layers, which only post-training quantization rounds.
OUTPUT_ROLES = ("qkv", "scores", "output", "residual")
PLACES = ("stem", "block", "head")
QUANTIZERS = ("statsq", "statsq_rms", "lsq", "seq", "minmax", *BLOCK_FLOATS, "fp8", "float")
WEIGHT_QUANTIZERS = (*QUANTIZERS, "dorefa")
ACT_QUANTIZERS = (*QUANTIZERS, "fp8_held")
OFFSETS = ("none", "before", "both")
_CHOICES = {
    "rule_bits": ("both", "weights"),
    "attention": ("qkr", "standard", "float"),
    "qk_bias": ("drop", "fold"),
    "map_scales": ("tensor", "column"),
    "offset_init": ("zero", "minimum"),
    "step_init": ("lsq", "mse"),
    "steps": ("relative", "absolute"),
    "act_scales": ("token", "tensor"),
}
# Maps the weight quantizer of blocks to that of stem and heads; see OFQ's paper, section 3.
_OUTER_QUANTIZERS = dict.fromkeys(("statsq", "statsq_rms", "seq", "dorefa", *BLOCK_FLOATS), "lsq")
# With `minmax`, each forward computes the ranges of weights; those of activations are calibrated.
_WEIGHT_VARIANT = {"minmax": "minmax_dynamic"}


def check_quantizer(setting: str, name: object, allowed: Sequence[str] = QUANTIZERS) -> None:
    """Raise `UsageError` unless `name` is one of `allowed` or `package.module:Class`."""
    if name in allowed:
        return
    parts = name.replace(":", ".").split(".") if isinstance(name, str) else []
    if str(name).count(":") == 1 and parts and all(part.isidentifier() for part in parts):
        return
    raise UsageError(
        f"{setting}={name!r}: must be one of {', '.join(allowed)} or package.module:Class"
    )


@dataclass(frozen=True)
class QuantSpec:
    """How one tensor is quantized.

    Specs that differ only in `offset_init`, `step_init`, `steps` or `observer` are equal.

    Attributes:
        role: kind of tensor, one of `ROLES` or `OUTPUT_ROLES`.
        quantizer: registered name, or `package.module:Class`.
        bits: bits of a code; 32 with the float quantizer.
        signed: True = codes in [-2^(b-1), 2^(b-1)-1]; False = [0, 2^b-1]; None = decided by data.
        axis: dimension along which scales differ; None = one scale for the tensor. For
            `BLOCK_FLOATS`, the dimension along which blocks extend; None = channels (B, C, H, W).
        offsets: learnable offsets around the quantizer: none, before it, or both before and after.
        offset_ndim: number of dimensions of an offset: 1 = channels, 2 = a map over pixels.
        offset_init: see `QuantRecipe`.
        map_scales: see `QuantRecipe`; `column` = scales along `axis`.
        step_init: see `QuantRecipe`.
        steps: how step sizes are learned: `relative` to their initial value, or `absolute`.
        observer: method by which post-training quantization chooses the range.
        bias_correction: True = every row of a fake-quantized weight keeps the mean and the standard
            deviation of the float row.

    Raises:
        UsageError: `role`, `bits` or `offsets` is not allowed.
    """

    role: str
    quantizer: str
    bits: int
    signed: bool | None = True
    axis: int | None = None
    offsets: str = "none"
    offset_ndim: int = 1
    offset_init: str = field(default="zero", compare=False)
    map_scales: str = "tensor"
    step_init: str = field(default="lsq", compare=False)
    steps: str = field(default="absolute", compare=False)
    observer: str | None = field(default=None, compare=False)
    bias_correction: bool = False

    def __post_init__(self) -> None:
        check_choice("role", self.role, ROLES + OUTPUT_ROLES)
        check_bits("bits", self.bits, self.quantizer)
        check_choice("offsets", self.offsets, OFFSETS)

    @property
    def qmin(self) -> int:
        """Lowest code; if `signed` is None, the lowest unsigned code."""
        return -(2 ** (self.bits - 1)) if self.signed else 0

    @property
    def qmax(self) -> int:
        """Highest code; if `signed` is None, the highest unsigned code."""
        return 2 ** (self.bits - 1) - 1 if self.signed else 2**self.bits - 1


# For each role of activations: sign, axis and offsets, as in OFQ. Axis -2 is the token or query
# position, -1 the channel, and 1 the channel of an image. Keys have no offset after the quantizer,
# because it would only shift whole rows of the softmax.
_ACTIVATIONS: dict[str, dict[str, Any]] = {
    "input": {"signed": True, "axis": -2, "offsets": "both"},
    "q": {"signed": True, "axis": -2, "offsets": "both"},
    "k": {"signed": True, "axis": -2, "offsets": "before"},
    "v": {"signed": True, "axis": -1, "offsets": "both"},
    "probs": {"signed": False, "axis": -2},
    "image": {"signed": None, "axis": 1, "offsets": "both", "offset_ndim": 2},
}


def summed_axis(role: str) -> int:
    """Dimension of a tensor over which a matrix product sums.

    For values, this is the dimension of tokens; for a weight (out, in, ...), the input channels;
    for other tensors, the last dimension.
    """
    return {"v": -2, "weight": 1}.get(role, -1)


# Activations that `attention=float` leaves in float.
_ATTN_ROLES = ("q", "k", "v", "probs")


@dataclass(frozen=True)
class QuantRecipe:
    """Quantization of a whole model: the settings of `quant/*.yaml`.

    Attributes:
        name: a name for results, such as that of its preset; `fp` leaves a model in float.
        bits: bits of the weights in blocks: 2 to 8, or 32 with the float quantizer.
        act_bits: bits of the activations in blocks; None = `bits`.
        attention: `qkr` (query-key reparameterization); `standard`; or `float`, which quantizes
            only the linear layers of an attention.
        qk_bias: what QKR does with the query bias: `drop` it as OFQ's code does, or `fold` it
            exactly into a number that is added to the scores of each key.
        weight_quantizer: one of `WEIGHT_QUANTIZERS`, or `package.module:Class`. In stem and heads,
            `lsq` replaces some quantizers.
        act_quantizer: one of `ACT_QUANTIZERS`, or `package.module:Class`.
        stem_bits: bits of the weights and input of the first convolution.
        head_bits: bits of the weights and input of heads: classifiers and other last layers.
        offsets: True = learnable offsets around activation quantizers, where OFQ has them.
        offset_init: initial value of these offsets: `zero`, as in OFQ; or `minimum` = unsigned
            codes start at the lowest value of the input, so that the negative values of a GELU are
            not all rounded to 0 (LSQ+, arXiv 2004.09576).
        map_scales: scales of feature maps (B, H, W, C) before linear layers, as in Swin's MLPs: one
            scale per `tensor`, which works at any resolution, or one per `column` of the map, as in
            OFQ's code.
        step_init: initial value of learned step sizes: `lsq` = from the mean magnitude, as in the
            LSQ paper; `mse` = the step size with the least squared error.
        steps: how step sizes are learned: `relative` to their initial value, s0 * exp(t), which
            cannot reach zero; or `absolute`, as in the LSQ paper and OFQ's code.
        act_scales: step sizes of most activations: one per `token` (query of probabilities, channel
            of values or images), as in OFQ, or one per `tensor`.
        fits_int8: True = no code of an activation exceeds 127, as TensorRT requires. At 8 bits,
            attention probabilities then have 7 bits; other unsigned codes become signed.
        overrides: `{module name glob: {setting: value}}`; later rules win.
        rule_bits: what `bits` sets in a rule of `overrides`: the bits of `both` weights and
            activations (always in stem and heads), or only of `weights`; None = `weights` if
            `act_bits` is set, else `both`. Recipes of older files lack it; there it is `weights`.

    Raises:
        UsageError: a setting has a value that is not allowed.
    """

    name: str = "custom"
    bits: int = 4
    act_bits: int | None = None
    attention: str = "qkr"
    qk_bias: str = "drop"
    weight_quantizer: str = "statsq"
    act_quantizer: str = "lsq"
    stem_bits: int = 8
    head_bits: int = 8
    offsets: bool = True
    offset_init: str = "zero"
    map_scales: str = "tensor"
    step_init: str = "lsq"
    steps: str = "absolute"
    act_scales: str = "token"
    fits_int8: bool = False
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    rule_bits: str | None = None

    # Config group. In training, quantizers are at the inputs of products, and norms are float.
    GROUP: ClassVar[str] = "quant"
    placement: ClassVar[str] = "inputs"
    layernorm: ClassVar[str] = "float"
    # Settings that a rule of `overrides` cannot set.
    NET_WIDE: ClassVar[frozenset[str]] = frozenset({"name", "overrides", "rule_bits"})

    def __post_init__(self) -> None:
        check_text("quant.name", self.name)
        self._settle_rule_bits()
        if self.act_bits is None:
            object.__setattr__(self, "act_bits", self.bits)
        check_quantizer("quant.weight_quantizer", self.weight_quantizer, WEIGHT_QUANTIZERS)
        check_quantizer("quant.act_quantizer", self.act_quantizer, ACT_QUANTIZERS)
        self._check_unchanged_if_float()
        all_float = "float" if self.weight_quantizer == self.act_quantizer == "float" else ""
        check_bits("quant.bits", self.bits, self.weight_quantizer)
        check_bits("quant.act_bits", self.act_bits, self.act_quantizer)
        for quantizer in (self.weight_quantizer, self.act_quantizer):
            outer_quantizer = quantizer if quantizer in FP8 else all_float
            check_bits("quant.stem_bits", self.stem_bits, outer_quantizer)
            check_bits("quant.head_bits", self.head_bits, outer_quantizer)
        self._check_choices(_CHOICES, ("offsets", "fits_int8"))
        if self.offsets and self.act_quantizer in (*BLOCK_FLOATS, *FP8):
            raise UsageError(f"quant.offsets=true: must be false with {self.act_quantizer}")
        if self.fits_int8 and self.act_quantizer == "minmax":
            raise UsageError("quant.fits_int8=true: must be false with minmax (codes up to 255)")
        self._check_overrides()

    def _check_unchanged_if_float(self) -> None:
        if self.name != "fp":
            return
        for knob, float_value in {**PRESETS["fp"], "act_bits": FLOAT_BITS}.items():
            value = getattr(self, knob)
            if value != float_value:
                raise UsageError(
                    f"quant.{knob}={value!r}: quant=fp leaves the model in float; "
                    "choose another quant=... to set it"
                )

    def _settle_rule_bits(self) -> None:
        """Set `rule_bits` if it is None. Call this before `act_bits` gets its default."""
        if self.rule_bits is None:
            object.__setattr__(self, "rule_bits", "both" if self.act_bits is None else "weights")

    def _check_choices(
        self, choices: Mapping[str, tuple[str, ...]], switches: Sequence[str]
    ) -> None:
        for knob, allowed in choices.items():
            check_choice(f"{self.GROUP}.{knob}", getattr(self, knob), allowed)
        for knob in switches:
            check_bool(f"{self.GROUP}.{knob}", getattr(self, knob))

    def _check_overrides(self) -> None:
        if self.overrides is None:  # an empty entry of a yaml file
            object.__setattr__(self, "overrides", {})
        is_mapping = isinstance(self.overrides, Mapping)
        if not is_mapping or not all(isinstance(pattern, str) for pattern in self.overrides):
            raise UsageError(
                f"{self.GROUP}.overrides={self.overrides!r}: "
                "must be {module glob: {setting: value}}"
            )
        knobs = {f.name for f in dataclasses.fields(self)} - self.NET_WIDE
        for pattern, rule in self.overrides.items():
            if not isinstance(rule, Mapping) or set(rule) - knobs:
                raise UsageError(
                    f"{self.GROUP}.overrides[{pattern!r}]={rule!r}: "
                    f"must be {{setting: value}} with settings among {', '.join(sorted(knobs))}"
                )
            self._with_knobs(pattern, self._with_implied_bits(rule))  # checks the values
        object.__setattr__(self, "overrides", {p: dict(rule) for p, rule in self.overrides.items()})

    def at(self, module_name: str, *aliases: str) -> QuantRecipe:
        """The recipe for one module: rules of `overrides` apply if they match a name of the module.

        The `bits` of a rule also set `stem_bits` and `head_bits`, and with `rule_bits=both` also
        `act_bits`, unless the rule sets these itself.

        Raises:
            UsageError: rules that match the module exclude each other.
        """
        knobs: dict[str, Any] = {}
        for pattern, rule in self.overrides.items():
            if fnmatch.filter((module_name, *aliases), pattern):
                knobs |= self._with_implied_bits(rule)
        return self._with_knobs(module_name, knobs) if knobs else self

    def _with_knobs(self, where: str, knobs: Mapping[str, Any]) -> QuantRecipe:
        try:
            return dataclasses.replace(self, overrides={}, **knobs)
        except UsageError as error:
            raise UsageError(f"{self.GROUP}.overrides[{where!r}]: {error}") from error

    def _with_implied_bits(self, rule: Mapping[str, Any]) -> dict[str, Any]:
        """A rule, plus the settings that its `bits` imply; explicit settings win."""
        if "bits" not in rule:
            return dict(rule)
        knobs = {"stem_bits": rule["bits"], "head_bits": rule["bits"]}
        if self.rule_bits == "both":
            knobs["act_bits"] = rule["bits"]
        return knobs | dict(rule)

    def weight_spec(self, place: str, role: str = "weight") -> QuantSpec:
        """The spec of a weight (out, ...) at `place`; `role` is `weight` or `qk`.

        There is one scale per output row; DoReFa has one scale, and block floats one per block.
        """
        name = self.weight_quantizer
        if place != "block":
            name = _OUTER_QUANTIZERS.get(name, name)
        bits = {"stem": self.stem_bits, "block": self.bits, "head": self.head_bits}[place]
        bits = FLOAT_BITS if name == "float" else bits
        axis: int | None = summed_axis(role) if name in BLOCK_FLOATS else 0
        if name == "dorefa":  # DoReFa uses one range for the whole weight
            axis = None
        return QuantSpec(
            role,
            _WEIGHT_VARIANT.get(name, name),
            bits,
            signed=True,
            axis=axis,
            step_init=self.step_init,
            steps=self.steps,
        )

    def act_spec(self, role: str, place: str, *, signed: bool | None = True) -> QuantSpec:
        """The spec of an activation.

        Args:
            role: any of `ROLES`, except `weight` and `qk`.
            place: one of `PLACES`; the input of a head has one scale for the tensor.
            signed: False for an `input` that comes from an activation function with at most a small
                negative tail. Ignored for other roles.
        """
        layout = dict(_ACTIVATIONS[role])
        if role == "input":
            layout |= {"signed": bool(signed), "map_scales": self.map_scales}
        if place == "head" or self.act_scales == "tensor":
            layout["axis"] = None
        bits = {"stem": self.stem_bits, "block": self.act_bits, "head": self.head_bits}[place]
        name = "float" if self.attention == "float" and role in _ATTN_ROLES else self.act_quantizer
        if place != "block" and name in BLOCK_FLOATS:
            name = "lsq"
        if name in BLOCK_FLOATS:
            layout["axis"] = summed_axis(role)
        elif name in FP8:
            layout = {"axis": None, "signed": True}
        elif self.fits_int8 and bits == 8 and not layout["signed"]:
            if role == "probs":
                bits = 7
            else:
                layout["signed"] = True
        if not self.offsets or name == "float":
            layout["offsets"] = "none"
        return QuantSpec(
            role,
            name,
            FLOAT_BITS if name == "float" else int(bits or 0),  # never 0; narrows the type
            offset_init=self.offset_init,
            step_init=self.step_init,
            steps=self.steps,
            **layout,
        )

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain data for a checkpoint; `qat.model.ptq_spec.recipe_from` reads it."""
        return dataclasses.asdict(self)


_OFQ = {"weight_quantizer": "statsq", "act_quantizer": "lsq", "steps": "relative"}

# Settings that integer kernels support: symmetric codes, one step size for an activation, one step
# size for each output of a weight, and no offsets.
_DEPLOY: dict[str, Any] = {
    "name": "deploy",
    "attention": "standard",
    "weight_quantizer": "lsq",
    "act_quantizer": "lsq",
    "offsets": False,
    "step_init": "mse",
    "steps": "relative",
    "act_scales": "tensor",
    "fits_int8": True,
}

# Settings of float formats; with block floats, stem and heads have LSQ quantizers without offsets.
_BLOCK_FLOATS: dict[str, Any] = {
    "attention": "standard",
    "bits": 4,
    "offsets": False,
    "step_init": "mse",
    "steps": "relative",
}

PRESETS: dict[str, dict[str, Any]] = {
    "fp": {
        "bits": FLOAT_BITS,
        "stem_bits": FLOAT_BITS,
        "head_bits": FLOAT_BITS,
        "attention": "float",
        "weight_quantizer": "float",
        "act_quantizer": "float",
        "offsets": False,
    },
    "ofq": {**_OFQ, "attention": "qkr"},
    "ofq_noqkr": {**_OFQ, "attention": "standard"},
    "statsq": {**_OFQ, "attention": "standard", "act_quantizer": "float"},
    "lsq": {
        "attention": "standard",
        "weight_quantizer": "lsq",
        "act_quantizer": "lsq",
        "offsets": False,
        "steps": "relative",
    },
    "seq": {
        "attention": "standard",
        "weight_quantizer": "seq",
        "act_quantizer": "seq",
        "step_init": "mse",
        "steps": "relative",
        "offset_init": "minimum",
        # Attention outputs are often near zero, and a grid with half steps does not contain zero.
        "overrides": {"*.attn.proj": {"act_quantizer": "lsq"}},
    },
    "minmax": {
        "attention": "standard",
        "weight_quantizer": "minmax",
        "act_quantizer": "minmax",
        "offsets": False,
    },
    "deploy_w8a8": {**_DEPLOY, "bits": 8},
    "deploy_w4a8": {**_DEPLOY, "bits": 4, "act_bits": 8},
    "deploy_w4a4": {**_DEPLOY, "bits": 4},
    "mxfp4": {**_BLOCK_FLOATS, "weight_quantizer": "mxfp", "act_quantizer": "mxfp"},
    "nvfp4": {**_BLOCK_FLOATS, "weight_quantizer": "nvfp4", "act_quantizer": "nvfp4"},
    "fp8": {
        **{**_BLOCK_FLOATS, "bits": 8, "attention": "float"},
        "weight_quantizer": "fp8",
        "act_quantizer": "fp8",
    },
}

# Further names for `quant=`, each with its preset and the bits that it sets.
CHOICES: dict[str, tuple[str, dict[str, int]]] = {
    f"{preset}_{bits}bit": (preset, {"bits": bits})
    for preset in ("lsq", "ofq", "ofq_noqkr", "seq", "statsq")
    for bits in (2, 3, 4)
} | {
    "minmax_4bit": ("minmax", {"bits": 4}),
    "minmax_8bit": ("minmax", {"bits": 8}),
    "mxfp4_w4a4": ("mxfp4", {}),
    "mxfp4_w4a8": ("mxfp4", {"act_bits": 8}),
    "nvfp4_w4a4": ("nvfp4", {}),
    "fp8_w8a8": ("fp8", {}),
}
# Our settings, and what other tools call them.
ALIASES = {
    "bits": "wbits w_bits weight_bits nbits n_bits",
    "act_bits": "abits a_bits activation_bits",
}


def recipe(name: str | None = None, **knobs: Any) -> QuantRecipe:
    """Return a named recipe, with some settings changed.

    Args:
        name: one of `PRESETS`: fp, ofq, ofq_noqkr, statsq (only weights), lsq, seq, minmax,
            deploy_w8a8, deploy_w4a8, deploy_w4a4, mxfp4 and nvfp4 (blocks of 4-bit floats; mxfp4
            also allows `act_bits=8`), fp8; or a choice of `quant=`, such as seq_2bit.
        knobs: fields of `QuantRecipe` to change; rules of `overrides` extend the recipe's own.

    Raises:
        UsageError: the name is unknown, or a value is not allowed.
        TypeError: a setting is unknown.

    Examples:
        >>> recipe("ofq", bits=2).act_bits
        2
    """
    knob_names = [knob.name for knob in dataclasses.fields(QuantRecipe)]
    our_names = {other: knob for knob, others in ALIASES.items() for other in others.split()}
    for knob, value in knobs.items():
        if knob in our_names:
            raise TypeError(f"recipe: {knob}={value!r}: must be {our_names[knob]}={value!r}")
        if knob not in knob_names:
            raise TypeError(f"recipe: {unknown_message(knob, knob, knob_names)}")
    check_choice("recipe", name, (*PRESETS, *CHOICES))
    preset, preset_bits = CHOICES.get(str(name), (str(name), {}))
    rules = knobs.get("overrides")
    if isinstance(rules, Mapping | None):
        rules_by_pattern = dict(PRESETS[preset].get("overrides", {}))
        for pattern, rule in (rules or {}).items():
            own_rule = rules_by_pattern.pop(pattern, {})  # the new rule has the last place
            rules_by_pattern[pattern] = {**own_rule, **rule} if isinstance(rule, Mapping) else rule
        knobs["overrides"] = rules_by_pattern
    return QuantRecipe(**{"name": preset, **PRESETS[preset], **preset_bits, **knobs})
