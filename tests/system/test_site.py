"""The pages as a site. Oracles: the files that there are, `qat.__all__`, zensical itself."""

import html
import re
import runpy
import tomllib

import pytest

import qat
from tests.commands import run_python
from tests.conftest import ROOT

DOCS = ROOT / "docs"
CONFIG = tomllib.loads((ROOT / "zensical.toml").read_text())["project"]
NAMED = [
    line
    for page in (DOCS / "api").glob("*.md")
    for line in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)
]
# Kilobytes of a page, of README and all pages, and letters of a page of the site, which has the API.
LARGEST_KB, ALL_KB, LARGEST_PAGE = 13.5, 150, 60_000
GENERATED = {"accuracy.md", "models.md", "settings.md", "transformers_models.md"}


def in_menu(entry):
    """Files of an entry of the menu."""
    if isinstance(entry, str):
        return [entry]
    return [
        page
        for one in (entry.values() if isinstance(entry, dict) else entry)
        for page in in_menu(one)
    ]


def test_every_page_is_in_the_menu_once():
    pages = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    assert sorted(in_menu(CONFIG["nav"])) == sorted(pages | {"index.md", "changes.md"})


def test_the_site_states_the_version():
    assert CONFIG["copyright"].startswith(f"qat {qat.__version__},")


def test_the_pages_are_short():
    sizes = {
        page.name: page.stat().st_size / 1000
        for page in [ROOT / "README.md", *DOCS.glob("*.md")]
        if page.name not in GENERATED
    }
    assert {name: size for name, size in sizes.items() if size > LARGEST_KB} == {}
    assert sum(sizes.values()) <= ALL_KB


@pytest.mark.parametrize(
    "page", sorted({ROOT / "README.md", *DOCS.rglob("*.md")} - {DOCS / "glossary.md"}), ids=str
)
def test_a_page_links_each_term_where_it_first_uses_it(page):
    """Outside code, headings and pictures. "Code" and "heads" also have an everyday sense."""
    text = re.sub(r"(?ms)```.*?```|^(#|:::).*?$|`[^`\n]*`|!\[[^]]*\]", "", page.read_text())
    text = re.sub(r"\]\([^)]*\)", "]", text)
    for heading in re.findall(r"(?m)^## (.+)", (DOCS / "glossary.md").read_text()):
        terms = re.escape(heading).replace(r",\ ", "|")
        flags = re.IGNORECASE if heading[1:].islower() else 0
        before, *first = re.split(
            rf"(?<![\w/-])(?:{terms})s?(?![\w-])", text, maxsplit=1, flags=flags
        )
        is_linked = before.rfind("[") > before.rfind("]")
        assert not first or is_linked or heading in {"Code", "Stem and heads"}, heading


def test_the_python_api_is_shown_whole():
    assert sorted(name for name in NAMED if name.count(".") == 1) == sorted(
        f"qat.{name}" for name in qat.__all__
    )
    assert [name for name in qat.__all__ if not getattr(qat, name).__doc__] == []


@pytest.mark.parametrize(
    ("page", "repository", "link", "expected"),
    [
        ("docs/api/ptq.md", None, "[swept](../deviations.md#seq)", "[swept](../deviations.md#seq)"),
        ("docs/quickstart.md", None, "[readme](../README.md#map)", "[readme](index.md#map)"),
        (
            "README.md",
            None,
            "![a report](docs/figures/report.png)",
            "![a report](figures/report.png)",
        ),
        (
            "docs/api/index.md",
            None,
            "[book](../../examples/quickstart.ipynb)",
            "[book](../examples/quickstart.ipynb)",
        ),
        ("docs/accuracy.md", None, "[runs](../evidence/records)", "runs (`evidence/records`)"),
        (
            "docs/quickstart.md",
            "https://example.org/qat/",
            "[conf/](../conf)",
            "[conf/](https://example.org/qat/tree/main/conf)",
        ),
        (
            "README.md",
            "https://example.org/qat",
            "[cite](CITATION.cff)",
            "[cite](https://example.org/qat/blob/main/CITATION.cff)",
        ),
        (
            "docs/training.md",
            None,
            "[lost](nowhere.md)",
            "[lost](nowhere.md)",
        ),  # what zensical refuses
    ],
)
def test_links_lead_where_they_should(page, repository, link, expected):
    rewritten = runpy.run_path(str(DOCS / "theme" / "pages.py"))["rewritten"]
    assert rewritten(f"see {link}.", ROOT / page, repository) == f"see {expected}."


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("zensical")
    folder = tmp_path_factory.mktemp("site")
    runpy.run_path(str(DOCS / "theme" / "pages.py"))["write"](folder / "pages", None)
    config = (
        (ROOT / "zensical.toml")
        .read_text()
        .replace('"outputs/pages"', '"pages"')
        .replace('paths = ["."]', f'paths = ["{ROOT}"]')
    )
    (folder / "zensical.toml").write_text(config)
    done = run_python("-m", "zensical", "build", "--strict", cwd=folder)
    said = re.sub(r"\x1b\[[\d;]*m", "", done.stdout + done.stderr)
    assert done.returncode == 0, re.findall(
        r"^Warning: .*|\[ [\w/.-]+:\d+:\d+ \]", said, re.MULTILINE
    )
    return folder / "site"


@pytest.mark.long
def test_the_site_is_built_without_a_warning_and_asks_nobody(site):
    pages = {path: path.read_text() for path in site.rglob("*.html")}
    assert len(pages) > len(list(DOCS.rglob("*.md")))
    assets = r"""<(?:script|img|link)\b[^>]*(?:src|href)=["']?(https?:|//)"""
    assert [str(path) for path, text in pages.items() if re.search(assets, text)] == []
    articles = {
        path: text.partition("<article")[2].partition("</article>")[0]
        for path, text in pages.items()
    }
    words = {
        path: html.unescape(re.sub(r"<[^>]+>", "", text)).split() for path, text in articles.items()
    }
    assert {
        str(path): size
        for path, text in words.items()
        if (size := len(" ".join(text))) > LARGEST_PAGE
    } == {}
    assert [str(path) for path, text in words.items() if ":::" in text] == []
