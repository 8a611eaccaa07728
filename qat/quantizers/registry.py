"""Quantizer modules by name: a name registered in this package, or `package.module:Class`."""

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
    """Build quantizers called `name` with the decorated class or function of this package.

    Names in recipes for training are also in `WEIGHT_QUANTIZERS` or `ACT_QUANTIZERS` of `qat.spec`.

    Raises:
        ValueError: the name is registered for another quantizer.
    """

    def add(builder: Callable[[QuantSpec], Quantizer]) -> Callable[[QuantSpec], Quantizer]:
        if _BUILDERS.setdefault(name, builder) is not builder:
            raise ValueError(f"quantizer {name!r} is already registered")
        return builder

    return add


def import_quantizer(path: str) -> type[Quantizer]:
    """Import the class `package.module:Class`.

    Call this only for names in a user's settings or of imported classes: importing runs code.

    Raises:
        UsageError: the class cannot be imported, or is not a subclass of `Quantizer` that defines
            `forward` and `codes`.
    """
    module_name, class_name = path.split(":")
    try:
        quantizer = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"quantizer={path!r}: {error}") from error
    is_quantizer = isinstance(quantizer, type) and issubclass(quantizer, Quantizer)
    if not is_quantizer or quantizer.__abstractmethods__:
        raise UsageError(
            f"quantizer={path!r}: must be a subclass of qat.quantizers.Quantizer "
            "that has forward and codes"
        )
    return quantizer


def build_quantizer(spec: QuantSpec) -> Quantizer:
    """Build the quantizer module of a spec, inside `Shifted` if the spec asks for offsets.

    A name from a file enters a spec only if its class is imported already (see
    `qat.model.ptq_spec.recipe_from`).

    Raises:
        UsageError: the name is not registered, or is a path that `import_quantizer` refuses.
    """
    if ":" in spec.quantizer:
        builder: Callable[[QuantSpec], Quantizer] = import_quantizer(spec.quantizer)
    elif spec.quantizer in _BUILDERS:
        builder = _BUILDERS[spec.quantizer]
    else:
        raise UsageError(
            f"quantizer={spec.quantizer!r}: must be one of {', '.join(sorted(_BUILDERS))} "
            "or package.module:Class"
        )
    quantizer = builder(spec)
    if spec.offsets == "none":
        return quantizer
    return Shifted(quantizer)
