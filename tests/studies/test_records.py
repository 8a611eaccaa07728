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
        machine="Kühl [\n 1 ]",
        git_commit=None,
    )
    path = tmp_path / "results" / "C1" / "new-seed2.json"
    records.write_record(path, records.Record(**content))
    record = records.read_record(path)
    assert record.metrics == content["metrics"] | {"loss": None}
    assert record.curves == {"val_top1": CURVE}
    assert (record.maps, record.seed, record.git_commit, record.place) == ({"loss": MAP}, 2, None, "C1/new-seed2.json")
    assert record.machine == "Kühl [\n 1 ]"
    assert list(json.loads(path.read_text())) == list(made.content())
    assert [one.name for one in path.parent.iterdir()] == ["new-seed2.json"]


@pytest.mark.parametrize(("epochs", "end"), [(11, None), (12, 11.5), (36, 33.5)])
def test_the_end_of_a_long_training(epochs, end):
    curve = [[step, step / 10] for step in range(10, 10 * epochs + 1, 10)]
    record = records.Record(**made.content(metrics={"top1": 1.0}, curves={"val_top1": curve}))
    assert record.values == {"top1": 1.0} | ({} if end is None else {"val_end": end})


def test_a_file_has_a_line_for_every_metric_and_curve(tmp_path):
    path = tmp_path / "C1" / "new-seed0.json"
    records.write_record(path, records.Record(**made.content(metrics={"top1": 61.2, "loss": 1.5}, curves={"val_top1": CURVE})))
    assert path.read_text(encoding="utf-8").splitlines()[5:16] == [
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"host": "x"}, f"content=['host']: must be a mapping with {', '.join(made.content())}"),
        ({"arm": "other"}, "its claim, arm and seed say C1/other-seed0.json; must be what the file is called"),
    ],
)
def test_what_cannot_be_is_not_read(tmp_path, change, message):
    path = tmp_path / "results" / "C1" / "new-seed0.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(made.content() | change))
    with pytest.raises(UsageError) as error:
        records.read_records(tmp_path / "results")
    assert str(error.value) == f"{path}: {message}"


@pytest.mark.parametrize("key", sorted(made.content().keys() - {"format"}))
def test_every_key_is_needed(tmp_path, key):
    path = made.record(tmp_path)
    path.write_text(json.dumps({name: value for name, value in made.content().items() if name != key}))
    with pytest.raises(UsageError, match=f"^{path}: content.{key}: is missing$"):
        records.read_record(path)


def test_a_record_of_before_formats_is_of_the_first(tmp_path):
    path = made.record(tmp_path)
    path.write_text(json.dumps({name: value for name, value in made.content().items() if name != "format"}))
    assert records.read_record(path).format == 1


@pytest.mark.parametrize("text", ["", "{", "[]"])
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
