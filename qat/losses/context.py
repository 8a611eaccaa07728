"""What a loss term sees of a training step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn


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
        class_weights: (K,) factors of the classes in a loss on labels, None = all alike.
    """

    logits: Tensor | tuple[Tensor, Tensor]
    target: Tensor
    teacher_logits: Tensor | None
    net: nn.Module
    progress: float = 0.0
    features: Sequence[Tensor] = ()
    teacher_features: Sequence[Tensor] = ()
    class_weights: Tensor | None = None

    @property
    def heads(self) -> tuple[Tensor, Tensor]:
        """Logits of the class head and the distillation head; twice the same for a net with one head."""
        return self.logits if isinstance(self.logits, tuple) else (self.logits, self.logits)

    @property
    def prediction(self) -> Tensor:
        """(B, K) logits of the net as it is evaluated: the mean of its heads."""
        first, second = self.heads
        return first if first is second else (first + second) / 2
