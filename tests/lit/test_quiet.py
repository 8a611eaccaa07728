"""Messages of libraries in a run. Oracle: a fresh process after the imports."""

import logging
import os
import warnings

import pytest

from qat.lit.quiet import quiet_libraries
from tests.commands import run_python

IMPORTS = """
import logging, os, sys, warnings
import qat.lit.compiled, qat.lit.loggers, qat.tasks.ptq, qat.tasks.train
from qat.kernels import operators
from torch._inductor.decomposition import decompositions
from torch.compiler import config

assert not os.environ.keys() & {"MLFLOW_DISABLE_TELEMETRY", "WANDB_ERROR_REPORTING"}
assert logging.getLogger("timm").level == logging.NOTSET
assert not [entry for entry in warnings.filters if "LeafSpec" in str(entry[1])]
assert not operators.DECOMPOSITIONS.keys() & decompositions.keys()
assert not config.cache_key_tag
# A run starts without what makes its page at the end.
assert "qat.data.sources" in sys.modules
assert not [name for name in sys.modules if name.startswith(("qat.report", "qat.analysis"))]
"""


@pytest.mark.long
def test_imports_change_no_global_state():
    names = ("MLFLOW", "WANDB", "TORCH", "PYTHONWARNINGS")
    unset = dict.fromkeys(name for name in os.environ if name.startswith(names))
    process = run_python("-c", IMPORTS, **unset)
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize(
    ("level", "message", "is_shown"),
    [
        (logging.INFO, "GPU available: False", False),
        (logging.INFO, "Time limit reached. Elapsed time is 0:00:01", True),
        (logging.WARNING, "a mistake", True),
    ],
)
def test_messages_that_repeat_the_first_lines_are_hidden(level, message, is_shown, caplog):
    with warnings.catch_warnings():
        quiet_libraries()
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    with caplog.at_level(logging.INFO):
        logger.log(level, message)
    assert (message in caplog.messages) is is_shown
