"""Types of settings. Oracle: `conf/`, Lightning's own signature, and that each field of a schema refuses what is not of its type."""

import dataclasses
import inspect
import re
import subprocess
import sys
import typing

import pytest
from lightning.pytorch import Trainer
from omegaconf import OmegaConf

from qat.cli.schemas import COMMANDS, Settings, conform
from qat.errors import UsageError
from tests.conftest import ROOT, compose


def typed_fields(kind=Settings, below=""):
    """Names of all settings with a type, groups within groups included."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        kinds = [hints[field.name], *typing.get_args(hints[field.name])]
        group = next((one for one in kinds if dataclasses.is_dataclass(one)), None)
        if group is not None:
            yield from typed_fields(group, f"{below}{field.name}.")
        elif dict not in map(typing.get_origin, kinds) and hints[field.name] is not typing.Any:
            yield f"{below}{field.name}"


@pytest.mark.parametrize("command", COMMANDS)
def test_the_configs_have_these_types_as_they_are(command):
    cfg = compose(command, "run_dir=a")
    before = OmegaConf.to_container(cfg)
    conform(cfg)
    assert OmegaConf.to_container(cfg) == before


def test_each_setting_is_one_of_a_command():
    there = {key for command in COMMANDS for key in compose(command, "run_dir=a")}
    assert {field.name for field in dataclasses.fields(Settings)} == there | {"sweep_dir", "search", "analysis"}


@pytest.mark.parametrize("setting", typed_fields())
def test_what_is_of_another_type_is_refused_by_name(setting):
    cfg = OmegaConf.create({"command": "train", "seed": 0, "run_dir": "a"})
    OmegaConf.update(cfg, setting, "x" if setting == "model.imports" else [[1]])
    with pytest.raises(UsageError, match=rf"^config: .*\b{re.escape(setting)}\b"):
        conform(cfg)


def test_values_get_their_type():
    cfg = compose("train", "seed='3'", "overwrite=no", "scheduler.warmup_epochs=1", "run_dir=a")
    conform(cfg)
    assert (cfg.seed, cfg.overwrite) == (3, False)
    assert "opset" not in cfg


def test_lightnings_arguments_go_by_their_names():
    names = inspect.signature(Trainer).parameters
    cfg = compose("train", *(f"trainer.{name}=null" for name in names), "run_dir=a")
    assert set(names) <= set(cfg.trainer)
    assert compose("eval", "trainer=gpu", "trainer.profiler._target_=a.B", "run_dir=a").trainer.profiler._target_ == "a.B"


@pytest.mark.parametrize(
    ("argument", "said"),
    [("sed=1", "Could not override 'sed'"), ("trainer=foo", "gpu"), ("logger=null", "error: logger=null: must be the name of a file")],
)
def test_what_cannot_be_composed_ends_without_a_traceback(tmp_path, argument, said):
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", f"run_dir={tmp_path}/run", argument], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
