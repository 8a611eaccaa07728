"""From a quantizer's name to the module: those of this package by `register`, anybody's as `package.module:Class`."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from qat.errors import UsageError
from qat.quantizers.quantizer import Float, Quantizer
from qat.quantizers.shifted import Shifted
from qat.spec import QuantSpec

_BUILDERS: dict[str, Callable[[QuantSpec], Quantizer]] = {"float": Float}


def register(
    name: str,
) -> Callable[[Callable[[QuantSpec], Quantizer]], Callable[[QuantSpec], Quantizer]]:
    """Make `quantizer=name` build the decorated class or function of this package.

    Those that a recipe may name are listed in `qat.spec.QUANTIZERS` as well.

    Raises:
        ValueError: another one has the name.
    """

    def add(builder: Callable[[QuantSpec], Quantizer]) -> Callable[[QuantSpec], Quantizer]:
        if _BUILDERS.setdefault(name, builder) is not builder:
            raise ValueError(f"quantizer {name!r} is already registered")
        return builder

    return add


def import_quantizer(path: str) -> type[Quantizer]:
    """The class `package.module:Class`, its module imported: for a name that the user typed, never for one that a file holds.

    Raises:
        UsageError: there is no such class, or it is no subclass of `Quantizer` with the methods that one must have.
    """
    module_name, class_name = path.split(":")
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"quantizer={path!r}: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Quantizer)) or found.__abstractmethods__:
        raise UsageError(
            f"quantizer={path!r}: must be a subclass of qat.quantizers.Quantizer that has forward and codes"
        )
    return found


def build_quantizer(spec: QuantSpec) -> Quantizer:
    """The quantizer module of a spec, inside `Shifted` if the spec asks for offsets.

    What a file names has been compared with what is imported before it becomes a spec (`qat.model.ptq_spec.recipe_from`).

    Raises:
        UsageError: the name is neither registered nor importable.
    """
    if ":" in spec.quantizer:
        builder: Callable[[QuantSpec], Quantizer] = import_quantizer(spec.quantizer)
    elif spec.quantizer in _BUILDERS:
        builder = _BUILDERS[spec.quantizer]
    else:
        raise UsageError(
            f"quantizer={spec.quantizer!r}: must be one of {', '.join(sorted(_BUILDERS))} or package.module:Class"
        )
    quantizer = builder(spec)
    return quantizer if spec.offsets == "none" else Shifted(quantizer)
