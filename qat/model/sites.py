"""The one way to find parts of a net: quantizers, blocks, and parameters that weight decay leaves alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from qat.errors import UsageError
from qat.nn import QkrAttention
from qat.nn.quant_module import QuantModule
from qat.quantizers import Quantizer

WEIGHT_ROLES = ("weight", "qk")


@dataclass(frozen=True)
class Site:
    """One quantized tensor of a net.

    Attributes:
        name: path of the quantizer in the net, `blocks.0.mlp.fc1.weight_quantizer`.
        role: weight, input, q, k, v, qk (QKR's folded query-key weight), probs or image.
        owner: the module that holds the quantizer.
        quantizer: `quantizer(x)` fake-quantizes, `quantizer.codes(x)` gives integer codes.
    """

    name: str
    role: str
    owner: nn.Module
    quantizer: Quantizer

    @property
    def layer(self) -> str:
        """Path of the module that holds the quantizer, empty for the net itself."""
        return self.name.rpartition(".")[0]

    @property
    def is_weight(self) -> bool:
        """True for a weight, False for an activation."""
        return self.role in WEIGHT_ROLES

    def latent(self) -> Tensor:
        """The float tensor that a weight quantizer rounds, (out, ...); gradients reach the parameters it is made of.

        Raises:
            TypeError: the site is an activation, which has none.
            UsageError: the net is frozen, so that its codes are all there is.
        """
        if self.quantizer.held() is not None:
            raise UsageError(
                f"{self.name} holds only integer codes; the float weights are in the checkpoint that the model was frozen from"
            )
        if not (self.is_weight and isinstance(self.owner, QuantModule)):
            raise TypeError(
                f"{self.name} quantizes an activation; only roles {', '.join(WEIGHT_ROLES)} have a float master"
            )
        return self.owner.latent(self.role)


def iter_quantizers(net: nn.Module) -> Iterator[Site]:
    """Every quantizer of a net once, in the order of its modules; a quantizer is a leaf (what it wraps is not listed)."""
    for owner_name, owner in net.named_modules():
        if isinstance(owner, Quantizer):
            continue
        for name, child in owner.named_children():
            if isinstance(child, Quantizer):
                yield Site(f"{owner_name}.{name}".lstrip("."), child.spec.role, owner, child)


CONTAINER, DOWNSAMPLE, ATTENTION = "blocks", "downsample", "attn"


def find_blocks(net: nn.Module) -> dict[str, nn.Module]:
    """The blocks of a net by name, in the order of its modules: children of a module called `blocks`, as timm calls it, the outermost.

    So is a `downsample` that has an attention (LeViT).
    """
    found: dict[str, nn.Module] = {}
    for name, module in net.named_modules():
        parent, _, own = name.rpartition(".")
        attends = any(child.startswith(ATTENTION) for child, _ in module.named_children())
        is_block = parent.rpartition(".")[2] == CONTAINER or (own == DOWNSAMPLE and attends)
        if is_block and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = module
    return found


def quantizer_parameters(net: nn.Module) -> tuple[set[nn.Parameter], set[nn.Parameter]]:
    """Step sizes, and offsets, of all quantizers of a net."""
    scales: set[nn.Parameter] = set()
    offsets: set[nn.Parameter] = set()
    for module in net.modules():
        if isinstance(module, Quantizer):
            for name, parameter in module.named_parameters(recurse=False):
                (offsets if name.startswith("offset") else scales).add(parameter)
        if isinstance(module, QkrAttention) and module.product_offset is not None:
            offsets.add(module.product_offset)
    return scales, offsets


def no_weight_decay(net: nn.Module) -> set[str]:
    """Names of the parameters that weight decay must leave alone: steps and offsets of quantizers, biases, norms, and what timm names.

    A converted net says so itself (`net.no_weight_decay()`), which is where `timm.optim.create_optimizer_v2` and
    `param_groups_weight_decay` look. Source: OFQ's recipe skips decay for 1-D tensors, biases,
    position embedding and tokens, hence for scales and offsets.

    Args:
        net: converted or float.
    """
    found = dict(net.named_parameters())
    named = (_named_by_timm(net) & found.keys()) | {
        name for name, p in found.items() if p.ndim <= 1 or name.endswith(".bias")
    }
    quantizers = set.union(*quantizer_parameters(net))
    return named | {name for name, p in found.items() if p in quantizers}


def _named_by_timm(net: nn.Module) -> set[str]:
    """What the class of a net names; where it has no such method, as timm's wrappers of `features_only=True`, what its parts name."""
    own = getattr(type(net), "no_weight_decay", None)
    if own is not None:
        return set(own(net))
    return {
        f"{child_name}.{name}"
        for child_name, child in net.named_children()
        for name in _named_by_timm(child)
    }
