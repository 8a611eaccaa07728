"""A net that a stranger's file describes is built only if it is about as large as the weights beside the description."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn

# A number among a model's arguments; tensors and numbers of a net, in those of the file (a net is registered before and after conversion,
# with scales and offsets); numbers of one tensor that an image makes in it.
MOST_ARGUMENT = 2**17
TIMES, SPARE_TENSORS, SPARE_NUMBERS, SPARE_PASSED = 8, 2000, 2**24, 2**28
_OTHER = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError)


def check_net(
    name: str,
    kwargs: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    input_size: Sequence[Any] | None = None,
) -> None:
    """Raise `ValueError` if a net would need much more memory than some weights; none is taken for it.

    Args:
        name: of timm.
        kwargs: of `timm.create_model`.
        weights: by name; their shapes alone matter.
        input_size: (channels, height, width) of the images that it will be given; None = not known.
    """
    for argument, value in kwargs.items():
        for number in value if isinstance(value, list | tuple) else [value]:
            if isinstance(number, int | float) and abs(number) > MOST_ARGUMENT:
                raise ValueError(f"argument {argument}={value!r} must be at most {MOST_ARGUMENT}")
    most = TIMES * sum(tensor.numel() for tensor in weights.values()) + SPARE_PASSED

    def count(module: nn.Module, args: tuple[Any, ...], out: object) -> None:
        shape = args[0].shape if args and isinstance(args[0], Tensor) else ()
        heads = getattr(module, "num_heads", 0)
        scores = (
            shape[0] * heads * shape[1] ** 2 if isinstance(heads, int) and len(shape) == 3 else 0
        )
        if max(scores, out.numel() if isinstance(out, Tensor) else 0) > most:
            raise ValueError(
                f"an image of {tuple(input_size or ())} takes much more memory than the weights of the file"
            )

    # What else is wrong is said where the net itself is built; one that looks at its values cannot be built without them.
    with (
        contextlib.suppress(*_OTHER),
        about_as_large_as(weights),
        torch.device("meta"),
        torch.no_grad(),
    ):
        net = timm.create_model(name, **kwargs).eval()
        if input_size is not None:
            hook = nn.modules.module.register_module_forward_hook(count)
            try:
                net(torch.zeros(1, *input_size))
            finally:
                hook.remove()


@contextlib.contextmanager
def about_as_large_as(state: Mapping[str, Tensor]) -> Generator[None]:
    """Within it no net can be built that is much larger than some weights: `ValueError` at the first tensor too many, not yet filled."""
    tensors = TIMES * len(state) + SPARE_TENSORS
    numbers = TIMES * sum(tensor.numel() for tensor in state.values()) + SPARE_NUMBERS

    def count(_module: nn.Module, name: str, tensor: Tensor | None) -> None:
        nonlocal tensors, numbers
        if tensor is not None:
            tensors, numbers = tensors - 1, numbers - tensor.numel()
        if min(tensors, numbers) < 0:
            raise ValueError(
                f"the model is much larger than the weights of the file, at its {name}"
            )

    watched = nn.modules.module
    hooks = (
        watched.register_module_parameter_registration_hook(count),
        watched.register_module_buffer_registration_hook(count),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
