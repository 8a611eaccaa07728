"""List the choices of `model=`, `quant=` and `ptq=`, with a description of each."""

from __future__ import annotations

from typing import Any

from qat.tasks.conf import CONF, options, values_of


def model_lines() -> list[str]:
    """Lines that `qat models` prints."""
    entries = {}
    for name in options("model"):
        values = _load_values("model", name)
        parts = [values["name"], _remark("model", name)]
        # ??? is Hydra's mark for a missing value.
        entries[f"model={name}"] = ". ".join(part for part in parts if part not in {"", "???"})
    return [*_table(entries), "model=NAME also accepts any timm model by its name."]


def recipe_lines() -> list[str]:
    """Lines that `qat recipes` prints."""
    entries = {}
    for name in options("quant"):
        values = _load_values("quant", name)
        entries[f"quant={name}"] = f"{_format_all_bits(values)}, attention {values['attention']}"
    for name in options("ptq"):
        values = _load_values("ptq", name)
        if "bits" in values:
            entries[f"ptq={name}"] = f"{_format_all_bits(values)}, method {values['method']}"
        else:
            entries[f"ptq={name}"] = _remark("ptq", name)
    return [*_table(entries), 'In Python, qat.recipe("seq_2bit") is quant=seq_2bit.']


def _table(entries: dict[str, str]) -> list[str]:
    width = max(map(len, entries))
    return [f"{name:<{width}}  {text}" for name, text in entries.items()]


def _load_values(group: str, name: str) -> dict[str, Any]:
    """Values of a choice, including values of the choices that it is based on."""
    own_values = dict(values_of(group, name))
    values: dict[str, Any] = {}
    for base in own_values.pop("defaults", []):
        if isinstance(base, str) and base != "_self_":
            values |= _load_values(group, base)
    return values | own_values


def _remark(group: str, name: str) -> str:
    """The comment in the first line of a choice's file, or an empty text."""
    first_line = (CONF / group / f"{name}.yaml").read_text(encoding="utf-8").partition("\n")[0]
    return first_line[2:] if first_line.startswith("# ") else ""


def _format_all_bits(values: dict[str, Any]) -> str:
    act_bits = values["act_bits"] or values["bits"]
    weights = _format_bits(values["bits"], values["weight_quantizer"])
    return f"weights {weights}, activations {_format_bits(act_bits, values['act_quantizer'])}"


def _format_bits(bits: int, quantizer: str) -> str:
    return quantizer if quantizer == "float" else f"{bits} bit {quantizer}"
