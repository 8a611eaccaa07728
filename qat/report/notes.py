"""What a person should know before anything else of a run, each with what to do about it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from qat.report.files import RunFiles
from qat.report.html import Html, element, joined
from qat.report.numbers import number, percent

LABELS = {"error": "Error", "warning": "Warning", "note": "Note"}
MOST_PLACES = 8
GAP = 5.0  # points of accuracy below the float net that are worth a word
FALL = 3.0  # points from the best validation to the last one
OWN = "this run"  # label of a run's own net
OSCILLATING = 0.1  # share of a layer's weights


@dataclass(frozen=True)
class Note:
    """Where, what, and what to do.

    Attributes:
        level: a key of `LABELS`.
        where: empty for the run as a whole.
    """

    level: str
    where: str
    what: str
    advice: str


def notes_of(run: RunFiles) -> list[Note]:
    """All of a run: errors first, then what its own files say, then what analyses warn of."""
    found = [note for check in _CHECKS for note in check(run)]
    return sorted(found, key=lambda note: list(LABELS).index(note.level))


def notes_section(notes: list[Note]) -> Html:
    """A list; notes with the same advice are one entry."""
    groups: dict[tuple[str, str], list[Note]] = {}
    for note in notes:
        groups.setdefault((note.level, note.advice), []).append(note)
    return element("ul", *(_entry(level, advice, group) for (level, advice), group in groups.items()), class_="notes")


def _entry(level: str, advice: str, group: list[Note]) -> Html:
    tag = element("span", LABELS[level], class_="tag")
    said = [element("li", *([element("code", one.where), ": "] if one.where else []), one.what) for one in group]
    rest = element("details", element("summary", f"{len(said) - MOST_PLACES} more"), element("ul", *said[MOST_PLACES:]))
    what = (
        element("p", *([element("code", group[0].where), ": "] if group[0].where else []), group[0].what)
        if len(group) == 1
        else joined([element("ul", *said[:MOST_PLACES]), *([rest] if len(said) > MOST_PLACES else [])])
    )
    return element("li", tag, element("div", what, element("p", advice, class_="advice")), class_=f"entry {level}")


def _failure(run: RunFiles) -> Iterator[Note]:
    error = run.results.get("error")
    if error:
        not_finite = any(word in str(error) for word in ("not finite", "NaN", "infinity"))
        advice = (
            "Checkpoints that are there are from before: resume=true and a lower optimizer.lr go on from the last one."
            if not_finite
            else "What is shown below is what the run had written by then."
        )
        yield Note("error", "", f"The run failed: {error}", advice)
    elif not run.results:
        yield Note(
            "warning",
            "",
            "There is no results.json: the run is still going, or was stopped.",
            "The same command with resume=auto goes on where it was; python analyze.py run=DIR makes this page anew.",
        )
    if run.unread:
        yield Note("warning", "", f"Cannot be read: {', '.join(run.unread)}.", "What they hold is missing on this page.")


def _incomplete(run: RunFiles) -> Iterator[Note]:
    for study in run.studies:
        if study.index.get("complete") is False:
            what = "The analysis was interrupted; its tables and plots are of the evaluations that were done."
            yield Note("warning", study.name, what, "The same command with the same run_dir goes on.")


def _accuracy(run: RunFiles) -> Iterator[Note]:
    top1, top1_fp = number(run.results.get("top1")), number(run.results.get("top1_fp"))
    classes = number((run.origin.config.get("data") or {}).get("num_classes"))
    if top1 is None:
        return
    if classes and top1 < 150 / classes:
        chance = f"{percent(top1)} % top-1 is what guessing among {classes:.0f} classes gives ({percent(100 / classes)} %)."
        advice = "Check labels and normalisation with eval.py on the float net; start from its weights with ckpt=; use more bits."
        yield Note("warning", "", chance, advice)
    elif top1_fp is not None and top1_fp - top1 > GAP:
        what = f"{top1_fp - top1:.1f} points of top-1 are lost to quantization."
        longer = "Train longer, distil from the float net (loss=kd), or give the most sensitive layers more bits (quant.overrides)."
        yield Note("warning", "", what, "Train with quantizers (train.py ckpt=...), or use more bits." if run.command == "ptq" else longer)


def _training(run: RunFiles) -> Iterator[Note]:
    known = [value for row in run.metrics if (value := number(row.get("val/top1"))) is not None and math.isfinite(value)]
    if known and max(known) - known[-1] > FALL:
        what = f"Validation top-1 fell from {percent(max(known))} % to {percent(known[-1])} % in the end; best.ckpt has the better ones."
        yield Note(
            "warning", "", what, "A lower optimizer.lr, averaged weights (callbacks=[default,ema]) or annealing (callbacks=[default,cga])."
        )
    if run.resumed:
        steps = ", ".join(str(step) for step in run.resumed)
        yield Note(
            "note", "", f"Resumed at step {steps}; curves show the whole history.", "The time of the run is that since the last start."
        )
    if run.command == "train" and run.results.get("split") == "val":
        what = "There is no test split: the accuracy is that of the validation images, by which the weights were chosen."
        yield Note("note", "", what, "Keep images apart for a test: it will come out a little lower.")


def _oscillation(run: RunFiles) -> Iterator[Note]:
    for row in run.oscillation:
        weights, swinging = number(row.get("weights")), number(row.get("oscillating"))
        if weights and swinging is not None and swinging / weights > OSCILLATING:
            which = "folded query-key weights" if row.get("role") == "qk" else "weights"
            what = f"{100 * swinging / weights:.0f} % of the {which} oscillate between two codes."
            advice = "Anneal at the end of the run: callbacks=[default,cga], or freeze: callbacks=[default,freeze] (docs/oscillation.md)."
            yield Note("warning", str(row.get("layer", "")), what, advice)


def _search(run: RunFiles) -> Iterator[Note]:
    search = run.results.get("search")
    if not isinstance(search, dict):
        return
    if search.get("accepted") == 0:
        yield Note("note", "search", "No candidate was better than the start.", "More cycles, or another search.radius.")
    if search.get("selected_on") == "validation":
        what = "Scales were chosen by validation images: accuracy on them is no estimate for others."
        yield Note("warning", "search", what, "search.reference_selection=false chooses by calibration images.")


def _analyses(run: RunFiles) -> Iterator[Note]:
    for study in run.studies:
        for one in study.index.get("warnings") or []:
            yield Note("warning", str(one.get("where", "")).removeprefix(f"{OWN}: "), str(one.get("what", "")), str(one.get("advice", "")))


_CHECKS: tuple[Callable[[RunFiles], Iterator[Note]], ...] = (
    _failure,
    _incomplete,
    _accuracy,
    _training,
    _oscillation,
    _search,
    _analyses,
)
