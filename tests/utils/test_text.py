"""Names that are printed on a terminal. Oracle: control characters, and text that UTF-8 cannot encode."""

import os
import unicodedata

import pytest

from qat.utils.files import csv_rows
from qat.utils.text import format_si, json_object, printable, read_file


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


def test_three_digits_and_a_prefix():
    values = (0.25, 999, 999.6, 1000, 190236, 999_499, 999_500, 8.22e6, 2e20)
    assert [format_si(value) for value in values] == [
        "0.25",
        "999",
        "1 k",
        "1 k",
        "190 k",
        "999 k",
        "1 M",
        "8.22 M",
        "2e+05 P",
    ]
    assert format_si(999_950, "B") == "1 MB"


@pytest.mark.parametrize("kind", ["pipe", "device", "sparse", "folder", "nothing"])
def test_only_files_that_end_are_read(tmp_path, kind):
    path = tmp_path / "x.json"
    make = {
        "pipe": lambda: os.mkfifo(path),
        "device": lambda: path.symlink_to("/dev/zero"),
        "sparse": lambda: (path.touch(), os.truncate(path, 2**40)),
        "folder": path.mkdir,
        "nothing": lambda: None,
    }
    make[kind]()
    for read in (read_file, csv_rows):
        with pytest.raises(OSError, match="No such file, or larger than 1 GiB"):
            read(path)
    assert json_object(path) == {}
