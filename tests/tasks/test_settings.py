"""Types of settings. Oracle: `conf/`, Lightning's own signature, and that each typed field refuses what is not of its type."""

import dataclasses
import inspect
import re
import typing

import pytest
from hydra.errors import ConfigCompositionException
from lightning.pytorch import Trainer

from qat.cli.mistakes import error_line
from qat.errors import UsageError
from qat.tasks.settings import COMMANDS, check
from tests.conftest import compose


def typed_fields(kind, below=""):
    """Names of all settings with a type, groups within groups included."""
    for name, hint in typing.get_type_hints(kind).items():
        kinds = [hint, *typing.get_args(hint)]
        group = next((one for one in kinds if dataclasses.is_dataclass(one)), None)
        if group is not None:
            yield from typed_fields(group, f"{below}{name}.")
        elif dict not in map(typing.get_origin, kinds) and hint is not typing.Any:
            yield f"{below}{name}"


@pytest.mark.parametrize("command", COMMANDS)
def test_the_configs_are_valid(command):
    check(compose(command, "run_dir=a"))


SETTINGS = [
    (command, setting)
    for command, kind in COMMANDS.items()
    for setting in typed_fields(kind)
    if setting not in {"command", "run_dir"}
]


@pytest.mark.sample(20)
@pytest.mark.parametrize(("command", "setting"), SETTINGS)
def test_a_setting_is_typed(command, setting):
    wrong = "x" if setting in {"model.imports", "labels"} else "[[1]]"
    with pytest.raises(ConfigCompositionException) as caught:
        compose(command, "run_dir=a", f"++{setting}={wrong}")
    assert re.search(rf"\b{re.escape(setting)}\b", error_line(caught.value))


def test_a_search_follows_a_file_alone():
    with pytest.raises(ConfigCompositionException) as caught:
        compose("ptq", "run_dir=a", "teacher.pretrained=true")
    assert error_line(caught.value).startswith("teacher.pretrained: unknown")


def test_values_get_their_type():
    cfg = compose("train", "seed='3'", "overwrite=no", "scheduler.warmup_epochs=1", "run_dir=a")
    assert (cfg.seed, cfg.overwrite, cfg.scheduler.warmup_epochs) == (3, False, 1.0)


def test_lightnings_arguments_go_by_their_names():
    names = inspect.signature(Trainer).parameters
    cfg = compose("train", *(f"trainer.{name}=null" for name in names), "run_dir=a")
    assert set(names) <= set(cfg.trainer)
    assert (
        compose(
            "eval", "trainer=gpu", "trainer.profiler._target_=a.B", "run_dir=a"
        ).trainer.profiler._target_
        == "a.B"
    )


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        ("ckpt=''", "ckpt='': must be a path; null = none"),
        ("teacher.ckpt=''", "teacher.ckpt='': must be a path; null = none"),
        *(
            (f"{name}=1.10", f"{name}=1.1: must be a path")
            for name in ("ckpt", "model.weights", "teacher.ckpt", "data.root")
        ),
        ("ckpt_format=zip", "ckpt_format='zip': must be one of auto, qat, timm, ofq"),
        (
            "ckpt_bits=4",
            "ckpt_bits=4: works only with files of OFQ's own code (ckpt_format=ofq); set ckpt=FILE",
        ),
    ],
)
def test_what_cannot_work_is_named(typed, line):
    with pytest.raises(UsageError) as caught:
        check(compose("train", "run_dir=a", typed))
    assert str(caught.value).startswith(line)
