"""A loss is a weighted sum of named terms, each of what it sees of a training step; a new term is one class and a few lines of yaml."""

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
    """One training step.

    Attributes:
        logits: (B, K), or the pair (class head, distillation head) of a distilled net in training.
        target: (B,) class ids or (B, K) probabilities.
        teacher_logits: (B, K), None without a teacher.
        net: the net in training, for terms on its weights.
        progress: share of the run's optimizer steps that are done, 0 to 1.
        features: what each block of the net gave, if a term asks for it.
        teacher_features: what each block of the teacher gave, if a term asks for it.
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
        """Logits of the class head and the distillation head; twice the same for a net with one head."""
        return self.logits if isinstance(self.logits, tuple) else (self.logits, self.logits)

    @property
    def prediction(self) -> Tensor:
        """(B, K) logits of the net as it is evaluated: the mean of its heads."""
        first, second = self.heads
        return first if first is second else (first + second) / 2


class LossTerm(nn.Module, ABC):
    """Maps a `StepContext` to a scalar.

    Args:
        weight: factor in the sum, >= 0.

    Attributes:
        needs_teacher: True if the term reads `teacher_logits` or `teacher_features`.
        blocks: whose outputs the term reads, `all` or `last`; None = of no block.
        needs_whole_weights: True if the term reads weights outside the net's forward pass.
        watched: values of the last step that are logged beside the term's own, by name; detached scalars.
    """

    needs_teacher: ClassVar[bool] = False
    needs_whole_weights: ClassVar[bool] = False

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        check_number(f"loss term {type(self).__name__}: weight", weight, 0)
        self.weight = weight
        self.blocks: str | None = None
        self.watched: dict[str, Tensor] = {}

    def prepare(self, net: nn.Module) -> None:
        """Find in the net what the term works on, once, before the first step.

        Raises:
            UsageError: there is nothing of the kind.
        """

    @abstractmethod
    def forward(self, step: StepContext) -> Tensor:
        """Scalar, not yet weighted."""


class CompositeLoss(nn.Module):
    """Sum of weight * term.

    Args:
        terms: terms by the name under which their value is logged.

    Attributes:
        needs_teacher: True if a term follows a teacher.
        blocks: whose outputs a term compares with the teacher's, `all` or `last`; None = of no block.

    Raises:
        UsageError: no term, one of another class, or two that read other blocks.
    """

    def __init__(self, terms: Mapping[str, LossTerm]) -> None:
        super().__init__()
        if not terms:
            raise UsageError("loss.terms={}: must have at least one term")
        for name, term in terms.items():
            if not isinstance(term, LossTerm):
                raise UsageError(
                    f"loss.terms.{name}: {type(term).__name__} is not a subclass of qat.losses.LossTerm"
                )
        blocks = {term.blocks for term in terms.values() if term.blocks}
        if len(blocks) > 1:
            raise UsageError(
                f"loss.terms: blocks are {sorted(blocks)}; must be the same for all terms that read blocks"
            )
        self.blocks = next(iter(blocks), None)
        self.needs_teacher = any(term.needs_teacher for term in terms.values())
        try:
            self.terms: Any = nn.ModuleDict(dict(terms))
        except (KeyError, TypeError) as error:
            raise UsageError(
                f"loss.terms: a term has a name that a module cannot have: {error}"
            ) from error

    def prepare(self, net: nn.Module) -> None:
        """Have every term find what it works on; see `LossTerm.prepare`."""
        for term in self.terms.values():
            term.prepare(net)

    def watched(self) -> dict[str, Tensor]:
        """What the terms of the last step have to log beside their values."""
        return {name: value for term in self.terms.values() for name, value in term.watched.items()}

    def forward(self, step: StepContext) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum, and each term's unweighted value (detached) by name."""
        values = {name: term(step) for name, term in self.terms.items()}
        weighted = [self.terms[name].weight * value for name, value in values.items()]
        return sum(weighted[1:], weighted[0]), {
            name: value.detach() for name, value in values.items()
        }
