"""The page and the part of the README. Oracle: text written out by hand; second renderings."""

import json
from pathlib import Path

import pytest

from qat.errors import UsageError
from studies import page
from tests.studies import made

EXPECT = [
    {"what": "top-1", "metric": "top1", "arm": "new", "than": "old", "is": "higher"},
    {"what": "loss | of all", "metric": "loss", "arm": "new", "than": 1.5, "is": "within", "by": 0.5, "format": ".3f"},
]
TABLE = {
    "caption": "In per cent.",
    "rows": ["new", "old", "START/float"],
    "columns": {"top1": "top-1", "loss": "loss"},
    "formats": {"loss": ".3f"},
}
LINES = {
    "file": "c01-bits.svg",
    "kind": "lines",
    "metric": "top1",
    "x": "bits",
    "y": "top-1, %",
    "series": {"New": {2: "new"}, "Old": {2: "old"}},
}
OWN = [f"docs/results/{claim}.md" for claim in ("START", "AIM", "C1", "C2", "C10")]
README = f"# qat\n\n{page.BEGIN}\nold\n{page.END}\n\nrest\n"

SECTION = """\
<a id="c1"></a>

## C1: New against old

Source: Paper, [arXiv 2302.02210](https://arxiv.org/abs/2302.02210).

> New is better.

**C1: too small to see.** top-1: +2.00 [-0.48, +4.48] over 3 seeds; expected above 0.

It gains +2.0 ± 1.0 points.

In per cent.

| | top-1 | loss | seeds |
|---|---|---|---|
| New | 62.00 ± 1.00 | 0.900 ± 0.000 | 3 |
| Old | 60.00 ± 0.00 | – | 3 |
| float net | 66.00 | 2.500 | 1 |

Further differences, described and not judged:

| | difference | expected | seeds |
|---|---|---|---|
| loss \\| of all | -0.600 [-0.600, -0.600] | above -0.5 | 3 |

![top-1, % over bits: New, Old](figures/c01-bits.svg)

*By bits.*

`python -m studies run C1` makes these runs (6 runs, 6.0 minutes in all); records: [results/C1](../results/C1).
"""

OVERVIEW = """\
**Where** the runs were made:

- Other CPU; cpu; timm 1.0, torch 2.14: 1 run, 2.0 hours in all, 2026-11-20
- Some CPU, 2 cores, 1 thread; cpu; timm 1.0, torch 2.14: 7 runs, 7.0 minutes in all, 2026-11-21 to 2026-11-22

| claim | primary expectation | difference | expected | verdict |
|---|---|---|---|---|
| [START](#start) The float net | | | | measured |
| [AIM](#aim) The headline | | | | measured |
| [C1](#c1) New against old | top-1 | +2.00 [-0.48, +4.48] | above 0 | too small to see |
| [C2](#c2) New against old | top-1 | – | above 0 | not decided yet |
| [C10](#c10) New against old | | | | not run yet |

<a id="start"></a>
"""

NOT_RUN = """\
<a id="c2"></a>

## C2: New against old

Source: Paper, [arXiv 2302.02210](https://arxiv.org/abs/2302.02210).

> New is better.

**C2: not decided yet.** top-1: expected above 0.

No runs of its own yet: `python -m studies run C2` makes them.
"""

BLOCK = """\
<!-- results:begin -->

Ours: 65.00.

What the papers claim, seen here: 1 too small to see, 1 not decided yet. All of it, with runs: [docs/results.md](docs/results.md).

<!-- results:end -->"""  # noqa: E501


@pytest.fixture
def root(tmp_path):
    """A small repository."""
    made.claim(tmp_path, "START", title="The float net", arms={"float": {"label": "float net", "seeds": [0], "keep": True}})
    arms = {"ours": {"label": "Ours"}, "longer": {"label": "Longer"}, "longest": {"label": "Longest"}}
    made.claim(tmp_path, "AIM", title="The headline", arms=arms, readme="Ours: {ours.top1}.")
    figure = LINES | {"caption": "By bits."}
    made.claim(tmp_path, expect=EXPECT, tables=[TABLE], figures=[figure], why="It gains {new.top1 - old.top1:.1f} points.")
    made.claim(tmp_path, "C2", expect=EXPECT)
    made.claim(tmp_path, "C10")
    for seed in range(3):
        more = {"further_commands": {"more": "python ptq.py more"}, "date": f"2026-11-2{1 + seed % 2}"}
        made.record(tmp_path, arm="new", seed=seed, metrics={"top1": 61.0 + seed, "loss": 0.9}, **more)
        made.record(tmp_path, arm="old", seed=seed, metrics={"top1": 60.0})
    made.record(tmp_path, claim="START", arm="float", metrics={"top1": 66.0, "loss": 2.5})
    made.record(tmp_path, claim="AIM", arm="ours", metrics={"top1": 65.0}, machine="Other CPU", wall_seconds=7200.0, date="2026-11-20")
    (tmp_path / "README.md").write_text(README)
    return tmp_path


def rendered(root):
    return page.render(read(root))


def read(root):
    return page.read_evidence(root / page.CLAIMS, root / page.RESULTS)


def test_sections_and_overview(root):
    text = rendered(root)
    assert text[text.index('<a id="c1">') : text.index('<a id="c2">')] == SECTION + "\n"
    assert text[text.index('<a id="c2">') : text.index('<a id="c10">')] == NOT_RUN + "\n"
    assert OVERVIEW in text
    assert text.startswith("# Results\n")
    assert text.endswith("makes them.\n")
    assert "\r" not in text


def test_a_claim_without_expectations_and_tables(root):
    text = rendered(root)
    start = text[text.index('<a id="start">') : text.index('<a id="aim">')]
    assert "**START" not in start
    assert "| | top-1, % | seeds |\n|---|---|---|\n| float net | 66.00 | 1 |" in start
    assert "\n`python -m studies run START` makes these runs (1 run, 1.0 minutes in all)" in start


def test_readme_block(root):
    assert page.readme_block(read(root)) == BLOCK


def test_our_own_claims_are_counted_apart(root):
    made.claim(root, "C2", source="ours; more", expect=EXPECT)
    assert "seen here: 1 too small to see. Of our own: 1 not decided yet. All of it" in page.readme_block(read(root))


def test_aims_are_reached_or_missed(root):
    pair = {"metric": "top1", "arm": "C1/new", "than": "C1/old", "is": "higher"}
    aims = [pair | {"what": f"by {by:g}", "by": by, "aim": True} for by in (2.0, 2.1)]
    made.claim(root, "AIM", title="The headline", arms={"ours": {"label": "Ours"}}, expect=[*aims, pair | {"what": "more"}])
    lines = page.readme_block(read(root)).splitlines()
    assert [line for line in lines if line.startswith("- ")] == [
        "- by 2: +2.00 [-0.48, +4.48], 3 seeds, reached",
        "- by 2.1: +2.00 [-0.48, +4.48], 3 seeds, *missed*",
    ]
    (root / page.RESULTS / "C1" / "new-seed2.json").unlink()
    assert "- by 2: +1.50 [-4.85, +7.85], 2 seeds, not decided yet" in page.readme_block(read(root))


def test_a_claim_without_arms_speaks_of_the_others(root):
    made.claim(root, "C10", arms={}, why="New gives {C1/new.top1 - C1/old.top1:.1f} points.")
    text = rendered(root)
    assert "| [C10](#c10) New against old | | | | drawn from the others |" in text
    assert "New gives +2.0 ± 1.0 points.\n\nNo runs of its own.\n" in text


def test_what_is_written_is_up_to_date(root):
    assert [line.partition(": ")[0] for line in page.check(root)] == [
        str(root / name) for name in ("docs/figures/c01-bits.svg", page.PAGE, *OWN, page.README)
    ]
    page.write(root)
    assert page.check(root) == []
    assert (root / page.PAGE).read_text().count("](results/") == 5
    c1 = (root / "docs/results/C1.md").read_text()
    own = SECTION.partition("\n\n")[2].replace("## C1", "# C1")
    assert c1 == own.replace("(figures/", "(../figures/").replace("(../results/", "(../../results/")
    assert (root / page.README).read_text() == f"# qat\n\n{BLOCK}\n\nrest\n"
    assert [path.name for path in (root / page.FIGURES).iterdir()] == ["c01-bits.svg"]


def test_what_is_stale_is_told(root):
    page.write(root)
    path = root / page.RESULTS / "C1" / "new-seed1.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"metrics": content["metrics"] | {"top1": 62.02}}))
    assert page.check(root) == [
        f"{root / name}: not what results/ says, python -m studies page writes it" for name in (page.PAGE, "docs/results/C1.md")
    ]
    path.write_text(json.dumps(content))
    assert page.check(root) == []
    for name in ("docs/results/AIM.md", page.README):
        text = (root / name).read_text()
        (root / name).write_text(text.replace("65.00", "65.01"))
        assert page.check(root) == [f"{root / name}: not what results/ says, python -m studies page writes it"]
        (root / name).write_text(text)
    (root / page.FIGURES / "c01-bits.svg").unlink()
    assert page.check(root) == [f"{root / page.FIGURES / 'c01-bits.svg'}: missing, python -m studies page draws it"]


def test_a_second_rendering_has_the_same_bytes(root, monkeypatch):
    text = rendered(root)
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    monkeypatch.chdir(root)
    for name in ("glob", "rglob"):
        monkeypatch.setattr(Path, name, turned(getattr(Path, name)))
    assert rendered(root) == text
    assert page.render(read(Path())) == text


def turned(search):
    """A search of folders that gives what it finds the other way round."""
    return lambda *arguments: sorted(search(*arguments), reverse=True)


@pytest.mark.parametrize(("settings", "name"), [({"claim": "C3"}, "C3/new"), ({"arm": "newer"}, "C1/newer")])
def test_records_of_nothing_are_errors(root, settings, name):
    path = made.record(root, **settings)
    with pytest.raises(UsageError) as error:
        rendered(root)
    assert str(error.value) == f"{path}: {name} must be an arm of a claim in {root / page.CLAIMS}"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tables": [TABLE | {"columns": {"top5": "top-5"}}]}, "columns 'top5' of a table: must be a metric of one of its rows"),
        ({"tables": [TABLE | {"rows": ["newer"]}]}, "arm 'newer': must be one of a claim's, CLAIM/ARM or ARM"),
        ({"expect": [EXPECT[0] | {"arm": "C9/new"}]}, "arm 'C9/new': must be one of a claim's, CLAIM/ARM or ARM"),
        ({"figures": [LINES | {"reference": {"a": "b"}}]}, "arm 'b': must be one of a claim's, CLAIM/ARM or ARM"),
        ({"why": "{new.top5}"}, "new.top5: must be one of loss, top1"),
    ],
)
def test_what_a_claim_names_has_to_be_there(root, settings, message):
    path = made.claim(root, **settings)
    with pytest.raises(UsageError) as error:
        rendered(root)
    assert str(error.value) == f"{path}: {message}"


def test_a_metric_that_some_seeds_lack(root):
    made.record(root, arm="new", seed=1, metrics={"top1": 61.0})
    assert "| New | 61.67 ± 1.15 | 0.900 ± 0.000 (of 2) | 3 |" in rendered(root)


@pytest.mark.parametrize("text", ["# qat\n", f"{page.END}\n{page.BEGIN}\n", f"{page.BEGIN}\n{page.BEGIN}\n{page.END}\n"])
def test_a_readme_without_its_marks(root, text):
    (root / page.README).write_text(text)
    for call in (page.write, page.check):
        with pytest.raises(UsageError, match=f"^{root / page.README}: must have {page.BEGIN} once"):
            call(root)
    assert not (root / "docs").exists()


def test_a_readme_without_a_headline(root):
    (root / page.CLAIMS / "aim.yaml").unlink()
    (root / page.RESULTS / "AIM" / "ours-seed0.json").unlink()
    with pytest.raises(UsageError, match="must have the claim AIM, for the README$"):
        page.readme_block(read(root))


def test_nothing_has_been_run(root):
    for path in (root / page.RESULTS).rglob("*.json"):
        path.unlink()
    text = rendered(root)
    assert "**Where.** No runs yet." in text
    assert "figures/" not in text
    assert text.count("**C1: not decided yet.**") == 1
    page.write(root)
    assert page.check(root) == []
    assert not (root / page.FIGURES).exists()
