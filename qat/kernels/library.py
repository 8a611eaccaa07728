"""Functions as operators of torch, `torch.ops.qat.*`.

Compiled steps call operators by name; eager steps call the functions, without torch's dispatcher.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from qat.errors import UsageError
from qat.kernels.rows import PLAIN_CLASSES

log = logging.getLogger(__name__)

_LIBRARY = torch.library.Library("qat", "DEF")
# The dispatch mode that is active while `make_fx` traces. `make_fx` records only calls through the
# dispatcher, not kernels that are called directly.
_PROXY: Any = torch._C._TorchDispatchModeKey.PROXY


def operator(schema: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function, whose first argument is a tensor, as an operator of the same name.

    The decorated function takes positional arguments, and raises `UsageError` under `vmap`.
    No result may be a view of an argument or of another result. Tracing calls the function with
    tensors that have no memory, and the function must then compute only shapes.

    Args:
        schema: arguments and results, in the notation of `torch.library`.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        name = function.__name__
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"qat::{name}", function, lib=_LIBRARY)
        overload = getattr(torch.ops.qat, name).default

        def run(*args: Any) -> Any:
            is_traced = torch._C._get_dispatch_mode(_PROXY) is not None
            if type(args[0]) not in PLAIN_CLASSES or is_traced:
                return overload(*args)
            if not torch._C._has_storage(args[0]):
                raise UsageError(
                    "vmap: kernels do not support batched gradients; set kernels=off "
                    "(in Python, qat.kernels.use('off'))"
                )
            return function(*args)

        torch.compiler.substitute_in_graph(run, skip_signature_check=True)(
            lambda *args: overload(*args)
        )
        return run

    return register


def check_not_double_backward() -> None:
    """Raise `UsageError` in a backward pass that is itself being differentiated."""
    if torch.is_grad_enabled():
        raise UsageError(
            "create_graph=True: kernels can only be differentiated once; set kernels=off "
            "(in Python, qat.kernels.use('off'))"
        )


def check_kernels(language: str, compare: Callable[[], bool]) -> bool:
    """True if the kernels compile and agree with the reference; log the reason if False."""
    reason = "its kernels disagree with the reference implementation"
    try:
        are_usable = compare()
    except Exception as error:  # a driver, compiler or linker may fail
        are_usable = False
        reason, _, _ = f"{type(error).__name__}: {error}".partition("\n")
    if not are_usable:
        log.info("no %s kernels (%s); quantizers use slower torch operations", language, reason)
    return are_usable
