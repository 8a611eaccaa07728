"""How a run came about: commands, settings, versions."""

from __future__ import annotations

from collections.abc import Iterator

from qat.report.files import RunFiles
from qat.report.html import Html, element, joined
from qat.report.numbers import number, spoken
from qat.report.tables import table


def origin(run: RunFiles) -> Html:
    """All of it."""
    return joined([*_commands(run), *_differences(run), _versions(run), *_config(run)])


def _commands(run: RunFiles) -> Iterator[Html]:
    for title, command in (("As it was typed", run.origin.command), ("The same run again", run.origin.repeat)):
        if command:
            yield element("h3", title)
            yield element("pre", element("code", command), class_="command", tabindex="0", role="region", aria_label=title)


def _differences(run: RunFiles) -> Iterator[Html]:
    if not run.origin.compared:
        return
    yield element("h3", "Settings that are not the defaults")
    rows = [{"setting": name, "here": here, "default": default} for name, here, default in run.origin.differences]
    compared = f"Compared with {run.origin.compared}"
    yield table(compared, rows) if rows else element("p", f"None: all settings are those of {run.origin.compared}.")


def _versions(run: RunFiles) -> Html:
    results = run.results
    seconds = number(results.get("wall_seconds"))
    commit = results.get("git_commit")
    facts = {
        "directory": str(run.folder),
        "finished": results.get("finished"),
        "took": None if seconds is None else spoken(seconds),
        "device": results.get("device"),
        "seed": results.get("seed"),
        "weights": results.get("weights"),
        "git commit": commit,
        **{f"{name}": version for name, version in (results.get("versions") or {}).items()},
    }
    rows = [{"what": name, "value": _quoted(name, value)} for name, value in facts.items() if value is not None]
    return joined([element("h3", "When, where, with what"), table("The run and its versions", rows)])


def _quoted(name: str, value: object) -> str:
    return element("code", str(value)) if name in {"directory", "git commit", "weights"} else element("span", str(value))


def _config(run: RunFiles) -> Iterator[Html]:
    if run.origin.config_text:
        text = element("pre", element("code", run.origin.config_text), tabindex="0", role="region", aria_label="config.yaml")
        yield element("details", element("summary", "All settings (config.yaml)"), text)
