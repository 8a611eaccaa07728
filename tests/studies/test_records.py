"""Files of runs. Oracle: what was written comes back; messages are written out."""

import json
import math

import pytest

from qat.errors import UsageError
from studies import records
from tests.studies import made

CURVE, MAP = [[1, 50.0], [2, None]], {"x": [0.0, 1.0], "y": [0.0], "z": [[1.5, None]]}


def test_what_is_written_comes_back(tmp_path):
    content = made.content(
        seed=2,
        further_commands={"w2": "python ptq.py 'a=[1,2]'"},
        metrics={"top1": 61.234567890123456, "w2.top1": 0.1 + 0.2, "loss": math.nan, "size_bytes": 1234},
        curves={"val_top1": [[1, 50.0], (2, math.inf)]},
        maps={"loss": MAP},
        git_commit=None,
    )
    path = tmp_path / "results" / "C1" / "new-seed2.json"
    records.write_record(path, dict(reversed(content.items())))
    record = records.read_record(path)
    assert record.metrics == content["metrics"] | {"loss": None}
    assert record.curves == {"val_top1": CURVE}
    assert (record.maps, record.seed, record.git_commit, record.place) == ({"loss": MAP}, 2, None, "C1/new-seed2.json")
    assert list(json.loads(path.read_text())) == list(made.content())
    assert [one.name for one in path.parent.iterdir()] == ["new-seed2.json"]


def test_a_file_has_a_line_for_every_metric_and_curve(tmp_path):
    path = tmp_path / "C1" / "new-seed0.json"
    records.write_record(path, made.content(metrics={"top1": 61.2, "loss": 1.5}, curves={"val_top1": CURVE}, machine="Kühl [\n 1 ]"))
    assert path.read_text(encoding="utf-8").splitlines()[:16] == [
        "{",
        '  "claim": "C1",',
        '  "arm": "new",',
        '  "seed": 0,',
        '  "command": "python train.py seed=0",',
        '  "further_commands": {},',
        '  "starts": {},',
        '  "metrics": {',
        '    "top1": 61.2,',
        '    "loss": 1.5',
        "  },",
        '  "curves": {',
        '    "val_top1": [[1, 50.0], [2, null]]',
        "  },",
        '  "maps": {},',
        '  "wall_seconds": 60.0,',
    ]
    assert records.read_record(path).machine == "Kühl [\n 1 ]"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": -1}, "seed=-1: allowed is a whole number from 0"),
        ({"seed": True}, "seed=True: allowed is a whole number from 0"),
        ({"command": ""}, "command='': allowed is a text that is not empty"),
        ({"metrics": {"top1": "61"}}, "metrics={'top1': '61'}: allowed is a mapping from names to numbers or null"),
        ({"curves": {"a": [[1, 2, 3]]}}, "curves={'a': [[1, 2, 3]]}: allowed is a mapping from names to lists of [x, y]"),
        (
            {"maps": {"a": {"x": [1], "y": [1], "z": [[1, 2]]}}},
            "maps={'a': {'x': [1], 'y': [1], 'z': [[1, 2]]}}: allowed is a mapping from names to {x, y, z} with a row of z for every y",
        ),
        ({"versions": None}, "versions=None: allowed is a mapping from names to texts or null"),
        ({"host": "x"}, f"host='x': unknown, allowed are {', '.join(made.content())}"),
        ({"arm": "other"}, "claim, arm, seed='C1/other-seed0.json': allowed is what the file is called, C1/new-seed0.json"),
    ],
)
def test_what_cannot_be_is_not_written_and_not_read(tmp_path, change, message):
    path = tmp_path / "results" / "C1" / "new-seed0.json"
    content = made.content() | change
    with pytest.raises(UsageError) as error:
        records.write_record(path, content)
    assert str(error.value) == f"{path}: {message}"
    assert not path.exists()
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(content))
    with pytest.raises(UsageError) as error:
        records.read_records(tmp_path / "results")
    assert str(error.value) == f"{path}: {message}"


@pytest.mark.parametrize("key", made.content())
def test_every_key_is_needed(tmp_path, key):
    path = made.record(tmp_path)
    path.write_text(json.dumps({name: value for name, value in made.content().items() if name != key}))
    with pytest.raises(UsageError, match=f"^{path}: {key}=None: allowed is "):
        records.read_record(path)


@pytest.mark.parametrize("text", ["", "{", '{"seed": NaN}', "[]"])
def test_what_is_no_record(tmp_path, text):
    path = made.record(tmp_path)
    path.write_text(text)
    with pytest.raises(UsageError, match=f"^{path}: "):
        records.read_record(path)


def test_all_are_found_in_order(tmp_path):
    for claim, arm, seed in (("C2", "a", 0), ("C1", "b", 10), ("C1", "b", 9), ("C1", "a", 0)):
        made.record(tmp_path, claim=claim, arm=arm, seed=seed)
    (tmp_path / "results" / "notes.txt").write_text("no record")
    found = [record.place for record in records.read_records(tmp_path / "results")]
    assert found == ["C1/a-seed0.json", "C1/b-seed9.json", "C1/b-seed10.json", "C2/a-seed0.json"]
    assert records.read_records(tmp_path / "nothing") == []
