"""Studies of optuna that go on: what an earlier sweep left in its directory is told to the study as trials.

The folders of the jobs are the storage: they are there anyway, on any file system, and say what was tried and what came of it. A trial
that was killed is tried again in its own folder, where `resume` goes on from its last checkpoint. Without that, the numbers of the jobs
would begin at 0 again, a seeded sampler would draw the same values again, and new values would go on from the weights of others.
"""

from __future__ import annotations

import json
import logging
import math
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from qat.report.sweep import IGNORED, overrides_of, pairs
from qat.tasks.sweep import read_record

if TYPE_CHECKING:
    from optuna.storages import InMemoryStorage

log = logging.getLogger("hydra.qat")
NAME = "sweep"
DIRECTORY = IGNORED - {"seed"}


@dataclass(frozen=True)
class Trial:
    """An earlier trial.

    Attributes:
        params: values of the search space.
        value: what the job returned, None if it failed.
        ended: False for one that was killed.
    """

    folder: int
    params: dict[str, Any]
    value: float | None
    ended: bool


def prepare(config: DictConfig, folder: Path) -> None:
    """Make a study in memory, of which earlier trials of the same sweep are part if `resume` is set.

    Args:
        config: of the sweep, before Hydra has built the sweeper from it; changed in place.
        folder: of the sweep.
    """
    _quiet()
    sweeper = config.hydra.sweeper
    if sweeper.storage is not None:  # somebody takes care of it
        return
    goes_on = bool(config.get("resume"))
    space = [f"{name}={value}" for name, value in (sweeper.params or {}).items()] + list(config.hydra.overrides.task)
    trials = earlier_trials(folder, space) if goes_on else []
    directions = sweeper.direction if OmegaConf.is_list(sweeper.direction) else [sweeper.direction]
    with read_write(config), open_dict(config):
        sweeper.study_name = sweeper.study_name or NAME
        sweeper.storage = {
            "_target_": "qat.tasks.study.storage",
            "name": sweeper.study_name,
            "directions": [getattr(one, "name", str(one)) for one in directions],
            "space": space,
            "trials": json.dumps([asdict(trial) for trial in trials]),
        }
        if goes_on and _numbered(folder):
            _go_on(config, folder, trials)


def _go_on(config: DictConfig, folder: Path, trials: list[Trial]) -> None:
    """Leave out what is done: fewer trials, other random numbers, folders behind those that are there."""
    sweeper = config.hydra.sweeper
    ended = sum(trial.ended for trial in trials)
    killed = [trial.folder for trial in trials if not trial.ended]
    log.info("%s: going on behind %d trials, %d of them to be tried again", folder, len(trials), len(killed))
    sweeper.n_trials = max(0, sweeper.n_trials - ended)
    if sweeper.sampler.get("seed") is not None:
        sweeper.sampler.seed += ended
    places = ",".join(str(number) for number in [*killed, int(_numbered(folder)[-1].name) + 1])
    config.hydra.overrides.hydra.append(f"hydra.sweep.subdir='${{job_folder:${{hydra.job.num}},{places}}}'")


def _numbered(folder: Path) -> list[Path]:
    """Directories of jobs, by their numbers."""
    return sorted((path for path in folder.iterdir() if path.name.isdigit()), key=lambda path: int(path.name))


def job_folder(number: int, *folders: int) -> int:
    """Folder of the job with this number: the first ones are given, the others follow behind the last of them."""
    return folders[number] if number < len(folders) else folders[-1] + number - len(folders) + 1


OmegaConf.register_new_resolver("job_folder", job_folder, replace=True)


def earlier_trials(folder: Path, space: list[str]) -> list[Trial]:
    """What the jobs below a directory tried and what came of it, by their numbers.

    Args:
        folder: of the sweep.
        space: the search space and all other settings of the sweep, as they are typed; jobs with others do not count.
    """
    distributions, fixed = _parsed(space)
    found = []
    for path in _numbered(folder):
        given = overrides_of(path)
        params = {name: _value(given[name], distribution) for name, distribution in distributions.items() if name in given}
        others = {name: text for name, text in given.items() if name not in {*params, *DIRECTORY}}
        if params.keys() != distributions.keys() or others != fixed or None in params.values():
            log.warning("%s is of another study, or none: it does not count", path)
            continue
        record = read_record(path)
        value = record.get("value")
        known = value is not None and math.isfinite(value)
        found.append(Trial(int(path.name), params, value if known else None, "error" in record))
    return found


def storage(name: str, directions: list[str], space: list[str], trials: str) -> InMemoryStorage:
    """A study in memory with earlier trials in it.

    Args:
        name: of the study.
        directions: maximize, minimize.
        space: the search space and all other settings, as they are typed.
        trials: a list of `Trial` as JSON; those that have not ended are tried again first.
    """
    import optuna
    from hydra.errors import CompactHydraException
    from optuna.trial import TrialState, create_trial

    class Storage(optuna.storages.InMemoryStorage):
        """One that says in one line that no trial came to an end."""

        def __repr__(self) -> str:
            return "the folders of the jobs"

        def get_best_trial(self, study_id: int) -> Any:
            """As everywhere; optuna's own error would end the sweep with a traceback."""
            try:
                return super().get_best_trial(study_id)
            except ValueError as error:
                raise CompactHydraException("error: no trial of the study came to an end") from error

    made = Storage()
    distributions, _ = _parsed(list(space))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study = optuna.create_study(study_name=name, storage=made, directions=list(directions))
        earlier = [Trial(**one) for one in json.loads(trials)]
        for trial in (one for one in earlier if one.ended):
            state = TrialState.FAIL if trial.value is None else TrialState.COMPLETE
            study.add_trial(create_trial(state=state, value=trial.value, params=trial.params, distributions=distributions))
        for trial in (one for one in earlier if not one.ended):
            study.enqueue_trial(trial.params)
    return made


def _parsed(space: list[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Distributions of what is searched, and the text of what is not."""
    from hydra_plugins.hydra_optuna_sweeper._impl import create_params_from_overrides

    distributions, fixed = create_params_from_overrides(space)
    settled = pairs([f"{name}={value}" for name, value in fixed.items()])
    return (
        {name.lstrip("+~"): one for name, one in distributions.items()},
        {name: text for name, text in settled.items() if name not in DIRECTORY},
    )


def _value(text: str, distribution: Any) -> Any:
    """What a setting's text stands for in the search space; None if it is not in it."""
    choices = getattr(distribution, "choices", None)
    if choices is not None:
        return next((choice for choice in choices if str(choice) == text), None)
    kind = float if isinstance(distribution.low, float) else int
    try:
        value = kind(text)
    except ValueError:
        return None
    return value if distribution.low <= value <= distribution.high else None


def _quiet() -> None:
    """Leave out what says nothing about the sweep: parts of a database that is not used, and that a failed job returned no number."""
    logging.getLogger("alembic").setLevel(logging.WARNING)
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sweeper = logging.getLogger("hydra_plugins.hydra_optuna_sweeper._impl")
    sweeper.addFilter(lambda record: not str(record.msg).startswith("Failed experiment: Return value must be float-castable"))
