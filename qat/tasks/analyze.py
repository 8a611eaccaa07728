"""`analyze.py`: what one net or several are like: evaluations of changed nets, tables, pictures."""

from __future__ import annotations

import copy
import dataclasses
import logging
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from qat.analysis import Analysis, EvaluationPoint, ImageSet, Ledger, Outcome, Row, StudiedNet, measure, write_outcome
from qat.cli.repeat import CONF
from qat.cli.results import recipe_fields, record_run, write_results
from qat.cli.schemas import SPLITS
from qat.cli.sweep import gather_sweep
from qat.errors import UsageError
from qat.launch import outputs
from qat.launch.signals import Preempted
from qat.ptq.state import fingerprint
from qat.tasks import build, fit, summary
from qat.tasks.checks import check_settings
from qat.tasks.evaluate import build_subject, origin
from qat.tasks.predict import EvaluatedNet
from qat.tasks.report import remake, report_run
from qat.utils.validate import check_choice

log = logging.getLogger(__name__)
INTERRUPTED = 130  # what a shell says of a command ended by Ctrl-C


@dataclasses.dataclass(frozen=True)
class AnalysisRun:
    """Everything that an analysis works on, built and checked.

    Attributes:
        subjects: nets with their data; the images are those of the first.
        nets: the same nets, labelled.
        images: None for an analysis that evaluates nothing.
    """

    analysis: Analysis
    subjects: list[EvaluatedNet]
    nets: list[StudiedNet]
    images: ImageSet | None


def analyze(cfg: DictConfig) -> None:
    """Analyse one net or several, make the report of a run anew (`run=DIR`), or gather a sweep (`sweep=DIR`).

    Args:
        cfg: composed from `conf/analyze.yaml`; `cfg.run_dir` is the job's directory.

    Raises:
        UsageError: a setting, path or file cannot work.
    """
    check_settings(cfg)
    if cfg.sweep is not None:
        gather_sweep(cfg)
        return
    if cfg.run is not None:
        remake(cfg)
        return
    began = time.monotonic()
    run_dir = Path(cfg.run_dir)
    outputs.check_own(run_dir, cfg.command)
    study = _build(cfg)
    _announce(cfg, study)
    coming = _rows(cfg, study)
    outcome = study.analysis.outcome(study.nets, []) if coming is None else None
    record_run(cfg)  # nothing refuses from here on: the files of an older run are as they were until now
    rows, complete = _collect(coming or (), run_dir)
    outcome = outcome or study.analysis.outcome(study.nets, rows)
    write_outcome(run_dir, study.analysis.name, build.plain(cfg.analysis), outcome, complete=complete)
    _write(cfg, study, outcome, complete=complete, seconds=time.monotonic() - began)
    log.info("%s: %d figures, %d tables in %s", study.analysis.name, len(outcome.drawings), len(outcome.tables), run_dir)
    report_run(cfg)
    if not complete:
        raise SystemExit(INTERRUPTED)


def _collect(coming: Iterable[Row], run_dir: Path) -> tuple[list[Row], bool]:
    """The rows that were evaluated, and whether they are all: Ctrl-C ends an analysis with those that it has."""
    rows: list[Row] = []
    try:
        for row in coming:
            rows.append(row)
    except Preempted as stop:
        if stop.signal != signal.SIGINT:
            raise
        log.warning("interrupted after %d evaluations; the same command with run_dir=%s goes on from there", len(rows), run_dir)
        return rows, False
    return rows, True


def build_analysis(cfg: DictConfig) -> Analysis:
    """The analysis of `cfg.analysis`.

    Raises:
        UsageError: it has a key that is no setting, or a value that cannot work.
    """
    settings = build.plain(cfg.get("analysis"))
    if settings is None:
        choices = ", ".join(sorted(path.stem for path in (CONF / "analysis").glob("[!_]*.yaml")))
        raise UsageError(
            f"analysis is not set: must be one of {choices}; or run=DIR to make the report of a run anew; sweep=DIR to gather one"
        )
    target = settings.pop("_target_", None) if isinstance(settings, dict) else None
    kind = _analysis_class(target)
    # `points` of a landscape is also what every analysis calls its evaluations.
    names = {field.metadata.get("setting", field.name): field.name for field in dataclasses.fields(kind)}
    for key in settings:
        if key not in names:
            raise UsageError(f"analysis.{key}: must be {'one of ' + ', '.join(names) if names else f'absent, {kind.name} has no settings'}")
    made: Analysis = kind(**{names[key]: value for key, value in settings.items()})
    return made


def _analysis_class(target: object) -> Any:
    kind = build.located(target)
    if not (isinstance(kind, type) and issubclass(kind, Analysis) and dataclasses.is_dataclass(kind)):
        raise UsageError(f"analysis._target_={target!r}: must be a subclass of qat.analysis.Analysis")
    return kind


def _build(cfg: DictConfig) -> AnalysisRun:
    paths = [cfg.ckpt] if cfg.ckpt is None or isinstance(cfg.ckpt, str) else list(cfg.ckpt)
    single = [_with_ckpt(cfg, path) for path in paths or [None]]
    if cfg.resume not in {False, "auto"}:
        raise UsageError(f"resume={cfg.resume!r}: must be one of false, auto")
    analysis = build_analysis(cfg)
    build.import_modules(cfg)
    subjects = [build_subject(one) for one in single]
    _check_alike(subjects, [origin(one) for one in single])
    labels = _labels(cfg, [origin(one) for one in single])
    nets = [
        StudiedNet(label, s.net.eval(), s.name, s.data.input_size, None if path is None else Path(path))
        for label, s, path in zip(labels, subjects, paths or [None], strict=True)
    ]
    trainer = fit.build_trainer(cfg, [], [])
    if trainer.world_size > 1:
        raise UsageError(f"trainer.devices={cfg.trainer.devices!r}: analyses run on one device; must be 1")
    if trainer.precision != "32-true":
        raise UsageError(f"trainer.precision={cfg.trainer.precision!r}: analyses run in float32; must be 32-true")
    for studied in nets:
        studied.net.to(trainer.strategy.root_device)
    cfg.data = single[0].data  # the config that was settled: it is what is recorded
    images = None
    if analysis.split is not None:
        images = _images(cfg, subjects[0], analysis, trainer.strategy.root_device)
    return AnalysisRun(analysis, subjects, nets, images)


def _with_ckpt(cfg: DictConfig, path: str | None) -> DictConfig:
    one = copy.deepcopy(cfg)
    one.ckpt = path
    return one


def _images(cfg: DictConfig, subject: EvaluatedNet, analysis: Analysis, device: Any) -> ImageSet:
    data = subject.data
    split: str = cfg.split if cfg.split is not None else (data.evaluation_split if analysis.split == "test" else str(analysis.split))
    check_choice("split", split, SPLITS)
    settings = data.settings
    batches = [(images.to(device), target.to(device)) for images, target in data.sample(split, cfg.images)]
    return ImageSet(batches, split, tuple(settings.mean), tuple(settings.std))


def _check_alike(subjects: Sequence[EvaluatedNet], paths: Sequence[str]) -> None:
    """Nets that are compared see the same images."""
    first = subjects[0].data
    for subject, path in zip(subjects[1:], paths[1:], strict=True):
        theirs, ours = (type(data).__name__ for data in (subject.data, first))
        if theirs != ours:
            raise UsageError(f"ckpt={path!r}: its data are {theirs}, those of {paths[0]!r} {ours}; data=... gives both the same images")
        for name in ("in_chans", "image_size", "num_classes", "mean", "std"):
            one, other = getattr(first.settings, name), getattr(subject.data.settings, name)
            if one != other:
                raise UsageError(
                    f"ckpt={path!r}: its data have {name} {other}, those of {paths[0]!r} {one}; compared nets see the same images"
                )


def _labels(cfg: DictConfig, paths: Sequence[str]) -> list[str]:
    """Those given, else the shortest ends of the paths that differ."""
    if cfg.labels is not None:
        if not OmegaConf.is_list(cfg.labels):
            raise UsageError(f"labels={cfg.labels!r}: must be a list, as many as there are checkpoints ({len(paths)}), all different")
        labels = [str(label) for label in cfg.labels]
        if len(labels) != len(paths) or len(set(labels)) < len(labels):
            raise UsageError(f"labels={labels}: must be as many as there are checkpoints ({len(paths)}), all different")
        return labels
    if len(paths) == 1:
        return [Path(paths[0]).stem]
    parts = [Path(path).with_suffix("").parts for path in paths]
    for start in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(part for part in one[-start:] if part != "checkpoints") for one in parts]
        if len(set(labels)) == len(labels):
            return labels
    if len(set(paths)) == len(paths):  # they differ in their endings
        return list(paths)
    raise UsageError(f"ckpt={list(paths)}: the same file twice; must be different files")


def _rows(cfg: DictConfig, study: AnalysisRun) -> Iterator[Row] | None:
    """Rows of the evaluations; None where there is nothing to evaluate."""
    if study.images is None or not (points := study.analysis.points(study.nets, study.images)):
        return None
    tensors = [t for net in study.nets for t in net.net.state_dict().values()]
    tensors += [t for batch in study.images.batches for t in batch]
    # Weights at other bits may be the same tensors: scales that are read off the weights are not stored.
    kinds = [(net.label, net.model, subject.recipe) for net, subject in zip(study.nets, study.subjects, strict=True)]
    inputs = f"{study.analysis!r} {kinds} {fingerprint(tensors)}"
    ledger = Ledger(Path(cfg.run_dir), inputs, resume=cfg.resume == "auto")
    return _measured(study.analysis, study.nets, study.images, points, ledger)


def _measured(
    analysis: Analysis, nets: Sequence[StudiedNet], images: ImageSet, points: Sequence[EvaluationPoint], ledger: Ledger
) -> Iterator[Row]:
    rows = []
    for row in measure(points, images, ledger):
        rows.append(row)
        yield row
    yield from measure(analysis.follow_up(nets, images, rows), images, ledger)


def _announce(cfg: DictConfig, study: AnalysisRun) -> None:
    entries = {"analysis": study.analysis.name}
    for subject, net in zip(study.subjects, study.nets, strict=True):
        entries[net.label] = (
            f"{summary.describe_model(subject.name, subject.net, subject.data.input_size)}; {summary.describe_recipe(subject.recipe)}"
        )
    data = study.subjects[0].data
    if study.images is not None:
        where = summary.describe_data(type(data).__name__.lower(), data)
        entries["images"] = f"{study.images.n_images} of the {study.images.split} split; {where}"
    entries["outputs"] = str(cfg.run_dir)
    log.info(summary.lines("qat: analysis", entries))


def _write(cfg: DictConfig, study: AnalysisRun, outcome: Outcome, *, complete: bool, seconds: float) -> None:
    subject = study.subjects[0]
    weights = [str(net.path) for net in study.nets if net.path is not None]
    write_results(
        cfg,
        model=subject.name,
        **recipe_fields(subject.recipe),
        weights=weights[0] if len(weights) == 1 else weights or None,
        split=None if study.images is None else study.images.split,
        analysis=study.analysis.name,
        complete=complete,
        summary=outcome.summary,
        wall_seconds=round(seconds, 1),
    )
