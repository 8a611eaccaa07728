"""Mistakes as they are typed: the root scripts with Hydra in front, exit codes, what is on the terminal. Oracle: one line, no traceback.

Most run in this process, where what takes a command's time, its imports, is done; a few are processes of their own.
"""

import re
import subprocess
import sys

import pytest

from tests.commands import typed
from tests.conftest import ROOT, TINY

SMALL = ("data.calibration_images=8", "data.batch_size=4", "run_dir=run")
TYPED = [
    ("train.py", ["data.num_workers=1000000000000"], "data.num_workers=1000000000000: must be an integer from 0 to 256"),
    ("train.py", ["trainer.devices=100000"], "trainer.devices=100000: must be up to 1024 processes on a machine"),
    ("train.py", ["model.args.drop_path_rate=1.5"], "model.args.drop_path_rate=1.5: must be a number from 0 to below 1"),
    ("train.py", ["model.args.class_token=maybe"], "model.args.class_token='maybe': must be true or false"),
    ("train.py", ["model.args.global_pool=''"], "model.args.global_pool: the net gives (1, 4, 10) for an image"),
    ("train.py", ["model.args.num_heads=-1"], "model.args.num_heads=-1: must be an integer of at least 1"),
    ("train.py", ["+model.pretrainde=true"], "config: Key 'pretrainde' not in 'Model' (model.pretrainde)"),
    ("train.py", ["ckpt="], "ckpt='': must be a path; null = none"),
    ("train.py", ["ckpt_format=zip"], "ckpt_format='zip': must be one of auto, qat, timm, ofq"),
    ("train.py", ["ckpt_bits=4"], "ckpt_bits=4: only for files of the paper's code (ckpt_format=ofq); set ckpt=FILE"),
    ("train.py", ["~optimizer.weight_decay"], "optimizer.weight_decay is missing"),
    ("train.py", ["optimizer.eps=0"], "optimizer.eps=0: must be a number above 0 to below 1"),
    ("train.py", ["+data.colour=3"], "data.colour: must be one of image_size"),
    ("train.py", ["+loss.colour=3"], "config: Key 'colour' not in 'Loss' (loss.colour)"),
    ("train.py", ["callbacks=[default,ema]", "callbacks.ema.decay=nan"], "callbacks.ema.decay=nan: must be a number from 0 to 1"),
    ("train.py", ["logger=wandb", "logger.wandb.project=3"], "logger.wandb.project=3: must be a text that is not empty"),
    ("train.py", ["~model.init"], "config: Key 'init' is not in struct (model.init)"),
    ("eval.py", ["ckpt=nowhere.ckpt"], "ckpt='nowhere.ckpt': no such file"),
    ("eval.py", ["predict=nowhere"], "predict='nowhere': no such file or folder"),
    ("ptq.py", ["ckpt={best}", "search=evolution", "search.targets=3"], "search.targets=3: must be a list of globs such as attn.qkv"),
    ("ptq.py", ["ckpt={best}", "search=evolution", "search.targets=[nope]"], "search.targets=['nope']: no block has such a scale"),
    ("analyze.py", ["analysis=weights", "analysis.layers=3", "ckpt={best}"], "analysis.layers=3: must be a list of globs"),
    ("analyze.py", ["analysis=cost", "ckpt=3"], "ckpt=3: must be a path"),
]  # fmt: skip


@pytest.fixture
def at_home(tmp_path, float_run):
    """A folder to type in, and a checkpoint."""
    return tmp_path, str(float_run / "checkpoints" / "best.ckpt")


@pytest.mark.long
@pytest.mark.parametrize(("script", "arguments", "line"), TYPED, ids=[" ".join((script, *rest)) for script, rest, _ in TYPED])
def test_a_line_and_exit_code_1(at_home, script, arguments, line):
    folder, best = at_home
    small = (*TINY, *SMALL) if script == "train.py" else SMALL[-1:]
    code, printed = typed(script, *small, *(one.replace("{best}", best) for one in arguments), cwd=folder)
    assert code == 1
    assert line in printed
    assert len(re.findall(r"error: ", printed)) == 1
    assert "Traceback" not in printed
    assert not list(folder.rglob("*.ckpt"))


@pytest.mark.parametrize("run_dir", ["3", "''", "/proc/nowhere/run"])
def test_a_run_dir_that_is_none(tmp_path, run_dir):
    code, printed = typed("eval.py", f"run_dir={run_dir}", cwd=tmp_path)
    assert code not in {0, None}
    assert "error: run_dir=" in f"{code}{printed}"
    assert not list(tmp_path.iterdir())


@pytest.mark.long
@pytest.mark.slow
def test_processes_of_their_own(tmp_path):
    """As many at once as there are commands here; the imports of each take seconds."""
    commands = {
        ("train.py", "data.num_workers=-1"): "data.num_workers=-1: must be an integer from 0 to 256",
        ("ptq.py", "ckpt=nowhere"): "ckpt='nowhere': no such file",
    }
    started = [
        subprocess.Popen(
            [sys.executable, str(ROOT / script), argument, f"run_dir={tmp_path}/{script}"],
            cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for script, argument in commands
    ]  # fmt: skip
    for process, line in zip(started, commands.values(), strict=True):
        printed, _ = process.communicate(timeout=120)
        assert process.returncode == 1
        assert line in printed
        assert "Traceback" not in printed
