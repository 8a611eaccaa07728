"""Claim files. Oracle: what is in the file; every message written out."""

import pytest

from qat.errors import UsageError
from studies.claims import Expectation, load_claim, load_claims
from tests.studies import made

EXPECT = {"what": "it", "metric": "top1", "arm": "new", "than": "old", "is": "higher"}
LINES = {"file": "c01-bits.svg", "kind": "lines", "metric": "top1", "x": "bits", "y": "top-1, %", "series": {"New": {2: "new", 3: "new"}}}
BARS = {"file": "c01-bars.svg", "kind": "bars", "metric": "top1", "y": "top-1, %", "series": ["new", "old"]}
CURVES = {"file": "c01-osc.svg", "kind": "curves", "curve": "osc", "x": "step", "y": "%", "series": {"New": "new"}}
TABLE = {"rows": ["new", "old"], "columns": {"top1": "top-1"}}


def test_a_whole_file(tmp_path):
    path = made.claim(
        tmp_path,
        seeds=[0, 1],
        arms={"new": {"label": "New", "use": ["cifar"], "further": {"a": 1}}, "old": {"label": "Old", "seeds": [0]}},
        expect=[EXPECT | {"by": 1, "is": "within", "format": ".4f"}],
        tables=[TABLE | {"caption": "All.", "formats": {"top1": ".1f"}, "labels": {"old": "Older"}}],
        figures=[LINES | {"reference": {"old": "old"}}, BARS | {"headline": True}, CURVES | {"reference": {"old": "old"}}],
        why=" Because.\n",
    )
    claim = load_claim(path)
    assert (claim.id, claim.title, claim.why) == ("C1", "New against old", "Because.")
    assert claim.arms["new"] == {"label": "New", "use": ["cifar"], "further": {"a": 1}}
    assert (claim.seeds_of("new"), claim.seeds_of("old")) == ((0, 1), (0,))
    assert claim.expect == (Expectation("it", "top1", "new", "old", "within", 1.0, "+.4f"),)
    (table,) = claim.tables
    assert (table.rows, table.columns, table.labels) == (("new", "old"), {"top1": "top-1"}, {"old": "Older"})
    lines, bars, curves = claim.figures
    assert (lines.shows, lines.arms, bars.arms, curves.shows) == ("top1", ("new", "new", "old"), ("new", "old"), "osc")
    assert (lines.metric, curves.metric, curves.arms) == ("top1", "top1", ("new", "old"))
    assert (lines.headline, bars.headline) == (False, True)
    assert (claim.place("new"), claim.place("C2/new")) == (("C1", "new"), ("C2", "new"))


def test_defaults(tmp_path):
    claim = load_claim(made.claim(tmp_path))
    assert (claim.seeds, claim.expect, claim.tables, claim.figures, claim.why) == ((0, 1, 2), (), (), (), "")


def test_order_of_the_page(tmp_path):
    for name in ("TUNE", "C10", "ZZZ", "C2", "PEERS", "AIM", "START", "ABC"):
        made.claim(tmp_path, name)
    assert list(load_claims(tmp_path / "studies" / "claims")) == ["START", "AIM", "C2", "C10", "PEERS", "TUNE", "ABC", "ZZZ"]


MISTAKES = [
    ({"title": ""}, "title='': allowed is a text that is not empty"),
    ({"id": "c1"}, "id='c1': allowed is capitals and a number, as C1"),
    ({"kind": 1}, "kind=1: unknown, allowed are id, title, source, statement, seeds, arms, expect, tables, figures, why, readme"),
    ({"seeds": []}, "seeds=[]: allowed is a list of seeds, as [0, 1, 2]"),
    ({"seeds": [0, 0]}, "seeds=[0, 0]: allowed is a list of seeds, as [0, 1, 2]"),
    ({"arms": {"a.b": {"label": "x"}}}, "arms='a.b': allowed are names of letters, digits, _ and -"),
    ({"arms": {"a": {"use": []}}}, "arms.a.label=None: allowed is a text that is not empty"),
    ({"arms": {"a": None}}, "arms.a=None: allowed is a mapping with label"),
    ({"arms": {"a": {"label": "x", "seeds": 0}}}, "arms.a.seeds=0: allowed is a list of seeds, as [0, 1, 2]"),
    ({"expect": {}}, "expect={}: allowed is a list of mappings"),
    ({"expect": [EXPECT | {"is": "bigger"}]}, "expect[0].is='bigger': allowed is one of higher, lower, within, near"),
    ({"expect": [EXPECT | {"by": -1}]}, "expect[0].by=-1: allowed is a number from 0"),
    ({"expect": [EXPECT | {"than": None}]}, "expect[0].than=None: allowed is an arm or a number"),
    ({"expect": [EXPECT, EXPECT | {"more": 1}]}, "expect[1].more=1: unknown, allowed are what, metric, arm, than, is, by, format"),
    ({"expect": [EXPECT | {"format": "d"}]}, "expect[0].format='d': allowed is a format such as .2f"),
    ({"expect": [EXPECT | {"arm": "newer"}]}, "expect[0].arm='newer': no such arm, allowed are new, old"),
    ({"expect": [EXPECT | {"than": "C9/old"}]}, "expect[0].than='C9/old': no such claim, allowed are C1"),
    ({"tables": [TABLE | {"rows": []}]}, "tables[0].rows=[]: allowed is a list of arms"),
    ({"tables": [TABLE | {"rows": ["newer"]}]}, "tables[0].rows='newer': no such arm, allowed are new, old"),
    ({"tables": [{"rows": ["new"]}]}, "tables[0].columns=None: allowed is a mapping from metrics to headings"),
    (
        {"tables": [TABLE | {"formats": {"x": ".1f"}}]},
        "tables[0].formats={'x': '.1f'}: allowed is a mapping from its columns to .2f or the like",
    ),
    ({"tables": [TABLE | {"labels": {"x": "X"}}]}, "tables[0].labels={'x': 'X'}: allowed is a mapping from its rows to texts"),
    ({"figures": [LINES | {"kind": "pie"}]}, "figures[0].kind='pie': allowed is one of lines, bars, curves, map"),
    ({"figures": [LINES | {"file": "../a.svg"}]}, "figures[0].file='../a.svg': allowed is a name such as c01-bits.svg"),
    ({"figures": [LINES | {"series": ["new"]}]}, "figures[0].series=['new']: allowed is a mapping {name: {x: arm}}"),
    ({"figures": [BARS | {"series": {"a": "new"}}]}, "figures[0].series={'a': 'new'}: allowed is a list of arms"),
    ({"figures": [CURVES | {"kind": "map", "metric": "top1"}]}, "figures[0].metric='top1': a figure of kind map has none"),
    ({"figures": [LINES | {"reference": {"a": "b"}}]}, "figures[0]='b': no such arm, allowed are new, old"),
    ({"figures": [BARS, BARS]}, "figures[1].file='c01-bars.svg': taken by {path}"),
    (
        {"figures": [BARS | {"file": f"{name}.svg", "headline": True} for name in "abc"]},
        "figures[2].headline=True: the README has room for 2",
    ),
]


@pytest.mark.parametrize(("settings", "message"), MISTAKES, ids=[message[:40] for _, message in MISTAKES])
def test_mistakes(tmp_path, settings, message):
    path = made.claim(tmp_path, **settings)
    with pytest.raises(UsageError) as error:
        load_claims(path.parent)
    assert str(error.value) == f"{path}: {message}".replace("{path}", str(path))


def test_one_id_in_two_files_and_none_at_all(tmp_path):
    first = made.claim(tmp_path)
    second = first.with_name("d01.yaml")
    second.write_text(first.read_text())
    with pytest.raises(UsageError, match=f"^{second}: id='C1': taken by {first}$"):
        load_claims(first.parent)
    with pytest.raises(UsageError, match=r"allowed is a folder with claims$"):
        load_claims(tmp_path)


@pytest.mark.parametrize("more", ["arms:\n  x: {label: a}\n", "  twice: {label: a}\n  twice: {label: b}\n", "  bad: [\n"])
def test_a_key_that_stands_twice_and_broken_yaml(tmp_path, more):
    path = made.claim(tmp_path, arms={"new": {"label": "New"}})
    path.write_text(path.read_text() + more)
    with pytest.raises(UsageError) as error:
        load_claim(path)
    assert str(error.value).startswith(f"{path}: content=")
    assert "\n" not in str(error.value)


def test_arms_may_share_settings_by_yaml_itself(tmp_path):
    path = made.claim(tmp_path, arms={})
    path.write_text(path.read_text().replace("arms: {}", "arms:\n  a: &a {label: A, use: [x]}\n  b: {<<: *a, label: B}"))
    assert load_claim(path).arms["b"] == {"label": "B", "use": ["x"]}
