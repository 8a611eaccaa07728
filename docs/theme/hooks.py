"""What mkdocs does not do by itself: README.md and CHANGELOG.md as pages, links out of docs/, anchors as GitHub makes them."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pymdownx.slugs import slugify

DOCS = Path(__file__).resolve().parents[1]
ROOT = DOCS.parent
PAGES = {ROOT / "README.md": "index.md", ROOT / "CHANGELOG.md": "changes.md"}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s:]+)(#[^)\s]*)?\)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Anchors of headings as on GitHub, which the links of the pages are made for."""
    config.mdx_configs["toc"]["slugify"] = slugify(case="lower")
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """The pages that lie beside docs/."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=source.read_text()))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, **_: Any) -> str:
    """Links as they have to be on the site; what is on no page becomes a link into the repository, or its path in words."""
    source = next((path for path, name in PAGES.items() if name == page.file.src_uri), DOCS / page.file.src_uri)

    def rewritten(link: re.Match[str]) -> str:
        image, text, address, anchor = link.groups(default="")
        target = (source.parent / address).resolve()
        if not target.exists():
            return link[0]
        if target in PAGES or DOCS in target.parents:
            found = DOCS / PAGES[target] if target in PAGES else target
            return f"{image}[{text}]({os.path.relpath(found, (DOCS / page.file.src_uri).parent)}{anchor})"
        path = target.relative_to(ROOT).as_posix()
        if config.repo_url:
            return f"[{text}]({config.repo_url.rstrip('/')}/{'tree' if target.is_dir() else 'blob'}/main/{path}{anchor})"
        return text if path in text else f"{text} (`{path}`)"

    return LINK.sub(rewritten, markdown)
