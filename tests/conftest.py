"""Configs, small runs that several tests share, and data files in the formats that commands read."""

import collections
import copy
import csv
import functools
import gc
import io
import json
import os
import signal
from pathlib import Path

import hydra
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from PIL import Image

# The models of the tests are too small for several threads, which would wait for each other.
torch.set_num_threads(int(os.environ.get("QAT_TEST_THREADS", "1")))
# The processes of `make test &` ignore Ctrl-C by default, but some tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[1]
# One block of width 24 and two steps: a run takes a third of a second.
TINY = (
    "++model.args.embed_dim=24",
    "++model.args.depth=1",
    "++model.args.num_heads=3",
    "trainer.limit_train_batches=2",
    "trainer.max_epochs=1",
)


def compose(config, *overrides):
    """The config of a command as a task gets it.

    A report, which takes longer than a tiny run, is written only with `report=true`.
    """
    from qat.tasks import conf  # noqa: F401  (registers schemas and functions of conf/)

    quiet = ["report=false"] if config in {"train", "eval", "ptq", "analyze"} else []
    overrides = [*quiet, *(str(o) for o in overrides)]
    files = [typed for typed in overrides if names_a_file(typed)]
    values = [typed for typed in overrides if typed not in files]
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        try:
            cfg = copy.deepcopy(composed(config, *files))
            parsed = OverridesParser.create().parse_overrides(values)
            ConfigLoaderImpl._apply_overrides_to_config(parsed, cfg)
        except HydraException:
            return hydra.compose(config, overrides=overrides)  # raises the error of the command
    return cfg


def names_a_file(override):
    """True if an override chooses a file of conf/ (`quant=ofq_2bit`) or is a setting of Hydra."""
    key = override.partition("=")[0].lstrip("+~").partition("@")[0]
    return key.startswith("hydra") or (ROOT / "conf" / key).is_dir()


@functools.cache
def composed(config, *files):
    """A config from files only, cached because reading them takes a quarter of a second."""
    return hydra.compose(config, overrides=list(files))


def tiny(run_dir, *overrides):
    """Config of a tiny training run."""
    return compose("train", *TINY, f"run_dir={run_dir}", *overrides)


def train(run_dir, *overrides):
    """Train a tiny model, and return `run_dir`."""
    from qat.tasks.train import train as task

    task(tiny(run_dir, *overrides))
    return run_dir


def evaluate(run_dir, *overrides):
    """Run the task of `eval.py`, and return its results."""
    from qat.tasks.evaluate import evaluate as task

    task(compose("eval", f"run_dir={run_dir}", *overrides))
    return results(run_dir)


def results(run_dir):
    """`results.json` of a run."""
    return json.loads((run_dir / "results.json").read_text())


def column(run_dir, name):
    """Values of a metric in `metrics.csv`, in order."""
    with (run_dir / "metrics.csv").open(newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def contents(folder):
    """Bytes of all files below a folder, by path."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="session")
def float_run(tmp_path_factory):
    """A finished float run."""
    return train(tmp_path_factory.mktemp("float") / "run", "quant=fp")


@pytest.fixture(scope="session")
def run_4bit(tmp_path_factory, float_run):
    """A finished 4-bit run that started from the float one."""
    return train(
        tmp_path_factory.mktemp("four") / "run",
        "quant=ofq_4bit",
        f"ckpt={float_run}/checkpoints/last.ckpt",
    )


@pytest.fixture(scope="session")
def full(tmp_path_factory):
    """The uninterrupted run of the tests that interrupt it."""
    from tests.tasks.test_resume import run

    return run(tmp_path_factory.mktemp("full") / "run")


@pytest.fixture
def refused(caplog):
    """A function that runs a command, expects a known mistake, and returns the printed line."""
    from qat.cli import job

    def line(cfg):
        caplog.clear()
        with pytest.raises(SystemExit) as stop:
            job.run_task(cfg)
        assert stop.value.code == 1
        (record,) = [r for r in caplog.records if r.levelname == "ERROR"]
        assert record.exc_info is None
        assert "\n" not in record.getMessage()
        return record.getMessage()

    return line


def encoded(pixels, fmt="PNG"):
    """An (H, W) or (H, W, 3) uint8 array as the bytes of an image file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, fmt)
    return buffer.getvalue()


def write_parquet(path, contents, labels, column="img", label_column="label"):
    """Write images and labels as the `datasets` library of Hugging Face does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    cells = pa.array(
        [None if c is None else {"bytes": c, "path": None} for c in contents], type=struct
    )
    pq.write_table(pa.table({column: cells, label_column: pa.array(labels, type=pa.int64())}), path)


def write_cifar(root, train=40, test=10, seed=0):
    """Write random images of four classes in the layout of CIFAR-10; return the folder."""
    rng = np.random.default_rng(seed)
    for split, n in (("train", train), ("test", test)):
        pixels = rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
        write_parquet(
            root / f"{split}.parquet", [encoded(p) for p in pixels], [i % 4 for i in range(n)]
        )
    return root


def pytest_collection_finish():
    """Exclude libraries and tests from garbage collection, which takes a twelfth of the time."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark all but n cases of a test with `sample(n)` as long, and put the longest tests first.

    If a long test came last, one process would run it while the others have finished.
    """
    cases = collections.defaultdict(list)
    for item in items:
        if item.get_closest_marker("sample") and not item.get_closest_marker("long"):
            cases[item.nodeid.partition("[")[0]].append(item)
    for items_of_test in cases.values():
        sample_size = items_of_test[0].get_closest_marker("sample").args[0]
        chosen = {i * len(items_of_test) // sample_size for i in range(sample_size)}
        for i, item in enumerate(items_of_test):
            if i not in chosen:
                item.add_marker(pytest.mark.long)
    items.sort(key=lambda item: "[README.md]" not in item.name)
