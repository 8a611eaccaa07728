"""Train a model, quantization-aware or in float: `python train.py model=deit_t quant=ofq_2bit`."""

from qat.cli import commands

if __name__ == "__main__":
    raise SystemExit(commands.run("train"))
