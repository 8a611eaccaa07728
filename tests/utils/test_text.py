"""Names on their way to a terminal. Oracle: what a terminal acts upon, and what UTF-8 cannot say."""

import os
import unicodedata

import pytest

from qat.utils.text import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("caf\u00e9 \u5496.png", "caf\u00e9 \u5496.png"),
        ("a\tb\nc", "a\tb\nc"),
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("a\rb\x9b2J", r"a\x0db\x9b2J"),
        (os.fsdecode(b"a\xffb"), r"a\xffb"),
        ("invoice\u202egnp.exe", r"invoice\u202egnp.exe"),
    ],
)
def test_printable(text, shown):
    assert printable(text) == shown


def test_nothing_that_a_terminal_acts_upon_is_left():
    shown = printable("".join(map(chr, range(0x3000))))
    assert {c for c in shown if unicodedata.category(c) in {"Cc", "Cs", "Zl", "Zp"}} == {"\t", "\n"}
