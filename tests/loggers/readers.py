"""Read back what a logger wrote: {metric: [values in order]}, and the names of the run and of its group.

Imported inside tests only: outside of one, importing mlflow reports to its makers.
"""

import struct
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import mlflow.tracking
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto import wandb_internal_pb2

BLOCK = 32768
HEADER = struct.Struct("<IHB")
FULL, LAST = 1, 4


@dataclass(frozen=True)
class Written:
    """One run in a logger's store."""

    name: str
    group: str | None
    metrics: dict[str, list[float]]
    closed: bool = True


def tensorboard(run_dir):
    """Event files of a run directory; TensorBoard itself takes the names from the directories."""
    events = EventAccumulator(str(run_dir)).Reload()
    return Written(run_dir.name, run_dir.parent.name, {tag: [e.value for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]})


def wandb(run_dir):
    """The one offline run of a run directory."""
    (path,) = (run_dir / "wandb").glob("offline-run-*/*.wandb")
    run, metrics, closed = None, defaultdict(list), False
    for content in _records(path.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(content)
        kind = record.WhichOneof("record_type")
        closed |= kind == "exit"
        if kind == "run":
            run = record.run
        if kind == "history":
            for item in record.history.item:
                metrics["/".join(item.nested_key) or item.key].append(_number(item.value_json))
    return Written(run.display_name, run.run_group, dict(metrics), closed)


def _number(text) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def _records(data):
    """The records of a W&B file: LevelDB's log format behind seven bytes."""
    position, part = 7, b""
    while position + HEADER.size <= len(data):
        left = BLOCK - position % BLOCK
        if left < HEADER.size:
            position += left
            continue
        _, length, kind = HEADER.unpack_from(data, position)
        position += HEADER.size + length
        part += data[position - length : position]
        if kind in {FULL, LAST}:
            yield part
            part = b""


def mlflow_runs(store):
    """All runs of the store in a directory."""
    client = mlflow.tracking.MlflowClient(f"sqlite:///{store}/mlflow.db")
    for experiment in client.search_experiments():
        for run in client.search_runs([experiment.experiment_id]):
            history = {key: [m.value for m in client.get_metric_history(run.info.run_id, key)] for key in run.data.metrics}
            yield Written(run.info.run_name, experiment.name, history, run.info.status == "FINISHED")


def mlflow_run(run_dir):
    """The one run of the store in a run directory."""
    (run,) = mlflow_runs(run_dir)
    return run
