"""`report.html` at the end of a run, and for any run directory by `analyze.py run=DIR`; and the command line that it repeats."""

from __future__ import annotations

import json
import logging
import re
import shlex
from collections.abc import Callable, Container, Iterator, Mapping
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from qat.analysis import Analysis, StudiedNet, write_outcome
from qat.analysis.cost import CostAnalysis
from qat.analysis.weights import WeightAnalysis
from qat.errors import UsageError
from qat.model.checkpoint import build_from, read_checkpoint
from qat.model.convert import conversion_of
from qat.report import Origin, write_report
from qat.report.files import ANALYSES
from qat.report.notes import OWN
from qat.tasks.build import import_modules
from qat.tasks.repeat import CONF, FOLLOWS, OF_THE_DIRECTORY, references
from qat.utils.bounds import read_json, read_yaml
from qat.utils.files import write_text

log = logging.getLogger(__name__)

COMMAND = "command.json"
# What every run has of its own.
NOT_COMPARED = ("run_dir", "sweep_dir", "default_data", "default_photos", "run", "report", *OF_THE_DIRECTORY)
# Neither of them reads an image.
STUDIES: tuple[tuple[type[Analysis], dict[str, Any]], ...] = ((WeightAnalysis, {"max_panels": 6}), (CostAnalysis, {}))
MISSING = object()
COMMANDS = ("train", "eval", "ptq", "analyze", "export")
CHOICE = re.compile(r"[+~]{0,2}[\w/@.]+(=\[?[\w/, -]*\]?)?")


def remember(cfg: DictConfig) -> None:
    """Write the command line of a run beside its `config.yaml`; nothing where there is none, as in a call from Python."""
    if not HydraConfig.initialized():
        return
    found = HydraConfig.get()
    overrides = list(found.overrides.task)
    chosen = [one for one in overrides if _is_choice(one.lstrip("+~").partition("=")[0], found.runtime.choices)]
    text = json.dumps({"command": f"{found.job.name}.py", "overrides": overrides, "chosen": chosen}, indent=2)
    write_text(Path(cfg.run_dir) / COMMAND, text + "\n")


def _is_choice(name: str, choices: Container[str]) -> bool:
    """True if a setting chooses among files; Hydra does not list it where several files are chosen: `callbacks=[default,cga]`."""
    return name in choices or (CONF / name.partition("@")[0]).is_dir()


def report_run(cfg: DictConfig, nets: list[StudiedNet] | None = None, *, is_first: bool = True) -> None:
    """Make the page of a run that ends; whatever goes wrong is one line in the log, and the run is what it was.

    Args:
        cfg: the job's config.
        nets: the quantized nets whose layers it shows.
        is_first: this process is the one that writes.
    """
    try:
        if cfg.get("report") is not True or not is_first or cfg.trainer.fast_dev_run:
            return
        folder = Path(cfg.run_dir)
        if nets:
            _study(nets, folder / ANALYSES)
        path = write_report(folder, origin_of(folder))
    except Exception as error:
        log.warning("report.html was not made, everything else was: %s: %s", type(error).__name__, " ".join(str(error).split()))
        return
    log.info("report: %s", path)


def remake(cfg: DictConfig) -> Path:
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
    if not (folder / ANALYSES).is_dir():
        _study_checkpoint(folder)
    path = write_report(folder, origin_of(folder))
    log.info("report: %s", path)
    return path


def origin_of(folder: Path) -> Origin:
    """How the run of a directory came about."""
    config, text = _read(folder / "config.yaml", read_yaml) or ({}, "")
    if not isinstance(config, dict) or not config:
        return Origin()
    command = _read(folder / COMMAND, read_json)
    typed, chosen = (_texts(command.get(key) if isinstance(command, dict) else None) for key in ("overrides", "chosen"))
    script = f"{config.get('command')}.py"
    compared, differences = _differences(config, chosen or [])
    return Origin(
        config=config,
        config_text=text,
        command=None if typed is None else shlex.join(["python", script, *typed]),
        repeat=shlex.join(["python", script, "--config-dir", str(folder), "--config-name", "config", "run_dir=NEW_FOLDER"]),
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


def _texts(value: object) -> list[str] | None:
    return value if isinstance(value, list) and all(isinstance(one, str) for one in value) else None


def _study(nets: list[StudiedNet], folder: Path) -> None:
    """What analyses that evaluate nothing say of nets."""
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # hooks belong to no compiled graph
        for kind, settings in STUDIES:
            write_outcome(folder, kind.name, settings, kind(**settings).outcome(nets, []), png=False)


def _study_checkpoint(folder: Path) -> None:
    """The same of the checkpoint of a run, if there is one that can be read."""
    names = ("quantized.ckpt", "checkpoints/best.ckpt", "checkpoints/last.ckpt")
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        return
    try:
        checkpoint = read_checkpoint(path, fmt="qat")
        net = build_from(checkpoint).eval()
        meta = checkpoint.meta or {}
        _study([studied(net, meta["model"]["name"], _input_size(net, meta), path)], folder / ANALYSES)
    except Exception as error:
        log.warning("layers are not shown: %s", " ".join(str(error).split()))


def _input_size(net: nn.Module, meta: dict[str, Any]) -> tuple[int, int, int]:
    done = conversion_of(net)
    if done is not None:
        return done.input_size
    data = meta["data"]
    return data["in_chans"], data["image_size"], data["image_size"]


def studied(net: nn.Module, model: str, input_size: tuple[int, int, int], path: Path | None = None) -> StudiedNet:
    """A run's own net as analyses want it."""
    return StudiedNet(OWN, net.eval(), model, input_size, path)


def _differences(config: dict[str, Any], chosen: list[str]) -> tuple[str, list[tuple[str, str, str]]]:
    """What the settings of a run are compared with, and where they differ from it: name, value, default.

    Args:
        config: of `config.yaml`.
        chosen: the part of the command line that chooses among the files of `conf/`: their values are the defaults.
    """
    command = str(config.get("command"))
    # The directory may be anybody's: of its command line only names of files in `conf/` are used, nothing that could be resolved.
    if command not in COMMANDS or not all(CHOICE.fullmatch(one) for one in chosen):
        return "", []
    try:
        defaults = _composed(command, chosen)
        base: dict[str, Any] = OmegaConf.to_container(defaults, resolve=True)  # type: ignore[assignment]
    except (HydraException, OmegaConfBaseException, SystemExit):  # the last is how a command answers what cannot be composed
        return "", []  # chosen among files that are not here: those of a --config-dir
    if "default_data" in base:
        base["data"] = base["default_data"] | {key: value for key, value in (base.get("data") or {}).items() if value is not None}
    # What follows another setting is no difference of its own.
    same = references(OmegaConf.to_container(defaults, resolve=False))
    follows = config.get(FOLLOWS)
    followed = {key for key, value in (follows if isinstance(follows, Mapping) else {}).items() if same.get(key) == value}
    ours, theirs = (
        dict(_leaves({k: v for k, v in node.items() if k not in {*NOT_COMPARED, FOLLOWS, "defaults"}})) for node in (config, base)
    )
    names = [
        name for name in dict.fromkeys([*ours, *theirs]) if name not in followed and ours.get(name, MISSING) != theirs.get(name, MISSING)
    ]
    found = [(name, _text(ours.get(name, MISSING)), _text(theirs.get(name, MISSING))) for name in names]
    return " ".join([f"conf/{command}.yaml", *chosen]), found


def _composed(command: str, chosen: list[str]) -> DictConfig:
    """The config of a command line that only chooses files; composing is possible in the middle of a job, whose own config stays."""
    held = GlobalHydra.instance().hydra
    GlobalHydra.instance().hydra = None
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            return hydra.compose(command, overrides=chosen)
    finally:
        GlobalHydra.instance().hydra = held


def _leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(node, dict) or not node:
        yield path, node
        return
    for key, value in node.items():
        yield from _leaves(value, f"{path}.{key}".lstrip("."))


def _text(value: object) -> str:
    """A value as it is typed in a yaml file."""
    if value is MISSING:
        return "(none)"
    return value if isinstance(value, str) else json.dumps(value)
