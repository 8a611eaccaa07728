"""`metrics.csv` of runs that are killed and resumed, and the loggers of the config. Oracles: the rows that were logged; `metrics.csv`."""

import contextlib
import os
import signal
import socket
from unittest.mock import Mock

import pytest
from lightning.pytorch.loggers import WandbLogger

from qat.launch.signals import Preempted
from qat.lit.loggers import CSVLog, end_wandb_runs
from qat.utils import files
from qat.utils.files import csv_rows
from tests.conftest import column, results, train
from tests.errors import usage_error
from tests.tasks.test_resume import metrics as read

ROWS = [
    {"a": 1.5, "step": 0},
    {"b": 2.0, "step": 0},
    {"a": 0.1, "b": 1e-9, "step": 4},
    {"c": 7.0, "step": 5},
]


def log(folder, rows, resume_step=0):
    one = CSVLog(folder, name="", version="")
    one.resume_step = resume_step
    for row in rows:
        one.log_metrics({key: value for key, value in row.items() if key != "step"}, row["step"])
    return one


def texts(rows):
    return [{key: str(value) for key, value in row.items()} for row in rows]


def test_rows_with_new_columns_are_there_at_once(tmp_path):
    log(tmp_path, ROWS)
    assert read(tmp_path) == texts(ROWS)
    assert (tmp_path / "metrics.csv").read_text().splitlines()[0] == "a,b,c,step"
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.csv"]


@pytest.mark.parametrize(("resume_step", "kept"), [(0, 0), (1, 2), (4, 2), (5, 3), (6, 4)])
def test_a_resumed_run_drops_the_rows_that_come_again(resume_step, kept, tmp_path):
    log(tmp_path, ROWS)
    log(tmp_path, ROWS[kept:], resume_step)
    assert read(tmp_path) == texts(ROWS)


@pytest.mark.parametrize(
    "content",
    ["step,a\n0,1\n".encode("utf-16"), b"a,b\n1,2\n", b"step,a\n3.5,2\n", b"step,a\n0,2,3\n"],
)
def test_another_table_is_refused_in_one_line(content, tmp_path):
    (tmp_path / "metrics.csv").write_bytes(content)
    with usage_error(r"metrics\.csv: must be the table that this run wrote"):
        log(tmp_path, ROWS, resume_step=6)
    assert (tmp_path / "metrics.csv").read_bytes() == content


def test_half_a_row_is_dropped(tmp_path):
    log(tmp_path, ROWS)
    path = tmp_path / "metrics.csv"
    path.write_bytes(path.read_bytes()[:-3])
    log(tmp_path, ROWS[3:], resume_step=6)
    assert read(tmp_path) == texts(ROWS)


# A new file, a row at its end, a column more.
@pytest.mark.parametrize("logged", [1, 2, 3])
def test_a_kill_while_it_is_written_anew_costs_no_row(logged, tmp_path):
    log(tmp_path, ROWS[:logged])
    if (pid := os.fork()) == 0:
        files.flush = lambda path: os.kill(os.getpid(), signal.SIGKILL)
        log(tmp_path, [], resume_step=9).experiment  # noqa: B018  (makes the writer)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert read(tmp_path) == texts(ROWS[:logged])


@pytest.mark.parametrize(("error", "code"), [(None, 0), (Preempted(15), 0), (ValueError(), 1)])
def test_an_open_run_of_wandb_is_ended(error, code):
    logger = WandbLogger.__new__(WandbLogger)
    logger._experiment = Mock()
    with contextlib.suppress(Preempted, ValueError), end_wandb_runs([logger]):
        if error is not None:
            raise error
    logger._experiment.finish.assert_called_once_with(exit_code=code)


# --- of the config


def logged(run_dir):
    """`metrics.csv` as {metric: [values in order]}."""
    names = csv_rows(run_dir / "metrics.csv")[0].keys() - {"epoch", "step"}
    return {name: column(run_dir, name) for name in names}


def of_tensorboard(run_dir):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir)).Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def of_mlflow(run_dir):
    import mlflow.tracking

    client = mlflow.tracking.MlflowClient(f"sqlite:///{run_dir}/mlflow.db")
    ((found,),) = [
        client.search_runs([experiment.experiment_id])
        for experiment in client.search_experiments()
        if experiment.name == "qat"
    ]
    assert (found.info.run_name, found.info.status) == (str(run_dir), "FINISHED")
    return {
        key: [m.value for m in client.get_metric_history(found.info.run_id, key)]
        for key in found.data.metrics
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two epochs with all loggers, started in an empty directory; nothing may connect to another machine."""
    folder, connect = tmp_path_factory.mktemp("loggers"), socket.socket.connect

    def local_only(self, address):
        assert self.family == socket.AF_UNIX or address[0] in {"127.0.0.1", "::1", "localhost"}, (
            address
        )
        return connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        for name in [n for n in os.environ if n.startswith(("WANDB", "MLFLOW_TRACKING"))]:
            patch.delenv(name)
        patch.setattr(socket.socket, "connect", local_only)
        patch.chdir(folder)
        train(
            folder / "run",
            "logger=[csv,tensorboard,wandb,mlflow]",
            "trainer.max_epochs=2",
            "trainer.log_every_n_steps=1",
        )
    assert [path.name for path in folder.iterdir()] == ["run"]
    return folder / "run"


@pytest.mark.long
@pytest.mark.parametrize("read", [of_tensorboard, of_mlflow])
def test_every_number_of_the_csv_file_is_there(read, run):
    expected, found = logged(run), read(run)
    assert {"val/top1", "val/loss", "test/top1"} <= set(expected)
    assert any(key.startswith("lr-") for key in expected)
    assert max(found["val/top1"]) == pytest.approx(results(run)["val_top1"], abs=1e-4)
    for key, values in expected.items():
        assert found[key] == pytest.approx(values, rel=1e-5), key


@pytest.mark.long
def test_wandb_writes_offline_and_ends_its_run(run):
    import wandb

    assert wandb.run is None
    (path,) = (run / "wandb").glob("offline-run-*/*.wandb")
    assert path.stat().st_size > 1000
