"""Quantize a float net after its training: `python ptq.py ptq=fqvit_w4a8 ckpt=PATH`."""

from qat.cli import commands

if __name__ == "__main__":
    raise SystemExit(commands.run("ptq"))
