"""Size limits for the model that an untrusted file describes, and for its images.

The limits depend on the size of the file's weights, and are checked on the meta device, which takes
no memory. Models that cannot be built there are built on the CPU until they exceed a limit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Maximum magnitude of the numbers among a model's arguments.
MAX_ARGUMENT = 2**17
# A model may have SIZE_FACTOR times as many tensors and numbers as the file, plus SPARE_TENSORS and
# SPARE_NUMBERS. A single computed tensor may have SIZE_FACTOR times as many numbers as the file,
# plus SPARE_COMPUTED.
SIZE_FACTOR = 8
SPARE_TENSORS = 2000
SPARE_NUMBERS = 2**24
SPARE_COMPUTED = 2**28
# Errors of building or calling a model, other than the `ValueError` of `SizeLimit`.
OTHER_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
)


class SizeLimit(TorchDispatchMode):
    """Limits the tensors that a `with` block may create, compared with `weights`.

    The block raises `ValueError` if it creates far more or far larger tensors. Only tensors of the
    current thread are checked. The sizes of tensors that are not computed from other tensors, such
    as new parameters, are summed; each computed tensor is checked by itself.

    Args:
        weights: tensors by name; only their shapes matter.
        beginning: first words of the error message.
    """

    def __init__(
        self, weights: Mapping[str, Tensor], beginning: str = "the model is much larger than"
    ) -> None:
        super().__init__()
        numbers = SIZE_FACTOR * sum(tensor.numel() for tensor in weights.values())
        self.message = f"{beginning} the weights of the file"
        self.tensors_left = SIZE_FACTOR * len(weights) + SPARE_TENSORS
        self.numbers_left = numbers + SPARE_NUMBERS
        self.max_computed = numbers + SPARE_COMPUTED

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,  # noqa: ARG002  (torch's signature)
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call a torch operator, and count the tensors that it returns."""
        out = func(*args, **(kwargs or {}))
        sizes = _sizes(out)
        if not sizes:
            return out
        if not _sizes(args):
            self.tensors_left -= len(sizes)
            self.numbers_left -= sum(sizes)
        if "scaled_dot_product" in str(func):
            # Attention also computes scores, which it does not return.
            query, key = args[:2]
            sizes.append(query[..., 0].numel() * key.shape[-2])
        has_too_many = self.tensors_left < 0 or self.numbers_left < 0
        if has_too_many or max(sizes) > self.max_computed:
            raise ValueError(self.message)
        return out


def _sizes(values: object) -> list[int]:
    """Number of elements of each tensor in the arguments or the result of an operator."""
    return [leaf.numel() for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def check_net(
    name: str,
    kwargs: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    image_sizes: Iterable[Sequence[int]] = (),
    pretrained_size: Sequence[int] | None = None,
) -> None:
    """Raise `ValueError` if a model, or an image for it, needs much more memory than `weights`.

    Numbers beyond `MAX_ARGUMENT` in `kwargs` also raise it, as timm may for wrong arguments. The
    model is built on the meta device, which takes no memory, or else on the CPU; it is called on
    the meta device.

    Args:
        name: timm name of the model.
        kwargs: arguments of `timm.create_model`.
        weights: tensors by name; only their shapes matter.
        image_sizes: (height, width) of images with which the model may be called.
        pretrained_size: (channels, height, width) in the file's `pretrained_cfg`. It is not checked
            if it equals timm's own value, because models for smaller images keep this value.
    """
    for argument, value in kwargs.items():
        numbers = value if isinstance(value, list | tuple) else [value]
        for number in numbers:
            if isinstance(number, int | float) and abs(number) > MAX_ARGUMENT:
                raise ValueError(
                    f"argument {argument}={value!r}: numbers must be from {-MAX_ARGUMENT} to "
                    f"{MAX_ARGUMENT}"
                )
    net: nn.Module | None = None
    # Ignore other errors: they appear again when the model is built for use, and some models cannot
    # be built on the meta device.
    for device in ("meta", "cpu"):
        with contextlib.suppress(*OTHER_ERRORS), torch.device(device), SizeLimit(weights):
            net = timm.create_model(name, **kwargs).eval().to("meta")
            break
    if net is None:
        return
    own_cfg = getattr(net, "pretrained_cfg", None) or {}
    if pretrained_size is not None and tuple(pretrained_size) != own_cfg.get("input_size"):
        image_sizes = [*image_sizes, pretrained_size[1:]]
    for image_size in image_sizes:
        channels = kwargs.get("config", {}).get("num_channels", 3)
        size = (kwargs.get("in_chans", channels), *image_size)
        limit = SizeLimit(weights, f"an image of {size} takes much more memory than")
        with contextlib.suppress(*OTHER_ERRORS), torch.device("meta"), torch.no_grad():
            image = torch.zeros(1, *size)
            with limit:
                net(image)
