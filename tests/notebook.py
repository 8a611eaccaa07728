"""examples/quickstart.ipynb as Jupyter runs it. `python -m tests.notebook` runs it whole and keeps what it shows."""

import os
import re
import tempfile
from pathlib import Path
from unittest import mock

import nbformat
from nbclient import NotebookClient

from tests.conftest import ROOT

NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


def executed(folder, parameters=""):
    """The notebook with its outputs, run in `folder`/examples; the files beside it and `zoo` are there as in a clone.

    Args:
        folder: an empty one.
        parameters: code that runs behind the cell tagged `parameters`.
    """
    book = nbformat.read(NOTEBOOK, as_version=4)
    place = folder / "examples"
    place.mkdir()
    (folder / "zoo").symlink_to(ROOT / "zoo")
    for script in NOTEBOOK.parent.glob("*.py"):
        (place / script.name).symlink_to(script)
    (settings,) = [cell for cell in book.cells if "parameters" in cell.metadata.get("tags", [])]
    settings.source = f"{settings.source}\n{parameters}".rstrip()
    environment = {"PYTHONPATH": str(ROOT), "IPYTHONDIR": str(folder / "ipython")}
    where = {"metadata": {"path": str(place)}}
    with mock.patch.dict(os.environ, environment):
        NotebookClient(
            book,
            timeout=600,
            kernel_name="python3",
            record_timing=False,
            coalesce_streams=True,
            resources=where,
        ).execute()
    return book


def tidied(book, place):
    """Without warnings, paths of this machine and codes of a terminal."""
    for cell in [cell for cell in book.cells if cell.cell_type == "code"]:
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        for output in cell.outputs:
            if output.output_type == "stream":
                output.text = re.sub(r"\x1b\[[\d;]*m", "", output.text).replace(f"{place}/", "")
    return book


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        nbformat.write(
            tidied(executed(Path(folder)), Path(folder).resolve() / "examples"), NOTEBOOK
        )
