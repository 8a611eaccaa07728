"""Quantize a float net after its training: `python ptq.py ptq=fqvit_w4a8 ckpt=PATH`."""

from qat.launch import startup  # noqa: F401  (first: Ctrl-C)

# isort: split
import hydra
from omegaconf import DictConfig

from qat.cli import entry


@hydra.main(version_base="1.3", config_path="conf", config_name="ptq")
def main(cfg: DictConfig) -> float | None:
    """Hand the composed config to the task."""
    return entry.run("ptq", cfg)


if __name__ == "__main__":
    raise SystemExit(entry.command(main))
