"""The page in a browser. Oracle: what the browser itself says of it."""

import pytest

from qat.report.page import write_report
from tests.report import browser
from tests.report.pages import origin, write_run

pytestmark = [pytest.mark.slow, pytest.mark.skipif(browser.found() is None, reason="no chromium here: apt-get install chromium")]

COLUMN = """[...document.querySelector('[aria-labelledby=layers] tbody').rows].map(row => row.cells[{}].textContent)"""
HEADER = "document.querySelectorAll('[aria-labelledby=layers] thead th')[{}]"
LEFT_OF_NOTHING = "[...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().left < -1).length"
CONTRAST = """(() => {
  const channel = v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const rgb = text => text.match(/[\\d.]+/g).map(Number);
  const light = c => 0.2126 * channel(c[0]) + 0.7152 * channel(c[1]) + 0.0722 * channel(c[2]);
  const ground = e => { while (e) { const c = rgb(getComputedStyle(e).backgroundColor); if (c.length < 4 || c[3]) return c;
                                    e = e.parentElement; }
                        return rgb(getComputedStyle(document.body).backgroundColor); };
  const ratios = [];
  for (const e of document.querySelectorAll('body *')) {
    if (e.closest('.unseen') || ![...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())) continue;
    const style = getComputedStyle(e), inside = e.closest('svg');
    if (inside && e.tagName !== 'text') continue;
    const a = light(rgb(inside ? style.fill : style.color)), b = light(ground(inside ? inside.parentElement : e));
    ratios.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), e.tagName + ': ' + e.textContent.slice(0, 30)]);
  }
  return ratios.filter(r => !(r[0] >= 4.5));
})()"""


@pytest.fixture(scope="module")
def tab():
    one = browser.Browser()
    yield one
    one.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return write_report(write_run(tmp_path_factory.mktemp("browser") / "run"), origin())


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [400, 1280])
def test_loads_without_complaints(tab, page, width, dark):
    tab.open(page, width=width, dark=dark)
    assert tab.complaints() == []
    assert tab.evaluate("document.documentElement.scrollWidth") == width, "the page itself does not scroll sideways"
    assert (
        tab.evaluate("[...document.images].filter(i => i.naturalWidth > 0 && i.alt && i.getBoundingClientRect().width > 100).length") == 2
    )
    sizes = tab.evaluate("[...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect()).map(r => [r.width, r.height])")
    assert len(sizes) == 4
    assert all(w > 200 and h > 100 for w, h in sizes)
    assert tab.evaluate(CONTRAST) == []


def test_complaints_are_heard(tab, tmp_path):
    (tmp_path / "bad.html").write_text("<script>console.error('x'); fetch('http://127.0.0.1:9/a').catch(() => 0); nothing()</script>")
    tab.open(tmp_path / "bad.html")
    assert len(tab.complaints()) >= 3


def test_dark_mode_is_dark(tab, page):
    shades = []
    for dark in (False, True):
        tab.open(page, dark=dark)
        shades.append(tab.evaluate("Number(getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0])"))
    assert shades[0] > 240
    assert shades[1] < 40


def test_pictures_of_analyses_are_dark_in_dark_mode(tab, page):
    shown = "getComputedStyle(document.querySelector('.card img')).filter"
    tab.open(page, dark=True)
    assert "invert" in tab.evaluate(shown)
    tab.open(page)
    assert tab.evaluate(shown) == "none"


def test_a_table_that_is_cut_off_says_so(tab, page):
    is_cut = "[...document.querySelectorAll('.scroll')].map(e => [e.scrollWidth > e.clientWidth, {}])"
    said = "getComputedStyle(e.querySelector('caption span'), '::after').content.includes('Scroll sideways')"
    for width, expected in ((400, True), (1280, False)):
        tab.open(page, width=width)
        found = tab.evaluate(is_cut.format(said))
        assert all(cut == hint for cut, hint in found)
        assert any(cut for cut, _ in found) == expected


def test_a_click_sorts(tab, page):
    tab.open(page)
    layers = ["blocks.0.mlp.fc1", "blocks.1.mlp.fc1", "head"]
    assert tab.evaluate(COLUMN.format(0)) == layers
    tab.evaluate(f"{HEADER.format(2)}.querySelector('button').click()")
    # 1.75, 3.5, 12.25: as numbers, not as text.
    assert tab.evaluate(COLUMN.format(0)) == [layers[2], layers[0], layers[1]]
    assert tab.evaluate(f"{HEADER.format(2)}.getAttribute('aria-sort')") == "ascending"
    tab.evaluate(f"{HEADER.format(2)}.querySelector('button').click()")
    assert tab.evaluate(COLUMN.format(0)) == [layers[1], layers[0], layers[2]]
    assert tab.evaluate(f"{HEADER.format(2)}.getAttribute('aria-sort')") == "descending"
    assert tab.evaluate("document.getElementById('said').textContent") == "Sorted by kurtosis, descending"


def test_the_keyboard_sorts(tab, page):
    tab.open(page)
    tab.evaluate(f"{HEADER.format(1)}.querySelector('button').focus()")
    assert tab.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    tab.press("Enter", 13)
    assert tab.evaluate(COLUMN.format(1)) == ["2", "4", "8"]
    assert tab.evaluate(f"{HEADER.format(1)}.getAttribute('aria-sort')") == "ascending"
    assert tab.evaluate(f"{HEADER.format(2)}.getAttribute('aria-sort')") == "none"


def test_the_first_stop_of_the_keyboard_skips_to_the_content(tab, page):
    tab.open(page)
    tab.press("Tab", 9)
    assert tab.evaluate("document.activeElement.className") == "skip"
    assert tab.evaluate("document.activeElement.getBoundingClientRect().left") >= 0
    tab.press("Enter", 13)
    assert tab.evaluate("location.hash") == "#main"


def test_prints(tab, page):
    tab.open(page)
    found = tab.pdf()
    assert found.startswith(b"%PDF")
    assert len(found) > 20_000
    assert tab.complaints() == []


def test_screen_readers_get_names(tab, page):
    tab.open(page)
    nodes = tab.call("Accessibility.getFullAXTree")["nodes"]
    roles = {}
    for node in nodes:
        roles.setdefault(node.get("role", {}).get("value"), []).append(node.get("name", {}).get("value", ""))
    assert {"main", "navigation", "banner", "contentinfo"} <= set(roles)
    for role in ("table", "image", "region", "button", "navigation"):
        assert all(roles[role]), role
    assert "Sorted" not in "".join(roles.get("status", []))
