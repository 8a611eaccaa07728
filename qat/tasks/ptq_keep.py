"""`ptq=keep`: a net that is quantized already keeps its quantizers, and a search changes their scales."""

from __future__ import annotations

from typing import cast

from omegaconf import DictConfig
from torch import nn

from qat.errors import UsageError
from qat.model.convert import conversion_of
from qat.model.frozen import is_frozen
from qat.model.ptq_spec import PtqRecipe
from qat.model.scales import assert_ready
from qat.ptq.search_settings import SearchSettings
from qat.tasks import summary
from qat.tasks.predict import EvaluatedNet
from qat.tasks.teacher import check_teacher, net_of_file

KEEP = "keep"


def is_kept(cfg: DictConfig) -> bool:
    """True under `ptq=keep`."""
    return bool(cfg.ptq.get("name") == KEEP)


def check_start(cfg: DictConfig, subject: EvaluatedNet, search: SearchSettings | None) -> None:
    """Is `ckpt` what the recipe starts from: a quantized net under `ptq=keep`, else a float one?

    Raises:
        UsageError: it is not, or there is nothing to be done, or nothing to compare with.
    """
    if is_kept(cfg):
        _check_kept(cfg, subject, search)
        return
    held = _recipe_name(subject)
    if held is not None:
        refused = f"ckpt={str(cfg.ckpt)!r}: is quantized already ({held}); post-training quantization starts from a float net"
        raise UsageError(f"{refused}, ptq=keep search=evolution from one like this")
    if cfg.teacher.ckpt is not None:
        raise UsageError(f"teacher.ckpt={cfg.teacher.ckpt!r}: only with ptq=keep; here the targets are the logits of the net itself")


def _recipe_name(subject: EvaluatedNet) -> str | None:
    return None if conversion_of(subject.net) is None else summary.describe_recipe(subject.recipe).partition(":")[0]


def _check_kept(cfg: DictConfig, subject: EvaluatedNet, search: SearchSettings | None) -> None:
    for key in cfg.ptq:
        if key not in {"name", "batch"}:
            raise UsageError(f"ptq.{key}: the net stays as it is; ptq=keep has batch alone")
    held = _recipe_name(subject)
    if is_frozen(subject.net):
        raise UsageError(f"ckpt={str(cfg.ckpt)!r}: holds integer codes alone; must be the checkpoint that it was exported from")
    if held is None:
        raise UsageError("ptq=keep: the net is a float one; must be a recipe of conf/ptq, e.g. ptq=fqvit_w4a8")
    if search is None:
        raise UsageError("ptq=keep: there is nothing to do; add a search over the scales, e.g. search=evolution")
    how = "fitted" if isinstance(subject.recipe, PtqRecipe) else "trained"
    has_float_weights = isinstance(subject.recipe, PtqRecipe) and subject.recipe.method == "calibrate"
    if cfg.teacher.ckpt is None and not has_float_weights:
        refused = f"ckpt={str(cfg.ckpt)!r}: was {how} quantized ({held}), so it has no float logits to follow"
        raise UsageError(f"{refused}; give teacher.ckpt=FILE")
    assert_ready(subject.net)


def build_target_net(cfg: DictConfig, subject: EvaluatedNet) -> nn.Module | None:
    """The float net of `teacher.ckpt`; None where the net's own weights give the targets.

    Args:
        cfg: the job's config.
        subject: the quantized net; a file that holds weights alone is read into one like it.

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
