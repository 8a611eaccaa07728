"""Write docs/settings.md, `make settings-page`: every setting of `conf/` and its explanation."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import yaml

from qat.data import DataSettings
from qat.model.ptq_spec import PtqRecipe
from qat.spec import QuantRecipe
from qat.tasks.settings import COMMANDS, LossTeacher, Model, Schedule

ROOT = Path(__file__).resolve().parents[2]
CONF = ROOT / "conf"
PAGE = ROOT / "docs" / "settings.md"
GLOSSARY = ROOT / "docs" / "glossary.md"
# Classes whose annotations state the types of a group.
OWNERS: dict[str, tuple[type, ...]] = {
    "model": (Model,),
    "data": (DataSettings,),
    "quant": (QuantRecipe,),
    "ptq": (PtqRecipe, QuantRecipe),
    "scheduler": (Schedule,),
    "teacher": (LossTeacher,),
}
# In the order of the page. Other folders of `conf/` combine settings of these.
GROUPS = {
    "model": "the model",
    "data": "images",
    "quant": "quantized training",
    "loss": "losses",
    "optimizer": "the optimizer",
    "scheduler": "the learning rate",
    "trainer": "Lightning's trainer",
    "callbacks": "callbacks",
    "logger": "loggers",
    "ptq": "post-training quantization",
    "search": "Evol-Q's search",
    "analysis": "analyses",
    "format": "exported files",
}
INTRO = """# Settings

Set any of these on the command line, as in `python train.py quant.bits=3`. `--help` of a command
lists its own settings with the chosen defaults; `--cfg job` prints the settings of a command line.
A default of `${...}` is taken from other settings, `null` is found when the run starts. Groups are
chosen by name, as in `quant=seq_2bit`. The table of a group lists each setting once, from the first
file that defines it; other files of the group change only its default.

"""
_LINE = re.compile(
    r"(?P<indent> *)(?P<key>[\w.]+):(?: +(?P<value>[^#\s][^#]*?))?(?: +# (?P<note>.*))?$"
)


class Setting(NamedTuple):
    """A line of a file of settings."""

    name: str
    value: str
    meaning: str
    file: str

    @property
    def kind(self) -> str:
        """Type of the setting, or of its default value if its class does not state one."""
        group, _, name = self.name.rpartition(".")
        for owner in (*OWNERS.get(group, ()), *(COMMANDS.values() if not group else ())):
            kind = owner.__annotations__.get(name, "Any")
            if kind != "Any":
                return str(kind)
        if self.value.startswith("${"):
            return ""
        value = yaml.safe_load(self.value)
        return "" if value is None else type(value).__name__


def settings(path: Path, prefix: str) -> Iterator[Setting]:
    """Settings of a file.

    Args:
        path: the file.
        prefix: name of its group; empty for a command.
    """
    parents: list[tuple[int, str]] = [(-1, prefix)] if prefix else []
    comments_above: list[str] = []
    for line in path.read_text().splitlines():
        match = _LINE.match(line)
        if match is None:
            text = line.strip()
            comments_above = [*comments_above, text[2:]] if text.startswith("# ") else []
            continue
        note = match["note"] or " ".join(comments_above)
        comments_above = []
        passes_on_value = not note and (match["value"] or "").startswith("${")
        if match["key"].startswith(("_", "defaults", "command")) or passes_on_value:
            continue
        indent = len(match["indent"])
        while parents and parents[-1][0] >= indent:
            parents.pop()
        name = ".".join([*(parent for _, parent in parents), match["key"]])
        if match["value"] is None:
            parents.append((indent, match["key"]))
            continue
        yield Setting(name, match["value"], note, str(path.relative_to(ROOT)))


def table(rows: list[Setting]) -> str:
    """A table of settings."""
    # On a phone, only the first columns are visible without scrolling.
    lines = ["| setting | meaning | default | type | file |", "|---|---|---|---|---|"]
    for row in rows:
        cells = [f"`{row.name}`", row.meaning, f"`{row.value}`", row.kind, f"`{row.file}`"]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def with_links(text: str) -> str:
    """Link each term of the glossary where the text first uses it.

    "Code" is left out: its first use is of a program.
    """
    for heading in re.findall(r"^## (.+)", GLOSSARY.read_text(), re.MULTILINE):
        address = "glossary.md#" + re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
        if heading == "Code":
            continue
        terms = re.escape(heading).replace(r",\ ", "|")
        flags = re.IGNORECASE if heading[1:].islower() else 0
        # A term beside a dot or a backtick is part of a setting.
        text = re.sub(
            rf"(?<![\w`.])(?:{terms})s?(?![\w`.])",
            rf"[\g<0>]({address})",
            text,
            count=1,
            flags=flags,
        )
    return text


def page() -> str:
    """The whole page."""
    text = INTRO
    for command in COMMANDS:
        rows = list(settings(CONF / f"{command}.yaml", ""))
        text += f"## {command}.py\n\n{table(rows)}\n"
    for group, title in GROUPS.items():
        rows_by_name: dict[str, Setting] = {}
        for path in sorted((CONF / group).glob("*.yaml")):
            for row in settings(path, group):
                if row.name not in rows_by_name or not rows_by_name[row.name].meaning:
                    rows_by_name[row.name] = row
        text += f"## {group}: {title}\n\n{table(list(rows_by_name.values()))}\n"
    return with_links(text.rstrip()) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
