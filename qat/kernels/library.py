"""Functions as operators of torch, `torch.ops.qat.*`: compiled steps call them by name, eager ones without the way through a dispatcher."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from qat.errors import UsageError
from qat.kernels.rows import PLAIN

log = logging.getLogger(__name__)

_LIBRARY = torch.library.Library("qat", "DEF")
# In force while `make_fx` writes down what the dispatcher sees, which is not what C++ does.
_PROXY: Any = torch._C._TorchDispatchModeKey.PROXY


def operator(schema: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as the operator of its name. What it gives is never a view of an argument, nor of another result.

    It is called with tensors without memory as well, and then computes nothing but shapes.

    Args:
        schema: arguments and results, as `torch.library` writes them.
    """

    def register(made: Callable[..., Any]) -> Callable[..., Any]:
        name = made.__name__
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, made, "CompositeExplicitAutograd")
        torch.library.register_fake(f"qat::{name}", made, lib=_LIBRARY)
        overload = getattr(torch.ops.qat, name).default

        def run(*args: Any) -> Any:
            if type(args[0]) not in PLAIN or torch._C._get_dispatch_mode(_PROXY) is not None:
                return overload(*args)
            if not torch._C._has_storage(args[0]):
                raise UsageError(
                    "vmap: gradients of kernels are made one at a time; kernels=off, qat.kernels.use('off'), is for vmap"
                )
            return made(*args)

        torch.compiler.substitute_in_graph(run, skip_signature_check=True)(
            lambda *args: overload(*args)
        )
        return run

    return register


def differentiated_once() -> None:
    """Raise `UsageError` in a backward pass that is to be differentiated itself."""
    if torch.is_grad_enabled():
        raise UsageError(
            "create_graph=True: kernels are differentiated once; kernels=off, qat.kernels.use('off'), is as often as one likes"
        )


def works(what: str, agrees: Callable[[], bool]) -> bool:
    """Whether kernels can be had and agree with the formulas; if not, a line in the log says why."""
    try:
        found, reason = agrees(), "its kernels give other numbers here"
    except Exception as error:  # driver, compiler, linker: whatever it is, everything works without
        found, reason = False, f"{type(error).__name__}: {error}".partition("\n")[0]
    if not found:
        log.info("quantizers take several passes over memory: no %s (%s)", what, reason)
    return found
