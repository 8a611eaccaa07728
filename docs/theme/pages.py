"""Lay out README.md, CHANGELOG.md, docs/ and examples/ for the site: `python docs/theme/pages.py FOLDER`.

Links are rewritten for the site.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tomllib
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1]
ROOT = DOCS.parent
EXAMPLES = ROOT / "examples"
PAGES = {ROOT / "README.md": "index.md", ROOT / "CHANGELOG.md": "changes.md"}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s:]+)(#[^)\s]*)?\)")


def rewritten(text: str, source: Path, repository: str | None) -> str:
    """A page's text; a link to what is on no page becomes one into the repository, or its path in words."""
    page = DOCS / PAGES.get(source, source)

    def link(found: re.Match[str]) -> str:
        image, words, address, anchor = found.groups(default="")
        target = (source.parent / address).resolve()
        if not target.exists():
            return found[0]  # zensical refuses it
        if target in PAGES or DOCS in target.parents:
            return f"{image}[{words}]({os.path.relpath(DOCS / PAGES.get(target, target), page.parent)}{anchor})"
        path = target.relative_to(ROOT).as_posix()
        if EXAMPLES in target.parents:
            return f"[{words}]({os.path.relpath(DOCS / path, page.parent)})"
        if repository:
            return f"[{words}]({repository.rstrip('/')}/{'tree' if target.is_dir() else 'blob'}/main/{path}{anchor})"
        return words if path in words else f"{words} (`{path}`)"

    return LINK.sub(link, text)


def write(folder: Path, repository: str | None) -> None:
    """Write all pages and what they show into an empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(DOCS, folder, ignore=shutil.ignore_patterns("*.md", "*.py", "__pycache__"))
    shutil.copytree(EXAMPLES, folder / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    for source in [*PAGES, *DOCS.rglob("*.md")]:
        page = folder / (PAGES.get(source) or source.relative_to(DOCS))
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(
            rewritten(source.read_text(encoding="utf-8"), source, repository), encoding="utf-8"
        )


if __name__ == "__main__":
    write(
        Path(sys.argv[1]),
        tomllib.loads((ROOT / "zensical.toml").read_text())["project"].get("repo_url"),
    )
