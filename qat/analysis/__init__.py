"""What a net is like: evaluations of changed copies of it, tables and figures. Each analysis is a class and a yaml."""

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
