"""`results.json`. Oracle: its keys and values in a strict JSON parser."""

import base64
import json
import subprocess

import pytest
import torch
from omegaconf import OmegaConf

import qat
from qat.model.cost import Cost
from qat.tasks.results import _git_commit, correct_field, recipe_fields, score_fields, write_results


def test_what_does_not_apply_is_null(tmp_path):
    write_results(
        OmegaConf.create({"command": "train", "run_dir": str(tmp_path), "seed": 3}),
        top1=float("nan"),
        loss=0.5,
    )
    found = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    assert (found["command"], found["seed"], found["loss"]) == ("train", 3, 0.5)
    assert (found["top1"], found["model"], found["data"], found["bitops"]) == (
        None,
        None,
        None,
        None,
    )


@pytest.mark.parametrize(
    ("name", "knobs", "quant"),
    [
        ("ofq", {"bits": 2}, "ofq_2bit"),
        ("fp", {}, "fp"),
        ("lsq", {"bits": 4, "act_bits": 8}, "lsq_w4a8"),
    ],
)
def test_a_recipe_is_named_as_its_config(name, knobs, quant):
    recipe = qat.recipe(name, **knobs)
    fields = recipe_fields(recipe)
    assert fields["quant"] == quant
    assert qat.QuantRecipe(**json.loads(json.dumps(fields["recipe"]))) == recipe


def git(folder, *arguments):
    command = ["git", "-C", folder, "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.mark.parametrize("place", [".venv/lib/python3.11/site-packages", "", "lib"])
def test_the_commit_is_never_that_of_the_project_around(tmp_path, monkeypatch, place):
    own = tmp_path / "own"
    theirs = tmp_path / "theirs"
    for folder, name in ((own, "vit-qat"), (theirs, "photos")):
        folder.mkdir()
        git(folder, "init", "-q")
        (folder / "pyproject.toml").write_text(f'[project]\nname = "{name}"\n')
        git(folder, "add", ".")
        git(folder, "commit", "-qm", "a")
    (theirs / place).mkdir(parents=True, exist_ok=True)
    commit = git(own, "rev-parse", "HEAD")
    for variable in ("QAT_NOTHING", "GIT_DIR"):  # the second as git sets it for a hook
        monkeypatch.setenv(variable, str(theirs / ".git"))
        assert _git_commit(own) == commit
        assert _git_commit(theirs / place) is None


def test_right_and_wrong_images_are_bits():
    text = correct_field(torch.tensor([True, False, False, True, True, False, False, True, True]))
    assert base64.b64decode(text["correct"]) == bytes([0b10011001, 0b10000000])
    assert correct_field(None) == {"correct": None}


def test_of_five_classes_or_fewer_all_are_among_the_five_likeliest():
    metrics = {"test/top1": 40.0, "test/top5": 100.0, "test/loss": 1.5}
    found = [score_fields(metrics, Cost(1, 2, 3, 4), classes) for classes in (6, 5)]
    assert (
        found[0]
        == found[1] | {"top5": 100.0}
        == {"top1": 40.0, "top5": 100.0, "loss": 1.5, "n_params": 1, "size_bytes": 2, "bitops": 4}
    )
