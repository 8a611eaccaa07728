"""Train a vision transformer, quantization-aware or in float: `python train.py model=deit_t quant=ofq_2bit`."""

from qat.launch import startup  # noqa: F401  (first: Ctrl-C)

# isort: split
import hydra
from omegaconf import DictConfig

from qat.cli import entry


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig) -> float | None:
    """Hand the composed config to the task."""
    return entry.run("train", cfg)


if __name__ == "__main__":
    raise SystemExit(entry.command(main))
