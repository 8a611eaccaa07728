"""`config.yaml`: what a run was made of, and the input of a run like it.

The file has every value as it was. What the composed config had by reference to other keys (`data.seed: ${seed}`) is listed under
`follows`, so that a run that is repeated with another directory, seed or number of bits is all of one piece. Imports nothing heavy.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf, open_dict

from qat.errors import UsageError
from qat.utils.text import leaves

# In a clone a link to the folder at the top.
CONF = (Path(__file__).parents[1] / "conf").resolve()
FOLLOWS = "follows"
# In the environment: the command as a person calls it, `qat train` or `python train.py`.
TYPED = "QAT_TYPED"
# In the file a reference is written with another mark: there it is text.
MARK, IN_FILE = "${", "@{"
# What Hydra has to be told by a primary config: the job's directory, and the lines on the terminal.
DEFAULTS = ["_self_", *({f"override hydra/{group}": "qat"} for group in ("output", "job_logging", "help"))]
# Settings that older files hold and nothing reads any more (CHANGELOG.md).
REMOVED = (
    "callbacks.finite.policy",
    "callbacks.finite.max_rollbacks",
    "opset",
    "analysis.factors",
    "analysis.activations",
    "analysis.compare",
)
# They speak of a run's directory, not of the run.
OF_THE_DIRECTORY = {"resume": False, "overwrite": False}


class ConfFolder(SearchPathPlugin):
    """Has Hydra look into `conf/` also where the primary config is somewhere else (`--config-path`)."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append it, behind whatever is there."""
        search_path.append(provider="qat", path=f"file://{CONF}")


def register() -> None:
    """Make `ConfFolder` known to Hydra, and a `trainer` group that takes any argument of Lightning's without a plus."""
    Plugins.instance().register(ConfFolder)
    ConfigStore.instance().store(group="trainer", name="_lightning", node=DictConfig({}, flags={"struct": False}), provider="qat")


def recorded(cfg: DictConfig) -> str:
    """The text of `config.yaml`.

    Args:
        cfg: config of a run, `cfg.run_dir` its directory.
    """
    values: Any = OmegaConf.to_container(cfg, resolve=True)
    composed: Any = OmegaConf.to_container(cfg, resolve=False)
    # Keys whose value is made of others'.
    follows = {".".join(path): value.replace(MARK, IN_FILE) for path, value in leaves(composed) if isinstance(value, str) and MARK in value}
    # A sweep's directory is that of the jobs beside it.
    kept = {key: value for key, value in values.items() if key not in {"sweep_dir", FOLLOWS}}
    settled = {key: value for key, value in OF_THE_DIRECTORY.items() if key in kept}
    return OmegaConf.to_yaml(OmegaConf.create({"defaults": DEFAULTS, **kept, **settled, FOLLOWS: follows}))


def follow(cfg: DictConfig, overrides: list[str]) -> None:
    """Put the references back into a config that Hydra read from a run's `config.yaml`; leave any other as it is.

    Args:
        cfg: as Hydra composed it, `cfg.run_dir` the directory of the new run.
        overrides: of the command line, `seed=1`; what they set stays.

    Raises:
        UsageError: the run would write into the directory of the one that it repeats.
    """
    follows = cfg.get(FOLLOWS)
    if follows is None:
        return
    for removed in REMOVED:
        parent, _, name = removed.rpartition(".")
        node = OmegaConf.select(cfg, parent) if parent else cfg
        if OmegaConf.is_dict(node):
            with open_dict(cfg):
                node.pop(name, None)
    given = {override.lstrip("+~").partition("=")[0].partition("@")[0].replace("/", ".") for override in overrides}
    if "run_dir" not in given:
        raise UsageError("run_dir is not set: the run that is repeated has its outputs there; choose another directory with run_dir=PATH")
    with open_dict(cfg):
        for key, reference in follows.items():
            if not any(key == one or key.startswith(f"{one}.") for one in given):
                _put(cfg, key, reference.replace(IN_FILE, MARK))
        del cfg[FOLLOWS]


def _put(cfg: DictConfig, key: str, reference: str) -> None:
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(cfg, parent) if parent else cfg
    if OmegaConf.is_dict(node) and name in node:
        node[name] = reference


def going_on(cfg: DictConfig) -> str | None:
    """The command line that goes on with a run; None in a sweep, whose command is another, and in a call from Python."""
    if not HydraConfig.initialized() or "sweep_dir" in cfg:
        return None
    found = HydraConfig.get()
    sources = {source.provider: source.path for source in found.runtime.config_sources}
    flags = ["--config-dir", sources["command-line"]] if "command-line" in sources else []
    flags += ["--config-path", sources["main"]] if sources.get("main") != str(CONF) else []
    flags += ["--config-name", str(found.job.config_name)] if found.job.config_name != found.job.name else []
    given = {one.lstrip("+").partition("=")[0]: one for one in found.overrides.task}
    run_dir = given.get("run_dir", f"run_dir={cfg.run_dir}")
    kept = [one for name, one in given.items() if name not in {"run_dir", *OF_THE_DIRECTORY}]
    resume = "true" if (Path(cfg.run_dir) / "checkpoints" / "last.ckpt").is_file() else "auto"
    return f"{typed(found.job.name)} {shlex.join([*flags, *kept, run_dir, f'resume={resume}'])}"


def typed(name: str) -> str:
    """A command as the person at this terminal calls it: `qat train`, or `python train.py`."""
    return os.environ.get(TYPED) or f"python {name}.py"
