"""Claim files. Oracle: what is in the file; messages written out."""

import pytest

from qat.errors import UsageError
from studies.claims import Expectation, Further, load_claim, load_claims
from tests.studies import made

EXPECT = {"what": "it", "metric": "top1", "arm": "new", "than": "old", "is": "higher"}
LINES = {"file": "c01-bits.svg", "kind": "lines", "metric": "top1", "x": "bits", "y": "top-1, %", "series": {"New": {2: "new", 3: "new"}}}
CURVES = {"file": "c01-osc.svg", "kind": "curves", "curve": "osc", "x": "step", "y": "%", "series": {"New": "new"}}
TABLE = {"rows": ["new", "old"], "columns": {"top1": "top-1"}}


def test_a_whole_file(tmp_path):
    arms = {
        "new": {"label": "New", "use": ["cifar"], "further": {"a": {"command": "ptq"}}, "best_of": ["old", "C2/x"]},
        "old": {"label": "Old", "seeds": [0]},
    }
    path = made.claim(
        tmp_path,
        seeds=[0, 1],
        arms=arms,
        expect=[EXPECT | {"by": 1, "is": "within", "format": ".4f"}],
        tables=[TABLE | {"caption": "All.", "formats": {"top1": ".1f"}, "labels": {"old": "Older"}}],
        figures=[LINES | {"reference": {"old": "old"}}, CURVES | {"reference": {"old": "old"}}],
        why=" Because.\n",
    )
    claim = load_claim(path)
    assert (claim.id, claim.title, claim.why) == ("C1", "New against old", "Because.")
    new, old = claim.arms.values()
    assert (new.path, new.label, new.use, new.seeds, new.best_of) == ("C1/new", "New", ["cifar"], [0, 1], ["C1/old", "C2/x"])
    assert (new.further, old.seeds) == ({"a": Further("ptq")}, [0])
    assert claim.expect == [Expectation("it", "top1", "new", "old", "within", 1, ".4f")]
    (table,) = claim.tables
    assert (table.rows, table.columns, table.labels) == (["new", "old"], {"top1": "top-1"}, {"old": "Older"})
    lines, curves = claim.figures
    assert (lines.metric, lines.arms, curves.curve, curves.arms) == ("top1", ("new", "new", "old"), "osc", ("new", "old"))
    assert (claim.place("new"), claim.place("C2/new")) == (("C1", "new"), ("C2", "new"))


def test_order_of_the_page(tmp_path):
    for name in ("TUNE", "C10", "ZZZ", "C2", "PEERS", "AIM", "START", "ABC"):
        made.claim(tmp_path, name)
    assert list(load_claims(tmp_path / "studies" / "claims")) == ["START", "AIM", "C2", "C10", "PEERS", "TUNE", "ABC", "ZZZ"]


MISTAKES = [
    (
        {"kind": 1},
        "content=['kind']: must be a mapping with id, title, source, statement, arms, seeds, expect, tables, figures, why, readme",
    ),
    ({"arms": {"a": {"use": []}}}, "arms.a.label: is missing"),
    ({"arms": {"a": None}}, "arms.a=None: must be a mapping with label, "),
    ({"expect": [EXPECT | {"is": "bigger"}]}, "expect[0].direction='bigger': must be one of higher, lower, within, near"),
    ({"expect": [EXPECT, EXPECT | {"more": 1}]}, "expect[1]=['more']: must be a mapping with what, metric, "),
    ({"tables": [{"rows": ["new"]}]}, "tables[0].columns: is missing"),
    ({"figures": [LINES | {"kind": "pie"}]}, "figures[0].kind='pie': must be one of lines, scatter, curves, map"),
]


@pytest.mark.parametrize(("settings", "message"), MISTAKES, ids=[message[:40] for _, message in MISTAKES])
def test_mistakes(tmp_path, settings, message):
    path = made.claim(tmp_path, **settings)
    with pytest.raises(UsageError) as error:
        load_claims(path.parent)
    assert str(error.value).startswith(f"{path}: {message}")


def test_a_folder_without_claims_and_broken_yaml(tmp_path):
    with pytest.raises(UsageError, match="must be a folder with claims$"):
        load_claims(tmp_path)
    path = made.claim(tmp_path)
    path.write_text(path.read_text() + "  bad: [\n")
    with pytest.raises(UsageError, match=f"^{path}: must be YAML "):
        load_claim(path)
