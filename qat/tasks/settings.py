"""Settings of the commands: which there are, of which types, and what each may be; and those that have gone.

`conf/` has the defaults that a user reads. Hydra merges it into these schemas (`qat.tasks.conf`), and so refuses unknown keys and other
types; `check` asks for the rest when a task begins. What makes an object (`data`, `quant`, `callbacks` ...) is checked by its class.
Imports nothing heavy, so that `--help` answers at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass
from fnmatch import fnmatchcase
from typing import Any

from omegaconf import DictConfig, OmegaConf

from qat.errors import UsageError
from qat.utils.validate import check_bits, check_choice, check_int, check_number, unknown

SPLITS = ("train", "val", "test")
CKPT_FORMATS = ("auto", "qat", "timm", "ofq")
HIGHEST_SEED = 2**32 - 1  # numpy's

# Settings that have gone, with `=` choices of groups that have gone, and what there is now. A star stands for anything.
REMOVED = {
    "callbacks.finite.*": "a non-finite loss ends the run; resume=true resumes from the last good checkpoint",
    "search=bits": "analyze.py analysis=sensitivity analysis.budget_mb=MB gives the overrides of a mixed net",
    "search=adam*": "search=evolution",
    "search=random": "search=evolution",
    "search=sgd": "search=evolution",
    "search.rac*": "every candidate is evaluated on all calibration images",
    "ptq.compensation": "ptq=compensate_w4a4, or ptq=reconstruct_w4a4",
    "dynamic_size": "files are for images of one size",
    "threads": "times are of one thread",
    "opset": "the lowest opset that has all types is written",
    "ckpt_optimizer": "a new run starts with a new optimizer; resume=true keeps that of the run",
    "loss.grad_l1*": "loss.kure=WEIGHT makes weights robust to other step sizes",
    "logger.mlflow.store": "logger.mlflow.tracking_uri=URI",
    "analysis.corruptions*": "the package imagecorruptions makes such images for data=imagefolder",
    "experiment=ofq_deit_*": "experiment=ofq_w2a2 model=deit_t (w3a3, w4a4; with _cga)",
    "experiment=ofq_swin_*": "experiment=ofq_w2a2 model=swin_t (w3a3, w4a4; with _cga)",
    "experiment=evolq_[dv]*": "experiment=evolq_w4a8 model=deit_s",
}


def removed(typed: str) -> str | None:
    """What there is now in place of a setting, or of `group=choice`; None where it is not one that has gone."""
    return next((now for old, now in REMOVED.items() if fnmatchcase(typed, old)), None)


@dataclass
class Model:
    """`model.*`; `args` go to `timm.create_model`, `own_window` is what those of a Swin are made of."""

    name: str | None = None
    row: str | None = None
    pretrained: bool = False
    weights: Any = (
        None  # here and below: a typed path would turn 1.10 into "1.1" before anybody sees it
    )
    reset_head: bool = False
    imports: list[str] | None = None
    init: str = "full"
    grad_checkpointing: bool = False
    own_window: int | None = None
    args: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_choice("model.init", self.init, ("full", "reference"))
        check_paths({"model.weights": self.weights})


@dataclass
class SearchTeacher:
    """`teacher.*` of a search: the net that it follows."""

    ckpt: Any = None

    def __post_init__(self) -> None:
        check_paths({"teacher.ckpt": self.ckpt})


@dataclass
class LossTeacher(SearchTeacher):
    """`teacher.*` of a distilling loss."""

    model: str | None = None
    pretrained: bool = False


@dataclass
class Schedule:
    """`scheduler.*`: epochs may be fractions."""

    interval: str
    warmup_epochs: float
    warmup_lr: float
    cooldown_epochs: float
    min_lr: float

    def __post_init__(self) -> None:
        check_choice("scheduler.interval", self.interval, ("epoch", "step"))
        for name in ("warmup_lr", "min_lr"):  # the epochs beside trainer.max_epochs
            check_number(f"scheduler.{name}", getattr(self, name), 0)


@dataclass(kw_only=True)
class Shared:
    """What all commands have."""

    command: str
    seed: int
    run_dir: Any
    sweep_dir: str | None = None
    report: bool
    ckpt: Any = None  # analyze.py takes a list as well
    ckpt_format: str = CKPT_FORMATS[0]
    ckpt_bits: int | None = None
    ckpt_act_bits: int | None = None
    model: Model = field(default_factory=Model)
    data: dict[str, Any] = field(default_factory=dict)
    logger: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        check_int("seed", self.seed, 0, HIGHEST_SEED)
        check_choice("ckpt_format", self.ckpt_format, CKPT_FORMATS)
        check_paths({
            name: getattr(self, name, None)
            for name in ("run_dir", "predict", "run", "sweep", "file")
        })
        check_paths({"data.root": self.data.get("root")})
        for one in (
            self.ckpt
            if self.ckpt and isinstance(self.ckpt, list) and self.command == "analyze"
            else [self.ckpt]
        ):
            check_paths({"ckpt": one})
        starts = {
            "ckpt": self.ckpt,
            "model.weights": self.model.weights,
            "model.pretrained": self.model.pretrained,
        }
        if len(given := [name for name, value in starts.items() if value]) > 1:
            raise UsageError(f"{' and '.join(given)} are set: a model starts from one of them")
        if getattr(self, "resume", False) not in {True, False, "auto"}:
            raise UsageError(f"resume={self.resume!r}: must be one of false, true, auto")  # type: ignore[attr-defined]
        if getattr(self, "images", None) is not None:
            check_int("images", self.images, 1)  # type: ignore[attr-defined]
        if getattr(self, "split", None) is not None:
            check_choice("split", self.split, SPLITS)  # type: ignore[attr-defined]
        for name in ("ckpt_bits", "ckpt_act_bits"):
            if (bits := getattr(self, name)) is not None:
                check_bits(name, bits)
                if not self.ckpt:
                    raise UsageError(
                        f"{name}={bits!r}: only for files of the paper's code (ckpt_format=ofq); set ckpt=FILE"
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
    """Ask the schema of a composed config whether its values can work.

    Raises:
        UsageError: one of them cannot, or a key that was added with a plus is unknown; names the setting.
    """
    held = OmegaConf.merge(OmegaConf.structured(COMMANDS[cfg.command]), cfg)
    held.model.args = {}  # may refer to data that only the checkpoint knows
    _refuse_unknown(OmegaConf.to_object(held))


def _refuse_unknown(group: Any, below: str = "") -> None:
    known = {one.name for one in fields(group)}
    for name, value in vars(group).items():
        if name not in known:
            raise UsageError(unknown(f"{below}{name}", name, known))
        if is_dataclass(value):
            _refuse_unknown(value, f"{below}{name}.")


def check_paths(given: dict[str, Any]) -> None:
    """Raise `UsageError` on a path that YAML has read as a number, and on an empty one.

    An empty path is a variable of a shell that is not set: a run would start from other weights than was meant.
    """
    for setting, value in given.items():
        if value is not None and not (isinstance(value, str) and value):
            hint = "; null = none" if value == "" else ", in quotes where it looks like a number"
            raise UsageError(f"{setting}={value!r}: must be a path{hint}")
