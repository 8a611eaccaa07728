"""The pages as a site. Oracles: the files that there are, `qat.__all__`, mkdocs itself."""

import html
import os
import re
import runpy
import subprocess
import sys
from types import SimpleNamespace

import pytest
import yaml

import qat
from tests.conftest import ROOT

DOCS = ROOT / "docs"
CONFIG = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
NAMED = [line for page in (DOCS / "api").glob("*.md") for line in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)]
LARGEST_PAGE = 60_000


def in_menu(entry):
    """Files of an entry of the menu."""
    if isinstance(entry, str):
        return [entry]
    return [page for one in (entry.values() if isinstance(entry, dict) else entry) for page in in_menu(one)]


def test_every_page_is_in_the_menu_once():
    pages = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    linked = {page for page in pages if page.startswith("results/")}  # results.md lists them
    assert sorted(in_menu(CONFIG["nav"])) == sorted(pages - linked | {"index.md", "changes.md"})


def test_no_page_is_too_large():
    pages = [ROOT / "README.md", ROOT / "CHANGELOG.md", *DOCS.rglob("*.md")]
    assert {str(page): size for page in pages if (size := page.stat().st_size) > LARGEST_PAGE} == {}


def test_the_python_api_is_shown_whole():
    assert sorted(name for name in NAMED if name.count(".") == 1) == sorted(f"qat.{name}" for name in qat.__all__)
    assert [name for name in qat.__all__ if not getattr(qat, name).__doc__] == []


@pytest.mark.parametrize(
    ("page", "repository", "link", "expected"),
    [
        ("results/C1.md", None, "[swept](../deviations.md#seq)", "[swept](../deviations.md#seq)"),
        ("install.md", None, "[readme](../README.md#map)", "[readme](index.md#map)"),
        ("index.md", None, "![a report](docs/figures/report.png)", "![a report](figures/report.png)"),
        ("results/C1.md", None, "[runs](../../evidence/records)", "runs (`evidence/records`)"),
        ("install.md", "https://example.org/qat/", "[conf/](../conf)", "[conf/](https://example.org/qat/tree/main/conf)"),
        ("index.md", "https://example.org/qat", "[cite](CITATION.cff)", "[cite](https://example.org/qat/blob/main/CITATION.cff)"),
        ("training.md", None, "[lost](nowhere.md)", "[lost](nowhere.md)"),  # what mkdocs refuses
    ],
)
def test_links_lead_where_they_should(page, repository, link, expected):
    pytest.importorskip("mkdocs")
    rewrite = runpy.run_path(str(DOCS / "theme" / "hooks.py"))["on_page_markdown"]
    page = SimpleNamespace(file=SimpleNamespace(src_uri=page))
    assert rewrite(f"see {link}.", page=page, config=SimpleNamespace(repo_url=repository)) == f"see {expected}."


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("material")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.long
def test_the_site_is_built_without_a_warning_and_asks_nobody(site):
    pages = {path: path.read_text() for path in site.rglob("*.html")}
    assert len(pages) > len(list(DOCS.rglob("*.md")))
    assets = r"""<(?:script|img|link)\b[^>]*(?:src|href)=["']?(https?:|//)"""
    assert [str(path) for path, text in pages.items() if re.search(assets, text)] == []
    articles = {path: text.partition("<article")[2].partition("</article>")[0] for path, text in pages.items()}
    words = {path: html.unescape(re.sub(r"<[^>]+>", "", text)).split() for path, text in articles.items()}
    assert {str(path): size for path, text in words.items() if (size := len(" ".join(text))) > LARGEST_PAGE} == {}
    assert [str(path) for path, text in words.items() if ":::" in text] == []
