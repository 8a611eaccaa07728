"""What strangers wrote is read within bounds. Oracle: counts by hand."""

import json

import pytest
import torch
from torch import nn

from qat.utils.bounds import MOST_DEPTH, MOST_JSON_BYTES, about_as_large_as, check_bounds, read_json, read_yaml


def nested(depth):
    return [nested(depth - 1)] if depth else 1


def test_depth():
    check_bounds(nested(MOST_DEPTH - 1))
    with pytest.raises(ValueError, match=f"nested more than {MOST_DEPTH} deep"):
        check_bounds(nested(MOST_DEPTH))
    with pytest.raises(ValueError, match=f"nested more than {MOST_DEPTH} deep"):
        check_bounds({"a": nested(10**3 - 100)})


def test_values_are_counted_at_each_use():
    row = [1] * 10
    check_bounds({"a": row, "b": row}, most=22)
    with pytest.raises(ValueError, match="holds more than 21 values"):
        check_bounds({"a": row, "b": row}, most=21)


@pytest.mark.parametrize(("text", "said"), [("[" * 10**5, "nested"), ("[" * 100 + "]" * 100, "nested"), ("{", "Expecting"), ("\xff", "")])
def test_json(tmp_path, text, said):
    path = tmp_path / "a.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=said):
        read_json(path)
    path.write_text(json.dumps({"a": [1, None, "b"]}))
    assert read_json(path) == {"a": [1, None, "b"]}


def test_a_large_file_is_not_read(tmp_path):
    path = tmp_path / "a.json"
    with path.open("wb") as file:
        file.truncate(10 * MOST_JSON_BYTES)
    with pytest.raises(ValueError, match=f"is larger than {MOST_JSON_BYTES} bytes"):
        read_json(path)


@pytest.mark.parametrize("text", ["a: &a [1]\n", "a: !!python/name:os.system\n", "[" * 10**5, "a: ["])
def test_yaml(tmp_path, text):
    path = tmp_path / "a.yaml"
    aliases = "".join(f"b{n + 1}: &b{n + 1} [{', '.join([f'*b{n}'] * 9)}]\n" for n in range(9))
    path.write_text(text.replace("a: &a [1]", f"b0: &b0 [1]\n{aliases}"))
    with pytest.raises(ValueError, match=r"."):
        read_yaml(path)
    path.write_text("a: 1.0e-05\nb: &x [c]\nd: *x\n")
    assert read_yaml(path) == ({"a": 1e-5, "b": ["c"], "d": ["c"]}, "a: 1.0e-05\nb: &x [c]\nd: *x\n")


def test_a_net_may_be_as_large_as_its_weights_and_hooks_go():
    state = nn.Linear(2000, 2000).state_dict()
    hooks = nn.modules.module._global_parameter_registration_hooks
    with about_as_large_as(state):
        assert len(nn.Linear(2000, 2000).weight) == 2000
    assert not hooks
    with pytest.raises(ValueError, match="much larger than the weights of the file, at its weight"), about_as_large_as(state):
        torch.nn.Linear(10**5, 10**3)
    with pytest.raises(ValueError, match="much larger"), about_as_large_as(state):
        nn.Sequential(*(nn.BatchNorm1d(1) for _ in range(10**4)))
    assert not hooks
