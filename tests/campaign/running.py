"""Run a command until its first step would come, and say how it ended."""

import contextlib
import dataclasses
import functools
import logging
import signal
import time
from unittest import mock

import sklearn.datasets

from qat.analysis import ImageSet
from qat.cli import entry, results
from qat.launch import ranks
from qat.lit import QATModule
from qat.tasks import analyze, export, predict

LIMIT_S = 20


class ReachedAStep(BaseException):
    """Everything is built, and the first step would come now."""


def stop(*args, **kwargs):
    raise ReachedAStep


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a command ended.

    Attributes:
        kind: `refused` (one line, exit code 1), `reached` (a step, which is not taken) or `traceback`.
        message: the line; of a traceback, the exception.
        seconds: it took.
    """

    kind: str
    message: str
    seconds: float


class HangError(BaseException):
    """It takes longer than any of these commands may."""


def _hang(*args):
    raise HangError


class _Lines(logging.Handler):
    def __init__(self):
        super().__init__(logging.ERROR)
        self.records = []

    def emit(self, record):
        self.records.append(record)


@contextlib.contextmanager
def no_steps():
    """Stop every command in front of the first thing that it would compute with images, and leave out what takes time before that."""
    with contextlib.ExitStack() as patches:
        for owner, name, replacement in (
            (QATModule, "training_step", stop),
            (QATModule, "test_step", stop),
            (predict._Ranking, "predict_step", stop),
            (ImageSet, "score", stop),
            (analyze, "write_outcome", stop),
            (export, "kept", stop),
            (ranks, "supervise", stop),
            (results, "_git_commit", lambda: None),
            (sklearn.datasets, "load_digits", functools.cache(sklearn.datasets.load_digits)),
        ):
            patches.enter_context(mock.patch.object(owner, name, replacement))
        yield


def attempt(task, cfg):
    """The outcome of a command with this config."""
    log, lines = logging.getLogger("qat.cli.entry"), _Lines()
    level, disabled = log.level, logging.root.manager.disable
    log.addHandler(lines)
    log.setLevel(logging.ERROR)
    logging.disable(logging.NOTSET)
    began = time.monotonic()
    signal.signal(signal.SIGALRM, _hang)
    signal.alarm(LIMIT_S)
    try:
        entry.run(task, cfg)
        kind, message = "reached", "the end"
    except ReachedAStep:
        kind, message = "reached", "a step"
    except SystemExit as end:
        message = " | ".join(record.getMessage() for record in lines.records)
        is_one_line = end.code == 1 and len(lines.records) == 1 and "\n" not in message and lines.records[0].exc_info is None
        kind = "refused" if is_one_line else f"exit {end.code}"
    except Exception as error:
        kind, message = "traceback", f"{type(error).__name__}: {' '.join(str(error).split())}"
    except HangError:
        kind, message = "hang", f"more than {LIMIT_S} s"
    finally:
        signal.alarm(0)
        log.removeHandler(lines)
        log.setLevel(level)
        logging.disable(disabled)
    return Outcome(kind, message, time.monotonic() - began)


def names(message, setting):
    """True if a line says which setting it is about: by its full name, or by its own name and that of what it belongs to."""
    parent, _, key = setting.rpartition(".")
    top = setting.partition(".")[0]
    return setting in message or (key in message and (not parent or parent in message or top in message))
