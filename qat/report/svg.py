"""Pictures inside the page: drawn by matplotlib, coloured by the page's style; or as files, sealed off from it."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from qat.report.html import Html, element

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Colours in which a figure is drawn, and what stands for them in the page.
INK, RULE = "#012301", "#012302"
SERIES = ("#012303", "#012304", "#012305")
STYLES = {INK: "currentColor", RULE: "var(--rule)", **{color: f"var(--series-{i})" for i, color in enumerate(SERIES, 1)}}
LARGEST = 150_000  # bytes of an SVG file that is shown as such; above it a PNG that is smaller takes its place
_HEAD = re.compile(r"^.*?(?=<svg)", re.DOTALL)
_LEFT_OUT = re.compile(r"<metadata>.*?</metadata>|<style type=\"text/css\">.*?</style>|<!--.*?-->", re.DOTALL)
_ID, _LINK = re.compile(r' id="([^"]+)"'), re.compile(r'(?:url\(#|href="#)([^)"]+)')


def inline(figure: Figure, ident: str, title: str, alt: str) -> Html:
    """A figure as an `svg` element of the page.

    Args:
        figure: drawn in `INK`, `RULE` and `SERIES`, without a background.
        ident: in front of all ids in it: those of several figures are the same.
        title: its name for those who do not see it.
        alt: what it shows.
    """
    import matplotlib as mpl

    text = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": ident}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None}, bbox_inches="tight")
    body = _own_ids(_LEFT_OUT.sub("", _HEAD.sub("", text.getvalue())), ident)
    for color, style in STYLES.items():
        body = body.replace(color, style)
    opening, _, rest = body.partition(">")
    box = re.search(r'viewBox="[^"]+"', opening)
    head = f'<svg {box[0] if box else ""} xmlns:xlink="http://www.w3.org/1999/xlink" role="img" aria-labelledby="{ident}-t {ident}-d">'
    names = element("title", title, id=f"{ident}-t") + element("desc", alt, id=f"{ident}-d")
    return Html(head + names + re.sub(r"\n\s*", "\n", rest).replace("\n\n", "\n").strip())


def picture(folder: Path, svg: str, png: str | None, alt: str) -> Html:
    """A picture file as an `img` whose data are in the page: its ids and scripts, if any, stay inside.

    Raises:
        OSError: the file cannot be read.
    """
    file = folder / Path(svg).name
    raster = folder / Path(png).name if png else None
    if raster is not None and raster.is_file() and (not file.is_file() or file.stat().st_size > max(LARGEST, raster.stat().st_size)):
        source = f"data:image/png;base64,{base64.b64encode(raster.read_bytes()).decode()}"
    else:
        text = re.sub(r">\s+<", "><", _LEFT_OUT_OF_FILES.sub("", file.read_text(encoding="utf-8")))
        source = f"data:image/svg+xml,{quote(text, safe=_SAFE)}"
    return element("img", src=source, alt=alt)


_LEFT_OUT_OF_FILES = re.compile(r"<metadata>.*?</metadata>|<!--.*?-->", re.DOTALL)
_SAFE = " /:;=,.()!*~?@$'-_"


def _own_ids(text: str, ident: str) -> str:
    """Ids that something refers to get a prefix, the others go."""
    used = set(_LINK.findall(text))
    text = _ID.sub(lambda found: f' id="{ident}-{found[1]}"' if found[1] in used else "", text)
    return _LINK.sub(lambda found: found[0].replace(f"#{found[1]}", f"#{ident}-{found[1]}"), text)
