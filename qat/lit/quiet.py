"""Hide unneeded messages of libraries in the log of a run."""

from __future__ import annotations

import logging
import warnings

_RANK_ZERO = "lightning.pytorch.utilities.rank_zero"
_WARNING_LEVEL = ("lightning.pytorch", "lightning.fabric", "timm")
# Loggers that report the early end of a run.
_INFO_LEVEL = ("lightning.pytorch.callbacks.early_stopping", _RANK_ZERO)
_IGNORED_WARNINGS = (
    ".*LeafSpec.*is deprecated",  # Lightning's own use of torch
    ".*all_gather.*is deprecated",  # Lightning's own use of torch
    ".*does not have many workers",  # small datasets are in memory
    "Checkpoint directory .* exists and is not empty",  # as in every resumed run
    "You requested to overfit but enabled .* dataloader shuffling",  # Lightning turns it off
    "The `srun` command is available",  # on a login node, or in processes that qat starts
    "FSDP2-wrapped module .* returned a view tensor",  # timm's models never write to the view
    ".*number of training batches .* is smaller than the logging interval",
)


def quiet_libraries() -> None:
    """Hide most information that Lightning and timm log, and warnings that need no action.

    Other log messages of Lightning are shown once, by the handlers of the root logger.
    """
    logging.getLogger("lightning").handlers.clear()
    for name in _WARNING_LEVEL:
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in _INFO_LEVEL:
        logging.getLogger(name).setLevel(logging.INFO)
    logging.getLogger(_RANK_ZERO).addFilter(_is_important)
    for message in _IGNORED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)


def _is_important(record: logging.LogRecord) -> bool:
    has_time_limit = record.getMessage().startswith("Time limit reached")
    return record.levelno > logging.INFO or has_time_limit
