"""What a person should know before anything else of a run, each with what to do about it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

from qat.report.numbers import number, percent
from qat.report.run_files import RunFiles

LEVELS = ("error", "warning", "note")
GAP = 5.0  # points of accuracy below the float model that are worth a word
FALL = 3.0  # points from the best validation to the last one
OWN = "this run"  # label of a run's own model
OSCILLATING = 0.1  # share of a layer's weights


@dataclass(frozen=True)
class Note:
    """Where, what, and what to do.

    Attributes:
        level: one of `LEVELS`.
        where: empty for the run as a whole.
    """

    level: str
    where: str
    what: str
    advice: str


def notes_of(run: RunFiles) -> list[Note]:
    """All of a run: errors first, then what its own files say, then what analyses warn of."""
    found = chain(_failure(run), _accuracy(run), _training(run), _oscillation(run), _search(run), _export(run), _analyses(run))
    return sorted(found, key=lambda note: LEVELS.index(note.level))


def grouped(notes: list[Note]) -> list[tuple[tuple[str, str], list[Note]]]:
    """Notes by level and advice, as the page lists them."""
    groups: dict[tuple[str, str], list[Note]] = {}
    for note in notes:
        groups.setdefault((note.level, note.advice), []).append(note)
    return list(groups.items())


def _failure(run: RunFiles) -> Iterator[Note]:
    error = run.results.get("error")
    if error:
        yield Note("error", "", f"The run failed: {error}", "What is shown below is what the run had written by then.")
    elif not run.results:
        what = "There is no results.json: the run is still going, or was stopped."
        yield Note(
            "warning", "", what, "The same command with resume=auto goes on where it was; python analyze.py run=DIR makes this page anew."
        )
    if run.unread:
        yield Note("warning", "", f"Cannot be read: {', '.join(run.unread)}.", "What they hold is missing on this page.")


def _accuracy(run: RunFiles) -> Iterator[Note]:
    top1, top1_fp = number(run.results.get("top1")), number(run.results.get("top1_fp"))
    share, images = number(run.results.get("majority_share")), number(run.results.get("images"))
    if top1 is None:
        return
    if share is not None and images and top1 < share + _chance(share, images):
        always = (
            f"always naming the most frequent class gives {percent(share)} %, and chance up to {percent(share + _chance(share, images))} %"
        )
        what = f"{percent(top1)} % top-1 on {images:,.0f} images is not clearly more than nothing learned: {always}."
        advice = "Check labels and normalisation with eval.py on the float model; start from its weights with ckpt=; use more bits."
        yield Note("warning", "", what, advice)
    elif top1_fp is not None and top1_fp - top1 > GAP:
        advice = "Train longer, distil from the float model (loss=kd), or give the most sensitive layers more bits (quant.overrides)."
        if run.command == "ptq":
            advice = "Train with quantizers (train.py ckpt=...), or use more bits."
        yield Note("warning", "", f"{top1_fp - top1:.1f} points of top-1 are lost to quantization.", advice)


def _chance(share: float, images: float) -> float:
    """Two standard deviations of an accuracy that in truth is `share`, in points."""
    return 2 * math.sqrt(max(share * (100 - share), 0) / images)


def _training(run: RunFiles) -> Iterator[Note]:
    known = [value for row in run.metrics if (value := number(row.get("val/top1"))) is not None and math.isfinite(value)]
    if known and max(known) - known[-1] > FALL:
        what = f"Validation top-1 fell from {percent(max(known))} % to {percent(known[-1])} % in the end; best.ckpt has the better ones."
        advice = "A lower optimizer.lr, averaged weights (callbacks=[default,ema]) or annealing (callbacks=[default,cga])."
        yield Note("warning", "", what, advice)
    if run.resumed:
        yield Note("note", "", f"Resumed at step {', '.join(map(str, run.resumed))}.", "Curves and time are those of the whole run.")
    if run.command == "train" and run.results.get("split") == "val":
        what = "There is no test split: the accuracy is that of the validation images, by which the weights were chosen."
        yield Note("note", "", what, "Keep images apart for a test: it will come out a little lower.")


def _oscillation(run: RunFiles) -> Iterator[Note]:
    advice = "Anneal at the end of the run: callbacks=[default,cga], or freeze: callbacks=[default,freeze] (docs/oscillation.md)."
    for row in run.oscillation:
        weights, oscillating = number(row.get("weights")), number(row.get("oscillating"))
        if weights and oscillating is not None and oscillating / weights > OSCILLATING:
            which = "folded query-key weights" if row.get("role") == "qk" else "weights"
            what = f"{100 * oscillating / weights:.0f} % of the {which} oscillate between two codes."
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


def _export(run: RunFiles) -> Iterator[Note]:
    agrees = run.results.get("agrees")
    for runtime, is_right in agrees.items() if isinstance(agrees, dict) else ():
        if is_right is False:
            what = f"In {runtime} the file does not run, or is not what the checkpoint is."
            yield Note("warning", str(runtime), what, "Use the other runtime, or try dynamic_batch=false (docs/deployment.md#openvino).")


def _analyses(run: RunFiles) -> Iterator[Note]:
    for analysis in run.analyses:
        if analysis.index.get("complete") is False:
            what = "The analysis was interrupted; its tables and plots are of the evaluations that were done."
            yield Note("warning", analysis.name, what, "The same command with the same run_dir goes on.")
        for one in analysis.index.get("warnings") or []:
            where, what, advice = (str(one.get(name, "")) for name in ("where", "what", "advice"))
            yield Note("warning", where.removeprefix(f"{OWN}: "), what, advice)
