"""A deployable file of a quantized checkpoint, checked against it: `python export.py ckpt=PATH format=onnx`."""

from qat.tasks import startup  # noqa: F401  (first: Ctrl-C)

# isort: split
import hydra
from omegaconf import DictConfig

from qat.tasks import cli


@hydra.main(version_base="1.3", config_path="conf", config_name="export")
def main(cfg: DictConfig) -> float | None:
    """Hand the composed config to the task."""
    return cli.run("export", cfg)


if __name__ == "__main__":
    raise SystemExit(cli.command(main))
