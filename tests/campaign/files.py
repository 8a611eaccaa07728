"""Commands on files that are wrong: what is tried, in which order, and what is no mistake."""

import copy
import functools
import itertools
import shutil
from dataclasses import dataclass
from typing import Any

from omegaconf import OmegaConf, open_dict

from tests.campaign.checkpoints import STOPPED, UNREADABLE, WRONG, cut_safetensors
from tests.conftest import compose, tiny

COMMANDS = ("eval", "train", "ptq", "analyze", "export")
TASKS = {"eval": "evaluate"}
# A float net has no input_size of its own, and a training run its own data.
ALLOWED = {
    *(("ptq", f"input_size={value}") for value in ("null", "[1,80,80]", "[3,8,8]")),
    *(("train", name) for name in WRONG if name.startswith("data") and name not in {"data=3", "data=[]"}),
}


@dataclass(frozen=True)
class FileCase:
    """A command on a file.

    Attributes:
        told: one of these has to be in the line.
    """

    name: str
    command: str
    cfg: Any
    told: tuple[str, ...]

    @property
    def task(self):
        return TASKS.get(self.command, self.command)


@functools.cache
def _composed(command, *overrides):
    return tiny("run", *overrides) if command == "train" else compose(command, "run_dir=run", *overrides)


def composed(command, run, overrides=(), /, **values):
    """A config that differs from others in some values alone: composing one takes longer than most of these cases."""
    cfg = copy.deepcopy(_composed(command, *overrides))
    with open_dict(cfg):
        for key, value in {"run_dir": run, **values}.items():
            OmegaConf.update(cfg, key, str(value))
    return cfg


def config(command, path, run):
    """The config of a command that reads a checkpoint."""
    small = ("data.calibration_images=8", "data.batch_size=4")
    more = {"train": small, "ptq": ("data.calibration_images=8", "ptq.batch=4"), "analyze": ("analysis=robustness", "images=8")}
    return composed(command, run, more.get(command, ()), ckpt=path)


def checkpoint_cases(folder, float_ckpt, quantized_ckpt, commands=COMMANDS):
    """Files of `UNREADABLE` and `WRONG` one after the other, each with one command in turns, or with all."""
    turns = itertools.cycle(COMMANDS)
    for number, (name, change) in enumerate({**UNREADABLE, **WRONG}.items()):
        for command in commands or [next(turns)]:
            if command == "ptq" and name.startswith("recipe"):  # the float file has none
                continue
            path = folder / f"file{number}-{command}.ckpt"
            shutil.copy(float_ckpt if command == "ptq" else quantized_ckpt, path)
            change(path)
            yield FileCase(name, command, config(command, path, folder / f"run{number}-{command}"), (str(path), "data."))
            path.unlink()
    for setting in ("ckpt", "model.weights"):
        path = folder / "a.safetensors"
        cut_safetensors(path)
        cfg = composed("train", folder / f"run-{setting}", **{setting: path})
        yield FileCase("safetensors cut", "train", cfg, (f"{setting}='{path}'",))


def resume_cases(folder, run, unreadable=tuple(UNREADABLE)):
    """Runs whose last.ckpt is wrong, and which are to go on."""
    for number, (name, change) in enumerate({**{one: UNREADABLE[one] for one in unreadable}, **STOPPED}.items()):
        copied = folder / f"stopped{number}"
        shutil.copytree(run, copied)
        for other in (copied / "checkpoints").glob("*.prev.ckpt"):
            other.unlink()
        change(copied / "checkpoints" / "last.ckpt")
        choices = ("quant=ofq_4bit", "callbacks=[default,oscillation]", "resume=true", "trainer.max_epochs=3")
        yield FileCase(f"resume: {name}", "train", composed("train", copied, choices), ("resume",))


def judged(case, outcome, folder):
    """What is wrong with an outcome, in words; empty where nothing is."""
    if (folder / "made").exists():
        return "code in the file was run"
    if outcome.kind == "reached":
        return "" if (case.command, case.name) in ALLOWED else "accepted in silence"
    if outcome.kind != "refused":
        return f"{outcome.kind}, not one line"
    return "" if any(told in outcome.message for told in case.told) else "neither the file nor its setting is named"
