"""Write `report.html` at the end of a run, or for any run directory with `analyze.py run=DIR`.

Modules that write pages are imported inside functions, so that a run starts without them.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from qat.data.image_transform import data_settings
from qat.errors import UsageError
from qat.launch.ranks import is_first
from qat.model.checkpoint import read_checkpoint
from qat.model.convert import conversion_of
from qat.model.storage import build_from
from qat.model.transform import data_config
from qat.tasks.build import import_modules
from qat.utils.text import is_inside

log = logging.getLogger(__name__)


def report_run(
    cfg: DictConfig, net: nn.Module | None = None, input_size: tuple[int, int, int] | None = None
) -> None:
    """Write the page at the end of a run, in the first process; an error is only logged.

    With `report=false` or in a dry run, nothing is written.

    Args:
        cfg: the job's config.
        net: the run's model, whose layers the page shows; None = no layers.
        input_size: (channels, height, width) of the model's images.
    """
    if not cfg.report or not is_first() or OmegaConf.select(cfg, "trainer.fast_dev_run"):
        return
    try:
        if net is not None and input_size is not None:
            describe_layers(net, input_size, Path(cfg.run_dir))
        _write_page(Path(cfg.run_dir))
    except Exception as error:
        log.warning(
            "report.html could not be written (%s: %s); all other files were written",
            type(error).__name__,
            " ".join(str(error).split()),
        )


def rebuild_report(cfg: DictConfig) -> None:
    """Write the page of the run directory `cfg.run`, even if the run failed or has not ended.

    Raises:
        UsageError: `cfg.run` is not a run directory, a file in it is damaged, or an analysis is
            requested too.
    """
    if cfg.analysis is not None:
        raise UsageError(f"run={cfg.run!r}: only rebuilds a report; leave analysis out")
    folder = Path(cfg.run)
    if not any((folder / name).is_file() for name in ("config.yaml", "results.json")):
        raise UsageError(
            f"run={cfg.run!r}: must be the directory of a run; "
            "it has neither config.yaml nor results.json"
        )
    try:
        _describe_checkpoint(cfg, folder)
        _write_page(folder)
    except (UsageError, OSError):
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UsageError(
            f"run={cfg.run!r}: must contain intact files of a run; one is damaged ({reason})"
        ) from error


def _describe_checkpoint(cfg: DictConfig, folder: Path) -> None:
    """Analyse the layers of the run's model if there is a checkpoint but no analysis yet."""
    path = _find_checkpoint(folder)
    if path is None or (folder / "analysis").is_dir():
        return
    import_modules(cfg.model.imports)
    net = build_from(read_checkpoint(path, fmt="qat"))
    conversion = conversion_of(net)
    if conversion is not None:
        input_size = conversion.input_size
    else:
        data = data_settings(data_config(net))
        input_size = (data.in_chans, data.image_size, data.image_size)
    describe_layers(net, input_size, folder)


def _find_checkpoint(folder: Path) -> Path | None:
    names = ("best.ckpt", "last.ckpt", "quantized.ckpt")
    paths = [parent / name for name in names for parent in (folder / "checkpoints", folder)]
    # The folder may contain other runs, whose files are deeper.
    for name in names:
        paths += sorted(folder.rglob(name), key=lambda path: (len(path.parts), path))
    for path in paths:
        if path.is_file() and is_inside(path, folder):
            return path
    return None


def _write_page(folder: Path) -> None:
    from qat.report.page import write_report

    log.info("report: %s", write_report(folder))


def describe_layers(net: nn.Module, input_size: tuple[int, int, int], folder: Path) -> None:
    """Analyse weights and cost of the run's model, without images; write to `analysis/`."""
    from qat.analysis import NO_IMAGES, StudiedNet, write_outcome
    from qat.analysis.cost import CostAnalysis
    from qat.analysis.weights import WeightAnalysis
    from qat.report.page import ANALYSES

    nets = [StudiedNet("this run", net.eval(), input_size)]
    # Hooks do not work in compiled graphs.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        for name, analysis in (("weights", WeightAnalysis()), ("cost", CostAnalysis())):
            write_outcome(folder / ANALYSES, name, {}, analysis.run(nets, NO_IMAGES), png=False)
