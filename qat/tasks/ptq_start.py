"""What a run of `ptq.py` starts from: its settings, net, images and targets, checked before anything is computed."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from qat.data import ImageData
from qat.errors import UsageError
from qat.launch import run_dir as outputs
from qat.launch.run_dir import UsedError
from qat.model.convert import conversion_of
from qat.model.frozen import is_frozen
from qat.model.ptq_spec import PtqRecipe
from qat.model.scales import assert_ready
from qat.ptq import reconstruct, search
from qat.ptq.reconstruct import ReconstructSettings
from qat.ptq.search import SearchSettings
from qat.tasks import build, summary
from qat.tasks.evaluate import origin
from qat.tasks.predict import EvaluatedNet
from qat.tasks.teacher import check_teacher, net_of_file

KEEP = "keep"


def build_ptq_recipe(cfg: DictConfig) -> PtqRecipe | None:
    """The recipe of `cfg.ptq`; None under `ptq=keep`, where a net that is quantized already keeps its quantizers.

    Raises:
        UsageError: it has a key that is no knob, or a value that cannot work.
    """
    knobs = {key: value for key, value in build.plain(cfg.ptq).items() if key not in {"batch", "reconstruct"}}
    if cfg.ptq.get("name") != KEEP:
        return build.settings_of(PtqRecipe, "ptq", knobs)
    for key in knobs.keys() - {"name"}:
        raise UsageError(f"ptq.{key}: the net stays as it is; ptq=keep has batch alone")
    return None


def build_reconstruct(cfg: DictConfig) -> ReconstructSettings:
    """The settings of `cfg.ptq.reconstruct`.

    Raises:
        UsageError: it has a key that is no setting, or a value that cannot work.
    """
    return build.settings_of(ReconstructSettings, "ptq.reconstruct", build.plain(cfg.ptq).get("reconstruct") or {})


def build_search(cfg: DictConfig) -> SearchSettings | None:
    """The settings of `cfg.search`, None where there is no search.

    Raises:
        UsageError: it has a key that is no setting, or a value that cannot work.
    """
    settings = build.plain(OmegaConf.select(cfg, "search"))
    return build.settings_of(SearchSettings, "search", settings) if settings else None


def check_run_dir(cfg: DictConfig) -> None:
    """Raise `UsageError` if `resume` has nothing to go on from, or the directory is another run's."""
    run_dir, states = Path(cfg.run_dir), [f"{name}.ckpt" for name in (search.STATE_NAME, reconstruct.STATE_NAME)]
    if cfg.resume is True and not any((run_dir / name).is_file() for name in states):
        raise UsageError(f"resume=true: run_dir={str(run_dir)!r} has no {' and no '.join(states)}; resume=auto starts where there is none")
    if cfg.overwrite:
        return
    if cfg.resume:
        outputs.check_own(run_dir, cfg.command, origin(cfg))
    elif used := outputs.used(run_dir):
        held = next((path for path in reversed(used) if path.suffix == ".ckpt"), used[0]).relative_to(run_dir)
        raise UsedError(f"run_dir={str(run_dir)!r} holds {held} already; choose another run_dir or set overwrite=true")


def check_start(cfg: DictConfig, subject: EvaluatedNet, *, searches: bool) -> None:
    """Is `ckpt` what the recipe starts from: a quantized net under `ptq=keep`, else a float one?

    Raises:
        UsageError: it is not, or there is nothing to be done, or nothing to compare with.
    """
    held = None if conversion_of(subject.net) is None else summary.describe_recipe(subject.recipe).partition(":")[0]
    file = f"ckpt={str(cfg.ckpt)!r}"
    if cfg.ptq.get("name") != KEEP:
        if held is not None:
            refused = f"{file}: is quantized already ({held}); post-training quantization starts from a float net"
            raise UsageError(f"{refused}, ptq=keep search=evolution from one like this")
        if cfg.teacher.ckpt is not None:
            raise UsageError(f"teacher.ckpt={cfg.teacher.ckpt!r}: only with ptq=keep; here the targets are the logits of the net itself")
        return
    if is_frozen(subject.net):
        raise UsageError(f"{file}: holds integer codes alone; must be the checkpoint that it was exported from")
    if held is None:
        raise UsageError("ptq=keep: the net is a float one; must be a recipe of conf/ptq, e.g. ptq=fqvit_w4a8")
    if not searches:
        raise UsageError("ptq=keep: there is nothing to do; add a search over the scales, e.g. search=evolution")
    if cfg.teacher.ckpt is None and getattr(subject.recipe, "method", None) != "calibrate":
        how = "fitted" if isinstance(subject.recipe, PtqRecipe) else "trained"
        raise UsageError(f"{file}: was {how} quantized ({held}), so it has no float logits to follow; give teacher.ckpt=FILE")
    assert_ready(subject.net)


def build_target_net(cfg: DictConfig, subject: EvaluatedNet) -> nn.Module | None:
    """The float net of `teacher.ckpt`; None where the net's own weights give the targets.

    Raises:
        UsageError: the file cannot be read, is of a quantized net, or of one for other classes or images.
    """
    path = cfg.teacher.ckpt
    if path is None:
        return None
    net = net_of_file(path, subject.name, cast(dict, subject.net._model_args))
    if conversion_of(net) is not None:
        raise UsageError(f"teacher.ckpt={path!r}: is quantized; the targets of a search are the logits of a float net")
    check_teacher(net, subject.data, f"teacher.ckpt={path!r}")
    return net.eval()


def calibration_batches(cfg: DictConfig, data: ImageData) -> list[Tensor]:
    """Training images in whole batches of `ptq.batch`; a rest that fills none is left out.

    Raises:
        UsageError: there are too few images for one batch.
    """
    wanted, size = data.settings.calibration_images, cfg.ptq.batch
    if wanted < size:
        raise UsageError(f"data.calibration_images={wanted}: less than one batch; must be an integer of at least ptq.batch={size}")
    batches = [batch for batch in data.calibration_batches(size) if len(batch) == size]
    if not batches:
        raise UsageError(f"ptq.batch={size}: the data have {len(data.split('train'))} training images, which fill no batch of this size")
    return batches
