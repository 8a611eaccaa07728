"""Every logger gets the numbers that `metrics.csv` has, under the run's name, and writes nowhere else."""

import csv
import os
import socket
import subprocess
import sys
import threading

import pytest

from tests.conftest import ROOT, TINY, compose, results, tiny, train

READERS = ("tensorboard", "wandb", "mlflow_run")
NAMES = ("tensorboard", "wandb", "mlflow")
ALL = "logger=[csv,tensorboard,wandb,mlflow]"
# Variables by which a person's own settings, or a test runner, change what these packages do.
FOREIGN = ("WANDB", "MLFLOW", "SLURM", "HYDRA", "PYTEST", "CI", "GITHUB", "DO_NOT_TRACK")


def files(root):
    """All files below a directory."""
    return {p.relative_to(root) for p in root.rglob("*") if p.is_file()}


def logged(run_dir):
    """`metrics.csv` as {metric: [values in order]}."""
    with (run_dir / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {key: [float(row[key]) for row in rows if row[key]] for key in rows[0]}


@pytest.fixture(scope="module")
def environment():
    """Nothing of a person's own environment; what Lightning and the packages set is undone."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [n for n in os.environ if n.startswith(("WANDB", "MLFLOW"))]:
            patch.delenv(name)
        for name in ("WANDB_MODE", "MLFLOW_TRACKING_URI"):
            patch.setenv(name, "online")
            patch.delenv(name)
        yield patch


@pytest.fixture(scope="module")
def run(tmp_path_factory, environment):
    """A run of two epochs with all loggers, started in an empty directory."""
    root = tmp_path_factory.mktemp("loggers")
    (root / "cwd").mkdir()
    environment.chdir(root / "cwd")
    attempts = []
    connect = socket.socket.connect

    def local_only(self, address):
        if self.family != socket.AF_UNIX and address[0] not in {"127.0.0.1", "::1", "localhost"}:
            attempts.append(address)
            raise ConnectionRefusedError(f"a test may not connect to {address}")
        return connect(self, address)

    environment.setattr(socket.socket, "connect", local_only)
    train(root / "cwd" / "sweep" / "run", ALL, "trainer.max_epochs=2", "trainer.log_every_n_steps=1")
    assert attempts == []
    return root / "cwd" / "sweep" / "run"


@pytest.fixture
def read(run):
    """What a reader finds in the run."""
    from tests.loggers import readers

    return lambda reader: getattr(readers, reader)(run)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.long
def test_every_number_of_the_csv_file_is_there(read, run, reader):
    expected = logged(run)
    assert {"val/top1", "val/loss", "test/top1"} <= set(expected)
    assert len(expected["val/top1"]) == 2
    assert any(key.startswith("lr-") for key in expected)
    found = read(reader).metrics
    for key in expected.keys() - {"epoch", "step"}:
        assert found[key] == pytest.approx(expected[key], rel=1e-5), key


@pytest.mark.parametrize("reader", READERS)
def test_the_best_accuracy_is_the_one_in_the_results(read, run, reader):
    metrics = read(reader).metrics
    assert max(metrics["val/top1"]) == pytest.approx(results(run)["val_top1"], abs=1e-4)
    assert metrics["test/top1"] == [pytest.approx(results(run)["top1"], abs=1e-4)]


@pytest.mark.parametrize("reader", READERS)
def test_names_come_from_the_run_directory(read, reader):
    found = read(reader)
    assert (found.name, found.group) == ("run", "sweep")


@pytest.mark.parametrize("reader", ["wandb", "mlflow_run"])
def test_the_run_has_ended(read, reader):
    assert read(reader).closed


def test_everything_is_in_the_run_directory(run):
    assert {path.parts[:2] for path in files(run.parents[1])} == {("sweep", "run")}


@pytest.mark.parametrize("name", NAMES)
def test_a_logger_works_without_and_with_others(name):
    assert list(compose("train", f"logger={name}", "run_dir=a").logger) == [name]
    assert list(compose("train", f"logger=[csv,{name}]", "run_dir=a").logger) == ["csv", name]


def test_a_logger_of_its_own_trains(tmp_path):
    from tests.loggers import readers

    run = train(tmp_path / "run", "logger=tensorboard")
    assert not (run / "metrics.csv").exists()
    assert readers.tensorboard(run).metrics["val/top1"] == [pytest.approx(results(run)["val_top1"], abs=1e-4)]


def test_overwriting_a_run_replaces_its_curves(tmp_path):
    from tests.loggers import readers

    for overwrite in ("false", "true"):
        run = train(tmp_path / "run", "logger=tensorboard", f"overwrite={overwrite}")
    assert len(readers.tensorboard(run).metrics["val/top1"]) == 1


@pytest.mark.long
@pytest.mark.slow
def test_processes_that_begin_together_share_a_store(tmp_path):
    from tests.loggers import readers

    code = "import sys; from qat.lit import loggers; loggers.mlflow(sys.argv[1], store=sys.argv[2]).log_metrics({'x': 1.0}, step=0)"
    jobs = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "sweep" / str(i)), str(tmp_path / "sweep")], cwd=ROOT)
        for i in range(3)
    ]
    assert [job.wait(timeout=600) for job in jobs] == [0, 0, 0]
    runs = sorted(readers.mlflow_runs(tmp_path / "sweep"), key=lambda run: run.name)
    assert [(run.name, run.group, run.metrics) for run in runs] == [(str(i), "sweep", {"x": [1.0]}) for i in range(3)]


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_package_is_one_line_that_says_how_to_get_it(tmp_path, refused, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    line = refused("train", tiny(tmp_path / "run", f"logger={name}"))
    assert line.startswith(f"error: logger='{name}': cannot import {name}")
    assert "pip install 'vit-qat[loggers]'" in line
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.fixture
def proxy():
    """Address of a proxy that lets nothing through, and the requests that it got."""
    requests = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    requests.append(connection.recv(200))

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}", requests


@pytest.mark.long
@pytest.mark.slow
def test_a_multirun_is_a_group_and_stays_on_this_machine(tmp_path, proxy):
    from tests.loggers import readers

    address, requests = proxy
    (tmp_path / "cwd").mkdir()
    kept = {k: v for k, v in os.environ.items() if not k.upper().startswith(FOREIGN) and "PROXY" not in k.upper()}
    proxies = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), address)
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "-m", *TINY, ALL, "seed=1,2", "run_dir=sweep"],
        cwd=tmp_path / "cwd",
        env=kept | proxies | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "online", "HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert requests == []
    sweep = tmp_path / "cwd" / "sweep"
    jobs = [sweep / "0", sweep / "1"]
    scores = [pytest.approx(results(job)["val_top1"], abs=1e-4) for job in jobs]
    assert results(jobs[0])["seed"] != results(jobs[1])["seed"]
    for found in ([readers.tensorboard(j) for j in jobs], [readers.wandb(j) for j in jobs], sorted(readers.mlflow_runs(sweep), key=str)):
        assert [(run.name, run.group) for run in found] == [("0", "sweep"), ("1", "sweep")]
        assert [run.metrics["val/top1"] for run in found] == [[score] for score in scores]
    assert {path.parts[0] for path in files(tmp_path / "cwd")} == {"sweep"}
    assert {path.parts[0] for path in files(tmp_path / "home")} <= {".cache"}
