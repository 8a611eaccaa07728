"""What a net is like: evaluations of changed copies of it, tables and figures. Each analysis is a class and a yaml."""

from qat.analysis.analysis import NO_IMAGES, Advice, Analysis, Drawing, EvaluationPoint, Outcome, Row, StudiedNet, Table
from qat.analysis.images import ImageSet
from qat.analysis.output import write_outcome
from qat.analysis.runner import measure

__all__ = [
    "NO_IMAGES",
    "Advice",
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
