"""Settings of the commands: names, types and allowed values.

`conf/` contains the defaults that a user reads. Hydra merges them into these schemas
(`qat.tasks.conf`), and so refuses unknown keys and wrong types; `check` checks the values when a
task begins. Groups that build an object (`data`, `quant`, `callbacks` ...) are checked by the class
of the object. Nothing heavy is imported here, so that `--help` is fast.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from qat.errors import UsageError
from qat.utils.validate import check_bits, check_choice, check_int, check_number, unknown_message

SPLITS = ("train", "val", "test")
CKPT_FORMATS = ("auto", "qat", "timm", "ofq")
MAX_SEED = 2**32 - 1  # numpy accepts no higher seed


@dataclass
class Model:
    """`model.*`; `args` go to `timm.create_model`.

    `own_window` is the window size, in patches, of a Swin's pretrained weights.
    """

    name: str | None = None
    row: str | None = None
    pretrained: bool = False
    # Paths do not have the type str, because OmegaConf would turn a path 1.10 into "1.1" before the
    # check.
    weights: Any = None
    reset_head: bool = False
    imports: list[str] | None = None
    init: str = "full"
    grad_checkpointing: bool = False
    own_window: int | None = None
    args: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_choice("model.init", self.init, ("full", "reference"))
        check_path("model.weights", self.weights)


@dataclass
class SearchTeacher:
    """`teacher.*` of a search: the model whose logits are the targets."""

    ckpt: Any = None

    def __post_init__(self) -> None:
        check_path("teacher.ckpt", self.ckpt)


@dataclass
class LossTeacher(SearchTeacher):
    """`teacher.*` of a distillation loss."""

    model: str | None = None
    pretrained: bool = False


@dataclass
class Schedule:
    """`scheduler.*`: epochs may be fractional with `interval=step`."""

    interval: str
    warmup_epochs: float
    warmup_lr: float
    cooldown_epochs: float
    min_lr: float

    def __post_init__(self) -> None:
        check_choice("scheduler.interval", self.interval, ("epoch", "step"))
        # Epochs are checked together with trainer.max_epochs.
        for name in ("warmup_lr", "min_lr"):
            check_number(f"scheduler.{name}", getattr(self, name), 0)


@dataclass(kw_only=True)
class Shared:
    """Settings of all commands."""

    command: str
    seed: int
    run_dir: Any
    sweep_dir: str | None = None
    report: bool
    ckpt: Any = None  # a path; analyze.py also accepts a list of paths
    ckpt_format: str = CKPT_FORMATS[0]
    ckpt_bits: int | None = None
    ckpt_act_bits: int | None = None
    model: Model = field(default_factory=Model)
    data: dict[str, Any] = field(default_factory=dict)
    logger: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        check_int("seed", self.seed, 0, MAX_SEED)
        check_choice("ckpt_format", self.ckpt_format, CKPT_FORMATS)
        for name in ("run_dir", "predict", "run", "sweep", "file"):
            check_path(name, getattr(self, name, None))
        check_path("data.root", self.data.get("root"))
        paths = [self.ckpt]
        if self.command == "analyze" and isinstance(self.ckpt, list) and self.ckpt:
            paths = self.ckpt
        for path in paths:
            check_path("ckpt", path)
        self._check_weight_sources()
        # Settings that some commands have.
        resume = getattr(self, "resume", False)
        if resume not in {True, False, "auto"}:
            raise UsageError(f"resume={resume!r}: must be one of false, true, auto")
        images = getattr(self, "images", None)
        if images is not None:
            check_int("images", images, 1)
        split = getattr(self, "split", None)
        if split is not None:
            check_choice("split", split, SPLITS)
        self._check_bits()

    def _check_weight_sources(self) -> None:
        weight_sources = {
            "ckpt": self.ckpt,
            "model.weights": self.model.weights,
            "model.pretrained": self.model.pretrained,
        }
        names = [name for name, value in weight_sources.items() if value]
        if len(names) > 1:
            raise UsageError(
                f"{' and '.join(names)} are set: a model starts from one of them; set only one"
            )

    def _check_bits(self) -> None:
        for name in ("ckpt_bits", "ckpt_act_bits"):
            bits = getattr(self, name)
            if bits is None:
                continue
            check_bits(name, bits)
            if not self.ckpt:
                raise UsageError(
                    f"{name}={bits!r}: works only with files of OFQ's own code "
                    "(ckpt_format=ofq); set ckpt=FILE"
                )


@dataclass(kw_only=True)
class Train(Shared):
    """`conf/train.yaml`."""

    quant: dict[str, Any]
    loss: dict[str, Any]
    optimizer: dict[str, Any]
    scheduler: Schedule
    trainer: dict[str, Any]
    callbacks: dict[str, Any] | None = None
    teacher: LossTeacher = field(default_factory=LossTeacher)
    checkpoint: dict[str, Any]
    compile: bool | str
    memory: str
    kernels: str
    lsq_grad_batch: str
    resume: bool | str
    allow_changed_data: bool
    overwrite: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("memory", self.memory, ("save", "recompute"))


@dataclass(kw_only=True)
class Eval(Shared):
    """`conf/eval.yaml`."""

    trainer: dict[str, Any]
    default_data: dict[str, Any]
    default_photos: dict[str, Any]
    kernels: str
    split: str | None
    predict: Any


@dataclass(kw_only=True)
class Ptq(Shared):
    """`conf/ptq.yaml`."""

    trainer: dict[str, Any]
    default_data: dict[str, Any]
    ptq: dict[str, Any]
    search: dict[str, Any] = field(default_factory=dict)
    teacher: SearchTeacher = field(default_factory=SearchTeacher)
    resume: bool | str
    overwrite: bool


@dataclass(kw_only=True)
class Analyze(Shared):
    """`conf/analyze.yaml`."""

    trainer: dict[str, Any]
    default_data: dict[str, Any]
    analysis: dict[str, Any] | None = None
    run: Any
    sweep: Any
    labels: list[str] | None
    images: int | None
    split: str | None


@dataclass(kw_only=True)
class Export(Shared):
    """`conf/export.yaml`."""

    format: dict[str, Any]
    default_data: dict[str, Any]
    file: Any
    dynamic_batch: bool
    images: int | None
    split: str | None
    latency: int
    overwrite: bool


COMMANDS = {"train": Train, "eval": Eval, "ptq": Ptq, "analyze": Analyze, "export": Export}


def check(cfg: DictConfig) -> None:
    """Check the values of a composed config with the schema of its command.

    Raises:
        UsageError: a value is invalid, or a key that was added with a plus is unknown; the message
            names the setting.
    """
    merged_cfg = OmegaConf.merge(OmegaConf.structured(COMMANDS[cfg.command]), cfg)
    merged_cfg.model.args = {}  # may refer to data settings that only the checkpoint has
    _refuse_unknown(OmegaConf.to_object(merged_cfg))


def _refuse_unknown(group: Any, prefix: str = "") -> None:
    names = {setting.name for setting in fields(group)}
    for name, value in vars(group).items():
        if name not in names:
            raise UsageError(unknown_message(f"{prefix}{name}", name, names))
        if is_dataclass(value):
            _refuse_unknown(value, f"{prefix}{name}.")


def check_path(setting: str, value: Any) -> None:
    """Raise `UsageError` for an empty path, and for one that is not text, such as a number.

    An empty path usually comes from a shell variable that is not set. With an empty `ckpt`, for
    example, a run would start from other weights. None is allowed.
    """
    if value is None or (isinstance(value, str) and value):
        return
    hint = "; null = none" if value == "" else ", in quotes where it looks like a number"
    raise UsageError(f"{setting}={value!r}: must be a path{hint}")
