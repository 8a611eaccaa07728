"""A deployable file of a quantized checkpoint, checked against it: `python export.py ckpt=PATH format=onnx`."""

from qat.cli import commands

if __name__ == "__main__":
    raise SystemExit(commands.run("export"))
