"""What a net is like: evaluations of changed copies of it, tables and pictures. Each analysis is a class and a yaml."""

from qat.analysis.analysis import Advice, Analysis, Drawing, EvaluationPoint, Outcome, Row, StudiedNet, Table
from qat.analysis.images import ImageSet
from qat.analysis.ledger import Ledger
from qat.analysis.output import write_outcome
from qat.analysis.runner import measure

__all__ = [
    "Advice",
    "Analysis",
    "Drawing",
    "ImageSet",
    "Ledger",
    "Outcome",
    "EvaluationPoint",
    "Row",
    "StudiedNet",
    "Table",
    "measure",
    "write_outcome",
]
