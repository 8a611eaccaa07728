"""Reports in a browser. Oracle: the values that the browser reports."""

import html
import json
import re
import shutil
import subprocess

import pytest

from qat.report.page import write_report
from tests.report.pages import write_run

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium"),
]
PROBE = """<script>addEventListener("load", () => {
  const table = document.querySelector("table[data-sortable]"), header = table.tHead.rows[0].cells[3];
  const column = () => [...table.tBodies[0].rows].map((row) => row.cells[3].textContent);
  const sorted = () => { header.querySelector("button").click(); return column(); };
  const found = { wide: document.documentElement.scrollWidth - innerWidth, orders: [sorted(), sorted()], aria: header.ariaSort,
    pictures: [...document.images].filter((one) => one.naturalWidth > 200).length };
  document.body.append(Object.assign(document.createElement("pre"), { id: "found", textContent: JSON.stringify(found) }));
});</script>"""


@pytest.mark.sample(1)
@pytest.mark.parametrize("width", [500, 1280])
def test_pictures_load_columns_sort_and_nothing_sticks_out(tmp_path, width):
    page = write_report(write_run(tmp_path / "run"))
    page.write_text(page.read_text().replace("</body>", f"{PROBE}</body>"))
    home = f"--user-data-dir={tmp_path}/home"
    flags = (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--window-size={width},900",
        "--dump-dom",
    )
    done = subprocess.run(
        [CHROMIUM, *flags, home, page.as_uri()],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    found = json.loads(html.unescape(re.search(r'<pre id="found">(.*?)</pre>', done.stdout)[1]))
    # As numbers, not as text.
    rising = ["1.75", "2.5", "3.5", "12.25"]
    assert found == {
        "wide": 0,
        "orders": [rising, rising[::-1]],
        "aria": "descending",
        "pictures": 7,
    }
