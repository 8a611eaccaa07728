"""Accuracy of a checkpoint, rebuilt from the file alone: `python eval.py ckpt=PATH`."""

from qat.cli import commands

if __name__ == "__main__":
    raise SystemExit(commands.run("eval"))
