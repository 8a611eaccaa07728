"""The command line before Hydra. Oracle: Hydra's own grammar, which gives back the path that was typed, and the files of `conf/`."""

import os
import shlex

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from qat.cli import arguments
from qat.errors import UsageError
from tests.conftest import ROOT

PARSER = OverridesParser.create()


def value(argument):
    """What Hydra makes of an argument."""
    return PARSER.parse_override(argument).value()


@pytest.mark.parametrize(
    "path",
    [
        "my photos/cat dog",
        "a=b, c",
        "it's",
        "ends with \\",
        "back\\'slash quote",
        "(1) [2] {3}",
        "#1 & co: 50 %",
        "100%",
        "tab\there",
        "é\u0301 咖",
        "/plain/path_1.ckpt",
    ],
)
@pytest.mark.parametrize("key", ["data.root", "+ckpt", "run_dir", "predict"])
def test_a_path_is_what_was_typed(key, path):
    (argument,) = arguments.prepared([f"{key}={path}"])
    assert value(argument) == path


def test_a_home_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home of/me")
    given = ["data.root=~/x y", "ckpt=~", "ckpt=~me/x", "model=~x"]
    expected = ["data.root='/home of/me/x y'", "ckpt='/home of/me'", "ckpt='~me/x'", "model=~x"]
    assert arguments.prepared(given) == expected
    assert value(expected[0]) == f"{os.path.expanduser('~')}/x y"


@pytest.mark.parametrize(
    "argument", ["ckpt='a b'", "ckpt=${oc.env:HOME}/a b", "ckpt=null", "quant.bits=2,3", "~logger", "-m", "loss.kure_layers=[a, b]"]
)
def test_what_is_grammar_stays_as_it_is(argument):
    assert arguments.prepared([argument]) == [argument]


def test_a_list_of_paths_is_a_sweep_under_multirun_alone():
    assert arguments.prepared(["-m", "ckpt=a,b"]) == ["-m", "ckpt=a,b"]
    assert value(arguments.prepared(["ckpt=a,b"])[0]) == "a,b"


def test_brackets_in_a_path_make_no_sweep():
    assert value(arguments.prepared(["-m", "run_dir=/x (1)"])[1]) == "/x (1)"
    assert arguments.prepared(["-m", "ckpt=choice(a,b)"])[1] == "ckpt=choice(a,b)"


def test_nets_to_compare_are_a_list(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert value(arguments.prepared(["ckpt=[a.ckpt, it's b=1.ckpt,~/c]"])[0]) == ["a.ckpt", "it's b=1.ckpt", "/home/me/c"]
    assert arguments.prepared(["ckpt=['a b',${oc.env:HOME}/c]"]) == ["ckpt=['a b',${oc.env:HOME}/c]"]
    (tmp_path / "[a]").touch()
    monkeypatch.chdir(tmp_path)
    assert value(arguments.prepared(["ckpt=[a]"])[0]) == "[a]"


@pytest.mark.parametrize(
    "argument", ["data=_common", "loss=_regularizers", "quant=nothing", "callbacks=[default,nothing]", "+experiment=x"]
)
def test_a_choice_that_there_is_not_is_answered_with_those_that_there_are(argument):
    group = argument.lstrip("+").partition("=")[0]
    with pytest.raises(UsageError, match=r"must be one of ") as caught:
        arguments.check([argument])
    listed = str(caught.value).partition("must be one of ")[2].split(", ")
    assert set(listed) == {path.stem for path in (ROOT / "conf" / group).glob("[!_]*.yaml")}


def test_help_lists_no_internals():
    lines = dict(line.split(": ") for line in arguments.groups().splitlines())
    assert "hydra" not in lines
    assert lines["data"].split(", ")[0] == "cifar10"
    assert not [name for choices in lines.values() for name in choices.split(", ") if name.startswith("_")]


def test_somebodys_own_folder_of_configs_has_choices_of_its_own():
    arguments.check(["quant=mine", "hydra.searchpath=[file:///mine]"])
    with pytest.raises(UsageError, match="data=_common"):
        arguments.check(["data=_common", "hydra.searchpath=[file:///mine]"])


@pytest.mark.parametrize(
    ("argument", "successor"),
    [
        ("search=bits", "analysis.budget_mb=MB"),
        ("opset=21", "the lowest opset"),
        ("analysis.factors=true", "a folded matrix is listed as it is quantized"),
        ("analysis.activations=false", "analysis.activation_images=0"),
        ("callbacks.finite.policy=skip", "resume=true"),
        ("experiment=ofq_deit_s_w2a2", "experiment=ofq_w2a2 model=deit_s"),
        ("+experiment=evolq_vit_b_w4a8", "experiment=evolq_w4a8 model=vit_b"),
    ],
)
def test_what_has_gone_names_what_took_its_place(argument, successor):
    with pytest.raises(UsageError, match="is gone; instead: ") as caught:
        arguments.check([argument])
    assert str(caught.value).endswith(successor) or successor in str(caught.value)
    named = [word for word in shlex.split(successor) if word.startswith(("experiment=", "model="))]
    arguments.check(named)  # the successor is there


def test_launchers_of_plugins_are_known_to_hydra_alone():
    arguments.check(["hydra/launcher=submitit_local"])
    arguments.check(["hydra/launcher=joblib"])
