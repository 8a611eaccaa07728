"""Settings, initial model and calibration images of `ptq.py`, checked before work begins."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn
from yaml import YAMLError

from qat.data import ImageData
from qat.errors import UsageError
from qat.launch import run_dir as outputs
from qat.launch.run_dir import CONFIG, UsedError
from qat.model.convert import conversion_of
from qat.model.frozen import is_frozen
from qat.model.ptq_spec import PtqRecipe
from qat.model.scales import assert_ready
from qat.model.start import Start
from qat.ptq.reconstruct import ReconstructSettings
from qat.ptq.search import SearchSettings
from qat.ptq.state import read_state
from qat.tasks import build, summary
from qat.tasks.resume import comparable_settings, compare_settings
from qat.tasks.subject import EvaluatedNet, origin
from qat.tasks.teacher import adapt_teacher, net_of_file

KEEP = "keep"
STATE_FILES = ("search.ckpt", "reconstruct.ckpt")
TABLES = ("search.csv", "reconstruct.csv")
QUANTIZED_FILE = "quantized.ckpt"


def build_ptq_recipe(cfg: DictConfig) -> PtqRecipe | None:
    """Return the recipe of `cfg.ptq`, or None for `ptq=keep`: the model keeps its quantizers.

    Raises:
        UsageError: a key is unknown, or a value is invalid.
    """
    knobs = build.to_plain(cfg.ptq)
    for name in ("batch", "reconstruct"):
        knobs.pop(name, None)
    if cfg.ptq.get("name") != KEEP:
        return build.build_settings(PtqRecipe, "ptq", knobs)
    for key in knobs:
        if key != "name":
            raise UsageError(
                f"ptq.{key}: ptq=keep keeps the model's quantizers and accepts only ptq.batch"
            )
    return None


def build_search(cfg: DictConfig) -> SearchSettings | None:
    """Return the settings of `cfg.search`, or None without a search.

    Raises:
        UsageError: a key is unknown, or a value is invalid.
    """
    settings = build.to_plain(cfg.search)
    return build.build_settings(SearchSettings, "search", settings) if settings else None


def build_reconstruct(cfg: DictConfig, method: str) -> ReconstructSettings | None:
    """Return the settings of `cfg.ptq.reconstruct`, or None if `method` does not reconstruct.

    Raises:
        UsageError: a key is unknown, a value is invalid, or a setting was changed that `method`
            does not read.
    """
    group = build.to_plain(cfg.ptq).get("reconstruct") or {}
    settings = build.build_settings(ReconstructSettings, "ptq.reconstruct", group)
    if method == "reconstruct":
        return settings
    defaults = ReconstructSettings(seed=cfg.seed)
    for name, value in group.items():
        if value != getattr(defaults, name):
            raise UsageError(
                f"ptq.reconstruct.{name}={value!r}: is used only if ptq.method is reconstruct, as "
                f"in ptq=reconstruct_w4a4; here it is {method}"
            )
    return None


def check_run_dir(cfg: DictConfig) -> None:
    """Check that a run can begin or be resumed in the run directory.

    Raises:
        UsageError: with `resume=true`, there is nothing to resume; a dry run would change the
            directory; or it belongs to another command, or without `overwrite` to another run.
    """
    run_dir = Path(cfg.run_dir)
    if cfg.resume is True and _state_file(run_dir) is None:
        raise UsageError(
            f"resume=true: run_dir={str(run_dir)!r} has no {' and no '.join(STATE_FILES)}; "
            "use resume=auto to start a new run in that case"
        )
    if cfg.resume and cfg.trainer.fast_dev_run and outputs.used_files(run_dir):
        raise UsageError(
            f"trainer.fast_dev_run: resume={cfg.resume!r} would change {str(run_dir)!r}; "
            "a dry run must have resume=false and another run_dir"
        )
    # Even `overwrite` leaves files of other commands, which a report would mix with new ones.
    is_resumed = cfg.resume and not cfg.overwrite
    outputs.check_own(run_dir, cfg.command, origin(cfg) if is_resumed else None)
    if cfg.resume or cfg.overwrite:
        return
    used_files = outputs.used_files(run_dir)
    if used_files:
        checkpoints = [path for path in used_files if path.suffix == ".ckpt"]
        file = checkpoints[-1] if checkpoints else used_files[0]
        raise UsedError(
            f"run_dir={str(run_dir)!r} contains {file.relative_to(run_dir)} already; "
            "choose another run_dir or set overwrite=true"
        )


def _state_file(run_dir: Path) -> Path | None:
    """Return the most recently written state file, or None if no such file exists."""
    state_files = [run_dir / name for name in STATE_FILES if (run_dir / name).is_file()]
    return max(state_files, key=lambda path: path.stat().st_mtime_ns, default=None)


def _settings_to_resume(run_dir: Path) -> dict[str, Any]:
    """Settings of a run as stored in its state file, or else in `config.yaml`.

    Raises:
        UsageError: the settings cannot be read.
    """
    state_file = _state_file(run_dir)
    run = None if state_file is None else read_state(state_file)["run"]
    if isinstance(run, dict):
        return run
    path = run_dir / CONFIG
    try:
        return dict(build.to_plain(OmegaConf.load(path)))
    except (OSError, ValueError, TypeError, YAMLError, OmegaConfBaseException) as error:
        raise UsageError(
            f"resume: {path} cannot be read; resume=false overwrite=true starts over"
        ) from error


def check_start(cfg: DictConfig, subject: EvaluatedNet, *, has_search: bool) -> None:
    """Check that the recipe can start from a model, and that a resumed run keeps `ptq.*`.

    A recipe starts from a float model, `ptq=keep` from a quantized model.

    Raises:
        UsageError: the recipe cannot start from the model; with `ptq=keep`, a search or its
            targets are missing; with a recipe, `teacher.ckpt` is set; or the run to resume had
            other settings of `ptq.*`.
    """
    run_dir = Path(cfg.run_dir)
    is_finished = (run_dir / QUANTIZED_FILE).is_file() and not cfg.overwrite
    if cfg.resume and (is_finished or _state_file(run_dir) is not None):
        reason = (
            "a resumed run keeps its method; use resume=false in another run_dir to start a new run"
        )
        compare_settings(_settings_to_resume(run_dir), comparable_settings(cfg), ("ptq.",), reason)
    file = f"ckpt={str(cfg.ckpt)!r}"
    teacher_file = cfg.teacher.ckpt
    if cfg.ptq.get("name") == KEEP:
        _check_keep(file, teacher_file, subject, has_search=has_search)
        return
    if conversion_of(subject.net) is not None:
        raise UsageError(
            f"{file}: is quantized already ({_recipe_name(subject)}); must be a float model; "
            "ptq=keep search=evolution accepts a quantized one"
        )
    if teacher_file is not None:
        raise UsageError(
            f"teacher.ckpt={teacher_file!r}: works only with ptq=keep; "
            "otherwise the targets are the logits of the float model itself"
        )


def _check_keep(
    file: str, teacher_file: str | None, subject: EvaluatedNet, *, has_search: bool
) -> None:
    if is_frozen(subject.net):
        raise UsageError(
            f"{file}: contains only integer codes; "
            "must be the checkpoint from which it was exported"
        )
    if conversion_of(subject.net) is None:
        raise UsageError(
            "ptq=keep: the model is in float; must be a recipe of conf/ptq, e.g. ptq=fqvit_w4a8"
        )
    if not has_search:
        raise UsageError(
            "ptq=keep: there is nothing to do; add a search over the scales, e.g. search=evolution"
        )
    recipe = subject.recipe
    if teacher_file is None and getattr(recipe, "method", None) != "calibrate":
        verb = "fitted" if isinstance(recipe, PtqRecipe) else "trained"
        raise UsageError(
            f"{file}: contains a quantized model whose weights were {verb} "
            f"({_recipe_name(subject)}), "
            "so it has no float logits as targets; set teacher.ckpt=FILE"
        )
    assert_ready(subject.net)


def _recipe_name(subject: EvaluatedNet) -> str:
    return summary.describe_recipe(subject.recipe).partition(":")[0]


def target_net(path: str | None, subject: EvaluatedNet, *, sets_mean: bool) -> nn.Module | None:
    """Return the float model of `teacher.ckpt`, or None if the targets are the model's own logits.

    Args:
        path: value of `teacher.ckpt`.
        subject: the model to quantize, and its data.
        sets_mean: True if `data.mean` is set.

    Raises:
        UsageError: the file cannot be read, or contains a quantized model, or a model for other
            classes or images.
    """
    if path is None:
        return None
    net = net_of_file(path, subject.name, cast(dict, subject.net._model_args))
    if conversion_of(net) is not None:
        raise UsageError(
            f"teacher.ckpt={path!r}: is quantized; must be a float model, "
            "whose logits are the targets of the search"
        )
    adapt_teacher(Start(net), subject.data, "teacher.ckpt", path, sets_mean=sets_mean)
    return net.eval()


def calibration_batches(data: ImageData, batch_size: int) -> list[Tensor]:
    """Training images as batches (batch_size, C, H, W), without a smaller last batch.

    Raises:
        UsageError: there are too few images for one batch.
    """
    num_images = data.settings.calibration_images
    if num_images < batch_size:
        raise UsageError(
            f"data.calibration_images={num_images}: less than one batch; "
            f"must be an integer of at least ptq.batch={batch_size}"
        )
    batches = data.calibration_batches(batch_size)
    full_batches = [batch for batch in batches if len(batch) == batch_size]
    if not full_batches:
        num_images = len(data.split("train"))
        raise UsageError(
            f"ptq.batch={batch_size}: the data have {num_images} training images, "
            f"which fill no batch of this size; must be at most {num_images}"
        )
    return full_batches
