"""`metrics.csv` through kills. Oracle: the rows that were logged."""

import os
import signal

import pytest

from qat.lit.csv_log import CSVLog, read_rows
from qat.utils import files

ROWS = [{"a": 1.5, "step": 0}, {"b": 2.0, "step": 0}, {"a": 0.1, "b": 1e-9, "step": 4}, {"c": 7.0, "step": 2}]


def logger(folder, *, goes_on=False):
    made = CSVLog(folder, name="", version="")
    made.goes_on = goes_on
    return made


def log(one, rows):
    for row in rows:
        one.log_metrics({key: value for key, value in row.items() if key != "step"}, row["step"])
        one.save()


def texts(rows):
    return [{key: str(value) for key, value in row.items()} for row in rows]


def test_rows_with_new_columns(tmp_path):
    log(logger(tmp_path), ROWS)
    assert read_rows(tmp_path / "metrics.csv") == texts(ROWS)
    assert (tmp_path / "metrics.csv").read_text().splitlines()[0] == "a,b,c,step"
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.csv"]


def test_half_a_row_is_none(tmp_path):
    path = tmp_path / "metrics.csv"
    log(logger(tmp_path), ROWS)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        rows = read_rows(path)
        assert rows == texts(ROWS)[: len(rows)]


# A new file, a row at its end, a column more.
@pytest.mark.parametrize("logged", [1, 2, 3])
def test_a_kill_while_it_is_written_anew_costs_no_row(logged, tmp_path):
    log(logger(tmp_path), ROWS[:logged])
    if (pid := os.fork()) == 0:
        files.flush = lambda path: os.kill(os.getpid(), signal.SIGKILL)
        logger(tmp_path, goes_on=True).experiment  # noqa: B018  (makes the writer)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert read_rows(tmp_path / "metrics.csv") == texts(ROWS[:logged])


@pytest.mark.parametrize("written", [2, 3, 4])
def test_going_back_to_where_a_checkpoint_was_written(written, tmp_path):
    first = logger(tmp_path)
    log(first, ROWS[:2])
    assert first.mark() == 2
    log(first, ROWS[2:written])
    again = logger(tmp_path, goes_on=True)
    again.go_back(2, ROWS[2])
    assert again.mark() == 3
    log(again, ROWS[3:])
    assert read_rows(tmp_path / "metrics.csv") == texts(ROWS)


def test_a_fresh_run_has_no_old_rows(tmp_path):
    log(logger(tmp_path), ROWS)
    log(logger(tmp_path), ROWS[:1])
    assert read_rows(tmp_path / "metrics.csv") == texts(ROWS[:1])
