"""The command line of the studies. Oracle: what runs whatever the order of options and names."""

import sys

import pytest

from studies import __main__ as command


@pytest.mark.parametrize("line", ["run C1 C2/x --workers 3", "run --workers 3 C1 C2/x", "--workers 3 run C1 C2/x"])
def test_names_and_options_in_any_order(monkeypatch, tmp_path, line):
    seen = []
    monkeypatch.setattr(command, "run_all", lambda names, root, workers, places: seen.append((names, workers)) or 0)
    monkeypatch.setattr(sys, "argv", ["studies", *line.split(), "--root", str(tmp_path)])
    assert command.main() == 0
    assert seen == [(["C1", "C2/x"], 3)]
