"""The first lines of a run: what it does, with what, and where its outputs go."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter, defaultdict
from pathlib import Path

from omegaconf import DictConfig
from torch import nn

from qat.data import ImageData
from qat.lit import scaled_lr
from qat.model.convert import ConversionReport, ReportRow, conversion_report
from qat.model.frozen import FrozenWeight
from qat.model.ptq_spec import PtqRecipe
from qat.spec import QuantRecipe
from qat.utils.files import write_text


def lines(title: str, entries: dict[str, str]) -> str:
    """A title and aligned `key  value` lines."""
    width = max(len(key) for key in entries)
    return "\n".join([title, *(f"  {key.ljust(width)}  {value}" for key, value in entries.items())])


def describe_model(name: str, net: nn.Module, input_size: tuple[int, int, int]) -> str:
    """Name, parameters (those that are integer codes among them) and size of the images."""
    params = sum(p.numel() for p in net.parameters()) + sum(m.stored.numel() for m in net.modules() if isinstance(m, FrozenWeight))
    chans, height, width = input_size
    return f"{name}, {params / 1e6:.2f} M parameters, images {chans} x {height} x {width}"


def describe_recipe(recipe: QuantRecipe) -> str:
    """One line of bits and quantizers."""
    if recipe.name == "fp":
        return "fp: float, nothing is quantized"
    if isinstance(recipe, PtqRecipe):
        return _describe_ptq(recipe)
    bias = f" (query bias: {recipe.qk_bias})" if recipe.attention == "qkr" else ""
    rules = f", {len(recipe.overrides)} override(s)" if recipe.overrides else ""
    return (
        f"{recipe.name}: weights {recipe.bits} bit {recipe.weight_quantizer}, activations {recipe.act_bits} bit {recipe.act_quantizer}, "
        f"attention {recipe.attention}{bias}, stem {recipe.stem_bits} bit, heads {recipe.head_bits} bit{rules}"
    )


def _describe_ptq(recipe: PtqRecipe) -> str:
    grids = {False: "", True: " symmetric"}
    weights = f"weights {recipe.bits} bit{grids[recipe.weight_signed]} ({recipe.weight_observer})"
    acts = f"activations {recipe.act_bits} bit{grids[recipe.act_signed]} per {recipe.act_scales} ({recipe.act_observer})"
    softmax = f"softmax {recipe.softmax_bits} bit {recipe.softmax_quantizer}"
    extras = (
        [f"residual {recipe.residual_observer}"] if recipe.placement == "fqvit" and recipe.residual_observer != recipe.act_observer else []
    )
    extras += ["bias correction"] if recipe.bias_correction else []
    extras += ["integer norms"] if recipe.layernorm == "integer" else []
    extras += [f"{len(recipe.overrides)} override(s)"] if recipe.overrides else []
    return ", ".join([f"{recipe.name}: placement {recipe.placement}", weights, acts, softmax, *extras])


def describe_lr(cfg: DictConfig, global_batch: int) -> str:
    """The learning rate in force, and how it came about where it follows the batch."""
    optimizer = cfg.optimizer
    base, rule = optimizer.get("lr_base_batch"), optimizer.get("lr_batch_rule", "linear")
    lr = scaled_lr(optimizer.lr, global_batch=global_batch, lr_base_batch=base, lr_batch_rule=rule)
    if base is None:
        return f"lr {lr:.3g}"
    ratio = f"{global_batch}/{base}"
    return f"lr {lr:.3g} ({optimizer.lr:.3g} x {ratio if rule == 'linear' else f'sqrt({ratio})'})"


def describe_data(name: str, data: ImageData) -> str:
    """Sizes of the splits."""
    counts = ", ".join(f"{len(data.split(s))} {s}" for s in data.splits)
    return f"{name}: {counts} images, {data.settings.num_classes} classes"


def conversion(net: nn.Module, folder: Path) -> str:
    """Write `conversion.txt`, the report of a net, into a folder; gives it as `compact` does."""
    report = conversion_report(net)
    write_text(folder / "conversion.txt", report.to_text() + "\n")
    return compact(report)


def compact(report: ConversionReport) -> str:
    """The conversion report with equal blocks in one row: numbers in names become `*`, the last column counts them.

    Blocks that a rule gave other bits, quantizers or offsets than most have rows of their own with their numbers: `blocks.0,2.attn`.
    """
    kinds: dict[tuple[str, str], Counter[tuple[object, ...]]] = defaultdict(Counter)
    for r in report.rows:
        kinds[_starred(r.module), r.role][_kind(r)] += 1
    rows: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for r in report.rows:
        is_usual = kinds[_starred(r.module), r.role].most_common(1)[0][0] == _kind(r)
        rows[_starred(r.module), "usual" if is_usual else "", *(str(v) for v in dataclasses.astuple(r)[1:])].append(r.module)
    head = ("module", "role", "quantizer", "bits", "axis", "scales", "offsets", "times")
    table: list[tuple[str, ...]] = [head]
    for (name, usual, *about), modules in rows.items():
        named = [(name, len(modules))] if usual else _numbered(modules)
        table += [(shown, *about, str(times)) for shown, times in named]
    widths = [max(len(row[i]) for row in table) for i in range(len(head))]
    text = ["  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in table]
    floats = Counter((_starred(name), cls) for name, cls in report.stays_float)
    stays = ", ".join(f"{name} ({cls})" + (f" x{n}" if n > 1 else "") for (name, cls), n in floats.items())
    return "\n".join(["quantized", *text, f"  stays float: {stays}"])


def _starred(name: str) -> str:
    return re.sub(r"\d+", "*", name)


def _kind(row: ReportRow) -> tuple[object, ...]:
    """What a rule changes; how many scales there are follows from the layer."""
    return row.quantizer, row.bits, row.axis, row.offsets


def _numbered(names: list[str]) -> list[tuple[str, int]]:
    """The names that differ in their numbers as one, if they are all that its numbers allow; else each by itself."""
    places = [sorted(set(column)) for column in zip(*(map(int, re.findall(r"\d+", name)) for name in names), strict=True)]
    if math.prod(map(len, places)) != len(names):
        return [(name, 1) for name in names]
    numbers = iter(places)
    return [(re.sub(r"\d+", lambda _: _ranges(next(numbers)), names[0]), len(names))]


def _ranges(numbers: list[int]) -> str:
    """`0,2-5` for 0, 2, 3, 4, 5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ",".join(map(str, run)) for run in runs)
