"""Lines of a run on its way to a terminal or a pipe. Oracle: what arrives there."""

import subprocess
import sys

from tests.conftest import ROOT

LINES = """
import logging, logging.config, sys, yaml
logging.config.dictConfig(yaml.safe_load(open("conf/hydra/job_logging/qat.yaml").read().replace("${hydra.job.name}", "job")
                                         .replace("${hydra.runtime.output_dir}", sys.argv[1])) | {"version": 1})
log = logging.getLogger("qat")
"""


def running(tmp_path, code, **settings):
    return subprocess.Popen([sys.executable, "-c", LINES + code, str(tmp_path)], cwd=ROOT, stderr=subprocess.PIPE, text=True, **settings)


def test_a_reader_that_stops_reading_costs_one_line(tmp_path):
    code = "import time\nfor i in range(100):\n    log.info('line %d', i)\n    time.sleep(0.001 * (i < 50))\n"
    process = running(tmp_path, code, stdout=subprocess.PIPE)
    assert process.stdout.readline() == "line 0\n"
    process.stdout.close()
    assert (process.stderr.read(), process.wait(timeout=60)) == ("", 0)
    (path,) = tmp_path.glob("*.log")
    lines = path.read_text().splitlines()
    assert sum("line " in line for line in lines) == 100
    assert sum("standard output was closed; the run goes on" in line for line in lines) == 1


def test_names_of_files_are_no_commands_to_a_terminal(tmp_path):
    code = "import os\nlog.info('left out %s', os.fsdecode(b'\\x1b[31m\\xff.png'))\n"
    process = running(tmp_path, code, stdout=subprocess.PIPE)
    out, errors = process.communicate(timeout=60)
    assert (out, errors) == ("left out \\x1b[31m\\xff.png\n", "")
    (path,) = tmp_path.glob("*.log")
    assert path.read_text().endswith("left out \\x1b[31m\\xff.png\n")
