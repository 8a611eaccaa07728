"""Parts of a model: quantizers, blocks, and parameters without weight decay."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from qat.errors import UsageError
from qat.nn import QkrAttention, hf_models
from qat.nn.quant_module import QuantModule
from qat.quantizers import Quantizer

WEIGHT_ROLES = ("weight", "qk")


@dataclass(frozen=True)
class Site:
    """One quantized tensor of a model.

    Attributes:
        name: path of the quantizer in the model, such as `blocks.0.mlp.fc1.weight_quantizer`.
        role: kind of tensor, one of `qat.spec.ROLES` or `OUTPUT_ROLES`; `qk` is QKR's folded
            query-key weight.
        owner: the module that contains the quantizer.
        quantizer: `quantizer(x)` fake-quantizes, `quantizer.codes(x)` returns integer codes.
    """

    name: str
    role: str
    owner: nn.Module
    quantizer: Quantizer

    @property
    def layer(self) -> str:
        """Path of the module that contains the quantizer; empty for the model itself."""
        return self.name.rpartition(".")[0]

    @property
    def is_weight(self) -> bool:
        """True if the quantizer rounds a weight, False if it rounds an activation."""
        return self.role in WEIGHT_ROLES

    def latent(self) -> Tensor:
        """The float tensor that a weight quantizer rounds, (out, ...).

        Gradients reach the parameters from which the tensor is computed.

        Raises:
            TypeError: the quantized tensor is an activation, which has no latent tensor.
            UsageError: the model is frozen and has only codes.
        """
        if self.quantizer.stored_weight() is not None:
            raise UsageError(
                f"{self.name} contains only integer codes; "
                "the float weights are in the checkpoint that the model was frozen from"
            )
        if not (self.is_weight and isinstance(self.owner, QuantModule)):
            roles = ", ".join(WEIGHT_ROLES)
            raise TypeError(
                f"{self.name} quantizes an activation; only roles {roles} have a float weight"
            )
        return self.owner.latent(self.role)


def iter_quantizers(net: nn.Module) -> Iterator[Site]:
    """Yield each quantizer of a model once, in the order of the modules.

    Quantizers inside another quantizer are left out.
    """
    for owner_name, owner in net.named_modules():
        if isinstance(owner, Quantizer):
            continue
        for name, child in owner.named_children():
            if isinstance(child, Quantizer):
                yield Site(f"{owner_name}.{name}".lstrip("."), child.spec.role, owner, child)


CONTAINER = "blocks"
HF_CONTAINERS = (CONTAINER, "layer", "layers")
DOWNSAMPLE = "downsample"
# For messages: the modules that `find_blocks` regards as blocks.
BLOCKS = (
    "blocks are the children of a module called blocks or, in models of Transformers, of a list "
    "called layer or layers"
)
ATTENTION = "attn"


def find_blocks(net: nn.Module) -> dict[str, nn.Module]:
    """Find the blocks of a model, by name, in the order of the modules.

    In timm's models, a block is a child of a module named `blocks`, or a `downsample` that contains
    an attention (LeViT). If these are nested, only the outermost blocks count. In models of
    Transformers, a block is a child of a list whose name is in `HF_CONTAINERS`. If lists are
    nested, only children of the innermost lists count. Without such a list, the rule for timm's
    models applies.
    """
    blocks = _blocks_of_transformers(net) if hf_models(net) else {}
    if blocks:
        return blocks
    for name, module in net.named_modules():
        parent, _, own_name = name.rpartition(".")
        attends = any(child.startswith(ATTENTION) for child, _ in module.named_children())
        is_downsample = own_name == DOWNSAMPLE and attends
        is_block = parent.rpartition(".")[2] == CONTAINER or is_downsample
        if is_block and not any(name.startswith(f"{outer}.") for outer in blocks):
            blocks[name] = module
    return blocks


def _blocks_of_transformers(net: nn.Module) -> dict[str, nn.Module]:
    lists = {}
    for name, module in net.named_modules():
        if isinstance(module, nn.ModuleList) and name.rpartition(".")[2] in HF_CONTAINERS:
            lists[name] = module
    blocks: dict[str, nn.Module] = {}
    for name, module in lists.items():
        if not any(inner.startswith(f"{name}.") for inner in lists):
            for number, block in module.named_children():
                blocks[f"{name}.{number}"] = block
    return blocks


def quantizer_parameters(net: nn.Module) -> tuple[set[nn.Parameter], set[nn.Parameter]]:
    """Return the step sizes of all quantizers, and the offsets of a model, as two sets."""
    scales: set[nn.Parameter] = set()
    offsets: set[nn.Parameter] = set()
    for module in net.modules():
        if isinstance(module, Quantizer):
            for name, parameter in module.named_parameters(recurse=False):
                group = offsets if name.startswith("offset") else scales
                group.add(parameter)
        if isinstance(module, QkrAttention) and module.product_offset is not None:
            offsets.add(module.product_offset)
    return scales, offsets


def no_weight_decay(net: nn.Module) -> set[str]:
    """Names of the parameters that must not get weight decay.

    These are step sizes and offsets of quantizers, biases, other 0-D and 1-D tensors such as the
    weights of norms, and the parameters that the model's class excludes. A converted model returns
    them, and patterns for compiled models, from `net.no_weight_decay()`, which
    `timm.optim.create_optimizer_v2` calls. Source: OFQ's recipe excludes 1-D tensors, biases,
    position embedding and tokens, and so also scales and offsets.

    Args:
        net: a converted or float model.
    """
    parameters = dict(net.named_parameters())
    scales, offsets = quantizer_parameters(net)
    names = _excluded_by_timm(net) & parameters.keys()
    for name, parameter in parameters.items():
        if parameter.ndim <= 1 or name.endswith(".bias"):
            names.add(name)
        if parameter in scales or parameter in offsets:
            names.add(name)
    return names


def _excluded_by_timm(net: nn.Module) -> set[str]:
    """Names that the model's class excludes; if it has no such method, those of its children."""
    own_method = getattr(type(net), "no_weight_decay", None)
    if own_method is not None:
        return set(own_method(net))
    names = set()
    for child_name, child in net.named_children():
        for name in _excluded_by_timm(child):
            names.add(f"{child_name}.{name}")
    return names
