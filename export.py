"""A file to deploy, checked against its checkpoint: `python export.py ckpt=PATH format=onnx`."""

from qat.cli import commands

if __name__ == "__main__":
    raise SystemExit(commands.run("export"))
