"""What a checkpoint is like: `python analyze.py ckpt=PATH analysis=robustness`."""

from qat.cli import commands

if __name__ == "__main__":
    raise SystemExit(commands.run("analyze"))
