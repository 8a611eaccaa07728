"""A loss is a weighted sum of named terms, each a function of one training step.

A new term is a subclass of `LossTerm` and a few lines of yaml.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from qat.errors import UsageError
from qat.utils.validate import check_number


@dataclass(frozen=True)
class StepContext:
    """Inputs and outputs of one training step, from which loss terms are computed.

    Attributes:
        logits: (B, K), or a pair (class head, distillation head) of a net in distilled training.
        target: (B,) class ids or (B, K) probabilities.
        teacher_logits: (B, K); None without a teacher.
        net: the net in training, for terms on its weights.
        progress: completed fraction of the optimizer steps of the run, 0 to 1.
        features: outputs (B, ...) of those blocks of the net that terms read; may be empty.
        teacher_features: outputs (B, ...) of the same blocks of the teacher; may be empty.
    """

    logits: Tensor | tuple[Tensor, Tensor]
    target: Tensor
    teacher_logits: Tensor | None
    net: nn.Module
    progress: float = 0.0
    features: Sequence[Tensor] = ()
    teacher_features: Sequence[Tensor] = ()

    @property
    def heads(self) -> tuple[Tensor, Tensor]:
        """Logits (B, K) of class head and distillation head; equal unless `logits` is a pair."""
        if isinstance(self.logits, tuple):
            return self.logits
        return self.logits, self.logits

    @property
    def prediction(self) -> Tensor:
        """Logits (B, K), combined as in evaluation: the mean of a pair, or else the logits."""
        class_logits, distillation_logits = self.heads
        if class_logits is distillation_logits:
            return class_logits
        return (class_logits + distillation_logits) / 2


class LossTerm(nn.Module, ABC):
    """Maps a `StepContext` to a scalar.

    Args:
        weight: factor in the sum, >= 0.

    Attributes:
        needs_teacher: True if the term reads `teacher_logits` or `teacher_features`.
        blocks: the blocks whose outputs the term reads, `all` or `last`; None = no blocks.
        needs_whole_weights: True if the term reads weights outside the forward pass of the net.
        logged_values: values of the last step to log besides the loss, by name; detached scalars.
    """

    needs_teacher: ClassVar[bool] = False
    needs_whole_weights: ClassVar[bool] = False

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        check_number(f"{type(self).__name__}.weight", weight, 0)
        self.weight = weight
        self.blocks: str | None = None
        self.logged_values: dict[str, Tensor] = {}

    def prepare(self, net: nn.Module) -> None:
        """Check a net once, before the first step; by default, nothing is checked.

        Raises:
            UsageError: the net lacks tensors that the term reads.
        """

    @abstractmethod
    def forward(self, step: StepContext) -> Tensor:
        """The value of the term, a scalar, not yet multiplied by its weight."""


class CompositeLoss(nn.Module):
    """Sum of weight * term.

    Args:
        terms: terms by name; the value of each term is logged under its name.

    Attributes:
        needs_teacher: True if a term reads outputs of a teacher.
        blocks: the blocks whose outputs terms read, `all` or `last`; None = no blocks.

    Raises:
        UsageError: there are no terms, a term is not a `LossTerm`, terms read different blocks, or
            a name cannot be that of a module.
    """

    def __init__(self, terms: Mapping[str, LossTerm]) -> None:
        super().__init__()
        if not terms:
            raise UsageError("loss.terms={}: must have at least one term")
        for name, term in terms.items():
            if not isinstance(term, LossTerm):
                raise UsageError(
                    f"loss.terms.{name}: must be a subclass of qat.losses.LossTerm, "
                    f"not {type(term).__name__}"
                )
        blocks = {term.blocks for term in terms.values() if term.blocks}
        if len(blocks) > 1:
            raise UsageError(
                f"loss.terms: blocks are {sorted(blocks)}; must be the same for all terms that "
                "read blocks"
            )
        self.blocks = next(iter(blocks), None)
        self.needs_teacher = any(term.needs_teacher for term in terms.values())
        try:
            self.terms: Any = nn.ModuleDict(dict(terms))
        except (KeyError, TypeError) as error:
            raise UsageError(
                f"loss.terms: must have names that a module can have ({error})"
            ) from error

    def prepare(self, net: nn.Module) -> None:
        """Prepare every term; see `LossTerm.prepare`."""
        for term in self.terms.values():
            term.prepare(net)

    def logged_values(self) -> dict[str, Tensor]:
        """Values of the last step to log besides the loss, from all terms."""
        values: dict[str, Tensor] = {}
        for term in self.terms.values():
            values.update(term.logged_values)
        return values

    def forward(self, step: StepContext) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum, and the unweighted, detached value of each term by name."""
        weighted_values = []
        values = {}
        for name, term in self.terms.items():
            value = term(step)
            weighted_values.append(term.weight * value)
            values[name] = value.detach()
        return sum(weighted_values[1:], weighted_values[0]), values
