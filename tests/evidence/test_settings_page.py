"""docs/settings.md. Oracle: the files of `conf/` as OmegaConf reads them."""

from omegaconf import OmegaConf

from evidence.pages import settings_page
from evidence.pages.settings_page import CONF, GROUPS
from tests.conftest import ROOT


def test_the_page_is_what_the_files_say():
    assert (ROOT / "docs/settings.md").read_text() == settings_page.page(), "make settings-page"


def keys(node, prefix=""):
    """Dotted names of all values that are no mappings with entries."""
    if not isinstance(node, dict) or not node:
        return {prefix.removesuffix(".")}
    return {key for name, value in node.items() for key in keys(value, f"{prefix}{name}.")}


def test_the_settings_are_those_of_the_files():
    for group in GROUPS:
        for path in (CONF / group).glob("*.yaml"):
            content = OmegaConf.to_container(OmegaConf.load(path))
            rows = list(settings_page.settings(path, group))
            assert {row.name for row in rows} <= keys({group: content})
            assert all(row.meaning for row in rows if path.stem == "_base")
