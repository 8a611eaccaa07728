"""What is done about a fault: stop, leave the step out, or go back to the last checkpoint."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from qat.errors import UsageError
from qat.spec import check_choice, check_whole

log = logging.getLogger(__name__)

POLICIES = ("stop", "skip", "rollback")


@dataclass(frozen=True)
class Fault:
    """One thing that went wrong.

    Attributes:
        step: the optimizer step, counted from 0.
        what: a clause that names step and statistic.
        cause: the first thing that is not finite; "" where that says nothing.
        seen: the step under way, or just taken, when it was seen.
        is_undone: the step changes nothing if nobody stops.
    """

    step: int
    what: str
    cause: str
    seen: int
    is_undone: bool = True

    def __str__(self) -> str:
        """The clause, and the cause."""
        return f"{self.what}; first not finite: {self.cause}" if self.cause else self.what


class RollBack(UsageError):
    """Training has to go on from a checkpoint; whoever called `fit` does that, else it is a stop.

    Args:
        fault: why.
        path: the checkpoint.
    """

    def __init__(self, fault: Fault, path: Path) -> None:
        super().__init__(f"training stopped: {fault}; {path} is from before")
        self.fault, self.path = fault, path


class Response:
    """Counts faults and acts on them.

    Args:
        policy: one of `POLICIES`.
        max_in_a_row: this many steps left out on end stop the run.
        max_rollbacks: a further one stops the run.

    Attributes:
        until: steps below this one are repeated behind a rollback.
        path: the checkpoint to go back to; None = there is none.

    Raises:
        UsageError: a setting is out of range.
    """

    def __init__(self, policy: str, max_in_a_row: int, max_rollbacks: int) -> None:
        check_choice("callbacks.finite.policy", policy, POLICIES)
        check_whole("callbacks.finite.max_in_a_row", max_in_a_row, 1)
        check_whole("callbacks.finite.max_rollbacks", max_rollbacks, 1)
        self.policy, self.max_in_a_row, self.max_rollbacks = policy, max_in_a_row, max_rollbacks
        self.skipped = self.skipped_by_scaler = self.in_a_row = self.rollbacks = self.until = 0
        self.path: Path | None = None

    def repeats(self, step: int) -> bool:
        """True if a step is repeated behind a rollback."""
        return step < self.until

    def skips(self, step: int) -> bool:
        """True if a step is left out where it is at fault."""
        return self.policy == "skip" or self.repeats(step)

    def to(self, fault: Fault) -> None:
        """Count a fault whose step is left out; else end this fit.

        Raises:
            RollBack: under that policy.
            UsageError: the run stops.
        """
        if fault.is_undone and self.skips(fault.step):
            self.skipped += 1
            log.warning("step %d left out: %s", fault.step, fault)
            self._one_more(fault, "left out")
            return
        if self.policy != "rollback" or self.path is None:
            stop(fault)
        if self.rollbacks >= self.max_rollbacks:
            stop(fault, f"rolled back {self.rollbacks} times before (callbacks.finite.max_rollbacks)")
        self.rollbacks += 1
        self.until = max(self.until, fault.seen + 1)
        raise RollBack(fault, self.path)

    def scaler_skipped(self, fault: Fault) -> None:
        """Count a step that the gradient scaler leaves out: how it finds its scale, unless it goes on.

        Raises:
            UsageError: too many on end.
        """
        self.skipped_by_scaler += 1
        self._one_more(fault, "skipped by the gradient scaler")

    def went_well(self) -> None:
        """A step counts."""
        self.in_a_row = 0

    def begin(self) -> None:
        """A fit begins; that it repeats steps, and how often that was, stays known."""
        self.skipped = self.skipped_by_scaler = self.in_a_row = 0

    def figures(self) -> dict[str, float]:
        """What to log: counts that are not zero."""
        counts = {"skipped": self.skipped, "skipped_by_scaler": self.skipped_by_scaler, "rollbacks": self.rollbacks}
        return {f"faults/{name}": float(count) for name, count in counts.items() if count}

    def state_dict(self) -> dict[str, Any]:
        """The counts."""
        names = ("skipped", "skipped_by_scaler", "in_a_row", "rollbacks")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with them; a rollback takes back all but how many there were."""
        self.skipped, self.skipped_by_scaler, self.in_a_row = state["skipped"], state["skipped_by_scaler"], state["in_a_row"]
        self.rollbacks = max(self.rollbacks, state["rollbacks"])

    def _one_more(self, fault: Fault, done: str) -> None:
        self.in_a_row += 1
        if self.in_a_row >= self.max_in_a_row:
            stop(fault, f"{self.in_a_row} steps in a row were {done} (callbacks.finite.max_in_a_row)")


def stop(fault: Fault, why: str = "") -> NoReturn:
    """End the run.

    Raises:
        UsageError: always.
    """
    before = "no step was taken: look at the data and the weights it starts from"
    later = "checkpoints are from before; a lower optimizer.lr or trainer.gradient_clip_val=1 may help"
    raise UsageError("; ".join(part for part in (f"training stopped: {fault}", why, later if fault.step else before) if part))
