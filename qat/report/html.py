"""Markup in which no text is taken for markup: whatever is not `Html` is escaped."""

from __future__ import annotations

import html
from collections.abc import Iterable

VOID = frozenset({"meta", "link", "img", "br", "hr", "input"})


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


def element(name: str, /, *content: str, **attributes: str | int | bool | None) -> Html:
    """One element.

    Args:
        name: of the tag.
        content: markup (`Html`), or text.
        attributes: `class_` is class, `aria_label` is aria-label; True has no value, None and False are left out.
    """
    head = f"<{name}{''.join(_attribute(key, value) for key, value in attributes.items())}>"
    return Html(head) if name in VOID else Html(f"{head}{joined(content)}</{name}>")


def joined(parts: Iterable[str], between: str = "") -> Html:
    """Parts one after the other, text among them escaped."""
    return Html(between.join(part if isinstance(part, Html) else html.escape(part) for part in parts))


def _attribute(key: str, value: object) -> str:
    name = key.rstrip("_").replace("_", "-")
    if value is None or value is False:
        return ""
    return f" {name}" if value is True else f' {name}="{html.escape(str(value))}"'
