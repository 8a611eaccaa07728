"""Structured configs: which settings the commands have, of which types, and what each may be.

`conf/` has the defaults that a user reads; here are types and checks. A composed config is merged into them when its task begins, not when
Hydra composes it: the `config.yaml` of an older run and each job of a sweep are then checked as any other, and `--help` answers at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qat.cli.arguments import PATHS
from qat.cli.entry import in_one_line
from qat.data.image_data import SPLITS
from qat.errors import UsageError
from qat.lit.optim import INTERVALS
from qat.model.checkpoint import FORMATS
from qat.nn.execution import MEMORY
from qat.utils.validate import check_bits, check_choice, check_int, check_number

COMMANDS = ("train", "eval", "ptq", "analyze", "export")
EXPORT_FORMATS = ("onnx", "packed")
INITS = ("full", "reference")
HIGHEST_SEED = 2**32 - 1  # numpy's


@dataclass
class Model:
    """`model.*`; `args` go to `timm.create_model`, `own_window` is what those of a Swin are made of."""

    name: str | None = None
    row: str | None = None
    pretrained: bool = False
    weights: str | None = None
    reset_head: bool = False
    imports: list[str] | None = None
    init: str = INITS[0]
    grad_checkpointing: bool = False
    own_window: int | None = None
    args: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_choice("model.init", self.init, INITS)


@dataclass
class TeacherSettings:
    """`teacher.*`: the net that a distilling loss or a search follows."""

    model: str | None = None
    ckpt: str | None = None
    pretrained: bool = False


@dataclass
class CheckpointSettings:
    """`checkpoint.*`."""

    every_n_steps: int | None = None


@dataclass
class Schedule:
    """`scheduler.*`: epochs may be fractions."""

    interval: str
    warmup_epochs: float
    warmup_lr: float
    cooldown_epochs: float
    min_lr: float

    def __post_init__(self) -> None:
        check_choice("scheduler.interval", self.interval, INTERVALS)
        for name in ("warmup_epochs", "warmup_lr", "cooldown_epochs", "min_lr"):
            check_number(f"scheduler.{name}", getattr(self, name), 0)


@dataclass
class Loss:
    """`loss.*`: the terms, and the numbers that several of them refer to, which their own classes check."""

    terms: dict[str, Any]
    regularizers: dict[str, Any] = field(default_factory=dict)
    label_smoothing: Any = None
    hard_weight: Any = None
    temperature: Any = None
    teacher_head: Any = None
    kure: Any = None
    kure_target: Any = None
    kure_reduction: Any = None
    kure_layers: Any = None
    kure_qk: Any = None
    grad_l1: Any = None
    grad_l1_layers: Any = None
    features: Any = None
    features_blocks: Any = None
    features_schedule: Any = None


@dataclass
class Format:
    """`format.*` of `export.py`."""

    name: str
    target: str | None = None
    two_bit: str | None = None

    def __post_init__(self) -> None:
        check_choice("format.name", self.name, EXPORT_FORMATS)


@dataclass
class Settings:
    """All settings of all commands. What makes an object is checked by its class: `data`, `quant`, `ptq`, `search`, `callbacks` ..."""

    command: str
    seed: int
    run_dir: str
    model: Model = field(default_factory=Model)
    data: dict[str, Any] = field(default_factory=dict)
    default_data: dict[str, Any] = field(default_factory=dict)
    default_photos: dict[str, Any] = field(default_factory=dict)
    quant: dict[str, Any] = field(default_factory=dict)
    ptq: dict[str, Any] = field(default_factory=dict)
    loss: Loss | None = None
    optimizer: dict[str, Any] = field(default_factory=dict)
    scheduler: Schedule | None = None
    trainer: dict[str, Any] = field(default_factory=dict)
    callbacks: dict[str, Any] | None = None
    logger: dict[str, Any] | None = None
    search: dict[str, Any] | None = None
    analysis: dict[str, Any] | None = None
    format: Format | None = None
    teacher: TeacherSettings = field(default_factory=TeacherSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    ckpt: Any = None  # analyze.py takes a list as well
    ckpt_format: str = FORMATS[0]
    ckpt_optimizer: bool = False
    ckpt_bits: int | None = None
    ckpt_act_bits: int | None = None
    compile: bool | str = False
    memory: str = MEMORY[0]
    kernels: str = "auto"
    lsq_grad_batch: str = "global"
    report: bool = True
    resume: bool | str = False
    allow_changed_data: bool = False
    overwrite: bool = False
    sweep_dir: str | None = None
    predict: str | None = None
    run: str | None = None
    sweep: str | None = None
    labels: Any = None
    images: int | None = None
    split: str | None = None
    file: str | None = None
    dynamic_batch: bool = True
    latency: int = 0

    def __post_init__(self) -> None:
        check_choice("command", self.command, COMMANDS)
        check_int("seed", self.seed, 0, HIGHEST_SEED)
        check_choice("ckpt_format", self.ckpt_format, FORMATS)
        check_choice("memory", self.memory, MEMORY)
        if self.resume not in {True, False, "auto"}:
            raise UsageError(f"resume={self.resume!r}: must be one of false, true, auto")
        for name in ("ckpt_bits", "ckpt_act_bits"):
            bits = getattr(self, name)
            if bits is not None:
                check_bits(name, bits)
                if not self.ckpt:
                    raise UsageError(f"{name}={bits!r}: only for files of the paper's code (ckpt_format=ofq); set ckpt=FILE")
        if self.images is not None:
            check_int("images", self.images, 1)
        if self.split is not None:
            check_choice("split", self.split, SPLITS)


def conform(cfg: DictConfig) -> None:
    """Give a composed config the types of `Settings` in place: `overwrite=no` is false. What it does not have stays away.

    Raises:
        UsageError: a key that no command has, a value of another type, or one that cannot work.
    """
    try:
        typed = OmegaConf.merge(OmegaConf.structured(Settings), cfg)
        cfg.merge_with(_of(OmegaConf.to_container(typed), OmegaConf.to_container(cfg)))
        typed.model.args = {}  # may refer to data that only the checkpoint knows
        OmegaConf.to_object(typed)
    except OmegaConfBaseException as error:
        raise UsageError(f"config: {in_one_line(error)}") from error
    for name in ("loss", "scheduler", "format"):
        if name in cfg and cfg[name] is None:
            raise UsageError(f"{name}=None: must be a group of settings")
    for name in PATHS:
        value = OmegaConf.select(cfg, name)
        for one in value if OmegaConf.is_list(value) and cfg.command == "analyze" else [value]:
            check_path(name, one)


def _of(typed: Any, given: Any) -> Any:
    """The typed values of the keys that were given."""
    return {key: _of(typed[key], value) for key, value in given.items()} if isinstance(given, dict) else typed


def check_path(setting: str, value: object) -> None:
    """Raise `UsageError` unless `value` is a text that can be a path, or None: an empty one is a variable of a shell that is not set."""
    if value is not None and not (isinstance(value, str) and value and "\0" not in value):
        raise UsageError(f"{setting}={value!r}: must be a path{'' if value else '; null = none'}")
    try:
        Path(value or ".").exists()
    except OSError as error:  # a name too long, a folder that may not be entered
        raise UsageError(f"{setting}={value!r}: cannot be looked at ({error.strerror})") from error
