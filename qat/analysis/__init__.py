"""Analyses of models, with tables and figures. Each analysis is a class and a yaml file."""

from qat.analysis.analysis import (
    NO_IMAGES,
    Analysis,
    Drawing,
    EvaluationPoint,
    ImageSet,
    Outcome,
    Row,
    StudiedNet,
    Table,
    measure,
    write_outcome,
)

__all__ = [
    "NO_IMAGES",
    "Analysis",
    "Drawing",
    "EvaluationPoint",
    "ImageSet",
    "Outcome",
    "Row",
    "StudiedNet",
    "Table",
    "measure",
    "write_outcome",
]
