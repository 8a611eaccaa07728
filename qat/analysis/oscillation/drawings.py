"""Curves, maps and bars of oscillation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from qat.analysis.analysis import Drawing
from qat.analysis.oscillation.recorded import FLIPS, SHARE, OscillationRun, Series, per_step
from qat.analysis.style import GREY, HEAT, axes, colours, figure, panels, quiet
from qat.analysis.weights.drawings import label_layers, short

_MAP_COLUMNS = 200
_PERCENT = 100.0


def curves(name: str, title: str, runs: Sequence[OscillationRun]) -> Drawing:
    """Over optimizer steps: share of oscillating weights, flips a step, share of weights held; one line a run."""
    wanted: list[tuple[str, float, Callable[[OscillationRun], Series]]] = [
        ("oscillating weights, %", _PERCENT, lambda run: run.totals.get(SHARE, Series())),
        ("flips a step", 1.0, lambda run: per_step(run.totals.get(FLIPS, Series()))),
        ("weights held, %", _PERCENT, lambda run: run.frozen),
    ]
    shown = [(label, factor, pick) for label, factor, pick in wanted if any(pick(run).steps for run in runs)]
    drawn = figure(height=0.7 + 1.7 * len(shown))
    for axis, (label, factor, pick) in zip(panels(drawn, len(shown), 1, sharex=True), shown, strict=True):
        # Runs that share their first steps lie on each other: the later ones are dashed.
        for index, (colour, run) in enumerate(zip(colours(), runs, strict=False)):
            series, style = pick(run), "--" if index else "-"
            axis.plot(series.steps, [factor * value for value in series.values], style, color=colour, linewidth=1.3, label=run.label)
            _mark_checkpoint(axis, run, colour)
        quiet(axis, "", label)
        axis.set_ylim(0, 1.08 * axis.get_ylim()[1])
    drawn.axes[-1].set_xlabel("optimizer step (dotted: where the checkpoint is from)", fontsize=9)
    if len(runs) > 1:
        drawn.axes[0].legend(fontsize=8, frameon=False)
    said = "; ".join(_spoken(run) for run in runs)
    return Drawing(name, title, f"Oscillation over optimizer steps: {', '.join(label for label, *_ in shown)}. {said}.", drawn)


def _mark_checkpoint(axis: Axes, run: OscillationRun, colour: str) -> None:
    if run.step is not None:
        axis.axvline(run.step, color=colour, linewidth=0.9, linestyle=":")


def _spoken(run: OscillationRun) -> str:
    parts = []
    if SHARE in run.totals:
        values = run.totals[SHARE].values
        parts.append(f"{100 * values[0]:.2f} % of the weights oscillate at the first line, {100 * max(values):.2f} % at most")
        parts.append(f"{100 * values[-1]:.2f} % at the end")
    if run.frozen.values:
        parts.append(f"{100 * run.frozen.values[-1]:.2f} % are held at the end")
    return f"{run.label}: {', '.join(parts)}"


def layer_map(name: str, title: str, run: OscillationRun) -> Drawing:
    """Layers down, optimizer steps across, the share of oscillating weights as colour."""
    steps = sorted({step for series in run.layers.values() for step in series.steps})
    shown = [steps[index] for index in np.unique(np.linspace(0, len(steps) - 1, min(len(steps), _MAP_COLUMNS)).astype(int))]
    image = np.full((len(run.layers), len(shown)), np.nan)
    for line, series in zip(image, run.layers.values(), strict=True):
        values = dict(zip(series.steps, series.values, strict=True))
        line[:] = [_PERCENT * values.get(step, np.nan) for step in shown]
    drawn = figure(height=min(1.2 + 0.16 * len(image), 9.0))
    axis = axes(drawn, "optimizer step", "")
    shades = axis.imshow(image, cmap=HEAT, aspect="auto", interpolation="nearest", vmin=0)
    axis.grid(visible=False)
    ticks = np.unique(np.linspace(0, len(shown) - 1, min(len(shown), 6)).astype(int))
    axis.set_xticks(ticks, [str(shown[tick]) for tick in ticks])
    label_layers(axis, list(run.layers))
    drawn.colorbar(shades, ax=axis, label="oscillating weights, %", shrink=0.8)
    last = {layer: series.values[-1] for layer, series in run.layers.items()}
    highest, lowest = (pick(last, key=lambda layer: last[layer]) for pick in (max, min))
    said = f"at the end from {100 * last[lowest]:.2f} % ({lowest}) to {100 * last[highest]:.2f} % ({highest})"
    return Drawing(name, title, f"Share of oscillating weights of each layer over optimizer steps of {run.label}; {said}.", drawn)


def top_layers(name: str, title: str, shares: Mapping[str, Mapping[str, float]], top: int) -> Drawing:
    """Bars of the layers with the largest share in any of the nets.

    Args:
        name: of the files.
        title: above.
        shares: by net and layer, between 0 and 1.
        top: layers shown.
    """
    highest = {layer: max(of.get(layer, 0.0) for of in shares.values()) for of_net in shares.values() for layer in of_net}
    layers = sorted(highest, key=lambda layer: -highest[layer])[:top]
    drawn = figure(height=1.1 + 0.2 * len(layers) * max(1.0, 0.6 * len(shares)))
    axis = axes(drawn, "oscillating weights, %")
    height = 0.8 / len(shares)
    for index, (colour, (label, of)) in enumerate(zip(colours(), shares.items(), strict=False)):
        places = np.arange(len(layers)) - 0.4 + height * (index + 0.5)
        axis.barh(places, [_PERCENT * of.get(layer, 0.0) for layer in layers], height=height, color=colour, label=label)
    axis.set_yticks(range(len(layers)), [short(layer) for layer in layers], fontsize=7.5)
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    if len(shares) > 1:
        axis.legend(fontsize=8, frameon=False)
    said = "; ".join(f"{layer}: {', '.join(f'{100 * of.get(layer, 0.0):.2f} %' for of in shares.values())}" for layer in layers)
    return Drawing(name, title, f"Layers with the largest share of oscillating weights ({', '.join(shares)}). {said}.", drawn)


def frequencies(name: str, title: str, runs: Sequence[OscillationRun]) -> Drawing:
    """Share of all weights whose frequency is above f, over f, both on logarithmic axes; one line a run."""
    drawn = figure(height=3.0)
    axis = axes(drawn, "frequency: share of looks at which a weight turned back (exponential mean)", "weights above it, %")
    points = np.logspace(-3.5, 0, 141)
    said, has_flipped = [], False
    for colour, run in zip(colours(), runs, strict=False):
        if not run.now:
            continue
        values = np.sort(np.concatenate([state.frequency.numpy() for state in run.now]))
        above = _PERCENT * (len(values) - np.searchsorted(values, points, side="right")) / len(values)
        has_flipped |= bool((above > 0).any())
        axis.plot(points[above > 0], above[above > 0], color=colour, linewidth=1.4, label=run.label)
        axis.axvline(run.threshold, color=GREY, linewidth=0.9, linestyle="--")
        said.append(f"{run.label}: highest frequency {values[-1]:.3f}")
    # Before a weight has turned back there is nothing that a logarithm exists of.
    axis.set(xscale="log", yscale="log" if has_flipped else "linear")
    if len(said) > 1:
        axis.legend(fontsize=8, frameon=False)
    alt = f"Share of weights that flip more often than a frequency; the dashed line is the threshold. {'; '.join(said)}."
    return Drawing(name, title, alt, drawn)
