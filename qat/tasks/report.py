"""`report.html` at the end of a run, and for any run directory by `analyze.py run=DIR`; and the command line that it repeats.

Imports of what makes a page are in the functions that make it: a run starts without them.
"""

from __future__ import annotations

import json
import logging
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from qat.cli.repeat import CONF, recorded, typed
from qat.cli.schemas import COMMANDS
from qat.errors import UsageError
from qat.launch.outputs import is_finished
from qat.model.checkpoint import build_from, read_checkpoint
from qat.tasks.build import import_modules
from qat.utils.bounds import read_json, read_yaml
from qat.utils.files import write_text

if TYPE_CHECKING:
    from qat.report.run_files import Origin

log = logging.getLogger(__name__)

COMMAND = "command.json"
NO_SETTINGS = ("run_dir", "resume", "overwrite", "report", "sweep_dir", "hydra")  # they say nothing of what was run
CHECKPOINTS = ("quantized.ckpt", "checkpoints/best.ckpt", "checkpoints/last.ckpt")
OVERRIDE = re.compile(r"[+~]{0,2}(?P<name>\w+([/@.]\w+)*)(=(?P<value>.*))?", re.DOTALL)
CHOICE = re.compile(r"\[?[\w/, -]*\]?")


def record_run(cfg: DictConfig) -> None:
    """Write `config.yaml` of a run, and its command line beside it; of a call from Python there is none."""
    write_text(Path(cfg.run_dir) / "config.yaml", recorded(cfg))
    if HydraConfig.initialized():
        found = HydraConfig.get()
        known = {"command": f"{found.job.name}.py", "program": typed(found.job.name), "overrides": list(found.overrides.task)}
        write_text(Path(cfg.run_dir) / COMMAND, json.dumps(known, indent=2) + "\n")


def report_run(
    cfg: DictConfig, net: nn.Module | None = None, input_size: tuple[int, int, int] | None = None, *, is_first: bool = True
) -> None:
    """Make the page of a run that ends; whatever goes wrong is one line in the log, and the run is what it was.

    Args:
        cfg: the job's config.
        net: the quantized model whose layers it shows.
        input_size: of its images.
        is_first: this process is the one that writes.
    """
    try:
        if cfg.get("report") is not True or not is_first or OmegaConf.select(cfg, "trainer.fast_dev_run"):
            return
        folder = Path(cfg.run_dir)
        if net is not None and input_size is not None:
            describe_layers(net, input_size, folder)
        _write(folder)
    except Exception as error:
        log.warning("report.html was not made, everything else was: %s: %s", type(error).__name__, " ".join(str(error).split()))


def remake(cfg: DictConfig) -> None:
    """Make the page of the run directory `cfg.run`, also of a run that failed or is still going.

    Raises:
        UsageError: there is no run.
    """
    if cfg.get("analysis") is not None:
        raise UsageError(f"run={cfg.run!r}: makes a report anew and analyses nothing; leave analysis out")
    import_modules(cfg)
    folder = Path(cfg.run)
    if not any((folder / name).is_file() for name in ("config.yaml", "results.json")):
        raise UsageError(f"run={cfg.run!r}: neither config.yaml nor results.json is there; must be the directory of a run")
    _describe_checkpoint(folder)
    _write(folder)


def _write(folder: Path) -> None:
    from qat.report.page import write_report

    log.info("report: %s", write_report(folder, origin_of(folder)))


def describe_layers(net: nn.Module, input_size: tuple[int, int, int], folder: Path) -> None:
    """Write what the analyses that read no image say of a run's own model into the run directory."""
    from qat.analysis import NO_IMAGES, StudiedNet, write_outcome
    from qat.analysis.cost import CostAnalysis
    from qat.analysis.weights import WeightAnalysis
    from qat.report.notes import OWN
    from qat.report.run_files import ANALYSES

    nets = [StudiedNet(OWN, net.eval(), "", input_size)]
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # hooks belong to no compiled graph
        write_outcome(folder / ANALYSES, "weights", {}, WeightAnalysis().run(nets, NO_IMAGES), png=False)
        write_outcome(folder / ANALYSES, "cost", {}, CostAnalysis().run(nets, NO_IMAGES), png=False)


def _describe_checkpoint(folder: Path) -> None:
    """Describe the model of a run's checkpoint, if there is one that can be read and is later than what is described already.

    Results of a finished run are those of its best checkpoint; else the latest says most.
    """
    from qat.report.run_files import ANALYSES

    found = [folder / name for name in CHECKPOINTS if (folder / name).is_file()]
    described = folder / ANALYSES / "weights.json"
    if not found:
        return
    path = found[0] if is_finished(folder) else max(found, key=_written)
    if described.is_file() and _written(described) >= _written(path):
        return
    try:
        checkpoint = read_checkpoint(path, fmt="qat")
        data = (checkpoint.meta or {})["data"]
        describe_layers(build_from(checkpoint), (data["in_chans"], data["image_size"], data["image_size"]), folder)
    except Exception as error:
        log.warning("layers are not shown: %s", " ".join(str(error).split()))


def _written(path: Path) -> int:
    return path.stat().st_mtime_ns


def origin_of(folder: Path) -> Origin:
    """How the run of a directory came about."""
    from qat.report.run_files import Origin

    config, text = _read(folder / "config.yaml", read_yaml) or ({}, "")
    if not isinstance(config, dict) or not config:
        return Origin()
    recorded = _read(folder / COMMAND, read_json)
    listed = recorded.get("overrides") if isinstance(recorded, dict) else None
    given = [str(one) for one in listed] if isinstance(listed, list) else None
    name = config.get("command")
    is_installed = isinstance(recorded, dict) and recorded.get("program") == f"qat {name}"
    program = f"qat {name}" if is_installed else f"python {name}.py"
    compared, differences = ("", []) if given is None else _differences(config, given)
    return Origin(
        config=config,
        config_text=text,
        command=None if given is None else f"{program} {shlex.join(given)}",
        repeat=f"{program} {shlex.join(['--config-dir', str(folder), '--config-name', 'config', 'run_dir=NEW_FOLDER'])}",
        compared=compared,
        differences=differences,
    )


def _read(path: Path, read: Callable[[Path], Any]) -> Any:
    """What a file holds; None where it is not there or, with a warning, where it cannot be read."""
    try:
        return read(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        log.warning("%s cannot be read (%s); the report does without", path, error)
        return None


def _differences(config: dict[str, Any], given: list[str]) -> tuple[str, list[dict[str, Any]]]:
    """What a run is compared with, and its settings of the command line that differ: `setting`, `here`, `default`.

    The directory may be anybody's: of its command line only names, and choices among the files of `conf/`, are used, nothing that could
    be resolved.

    Args:
        config: of `config.yaml`.
        given: overrides; those that choose among the files of `conf/` are what the others are compared with.
    """
    found = [(one, match["name"], match["value"] or "") for one in given if (match := OVERRIDE.fullmatch(one))]
    chosen = [(one, value) for one, name, value in found if (CONF / name.partition("@")[0]).is_dir()]
    command = str(config.get("command"))
    if command not in COMMANDS or not all(CHOICE.fullmatch(value) for _, value in chosen):
        return "", []
    choices = [one for one, _ in chosen]
    names = dict.fromkeys(name for one, name, _ in found if one not in choices and name.partition(".")[0] not in NO_SETTINGS)
    try:
        defaults = _composed(command, choices)
        defaults["data"] = defaults.get("data") or defaults.get("default_data")  # of a command that takes them from a checkpoint
        pairs = [(name, _text(_at(config, name)), _text(_at(defaults, name))) for name in names]
    except (HydraException, OmegaConfBaseException, SystemExit):  # the last is how a command answers what cannot be composed
        return "", []  # chosen among files that are not here: those of a --config-dir
    rows = [{"setting": name, "here": here, "default": default} for name, here, default in pairs if here != default]
    return " ".join([f"conf/{command}.yaml", *choices]), rows


def _composed(command: str, chosen: list[str]) -> Any:
    """The plain config of a command line that only chooses files; composing is possible in the middle of a job, whose own config stays."""
    held = GlobalHydra.instance().hydra
    GlobalHydra.instance().hydra = None
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            return OmegaConf.to_container(hydra.compose(command, overrides=chosen), resolve=True)
    finally:
        GlobalHydra.instance().hydra = held


def _at(node: Any, name: str) -> Any:
    """The setting of a dotted name, None where there is none."""
    for key in name.split("."):
        node = node.get(key) if isinstance(node, dict) else None
    return node


def _text(value: object) -> str:
    """A value as it is typed in a yaml file."""
    return "(none)" if value is None else value if isinstance(value, str) else json.dumps(value)
