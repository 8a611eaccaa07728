"""`python -m tests.gpu [options of pytest]`: are kernels, nets and steps right on this machine's GPU? evidence/gpu/README.md.

Needs torch, timm, numpy and pytest, with Triton for the kernels; neither Hydra nor Lightning. Without a GPU the kernels run in Triton's
interpreter, steps and files on the CPU, and the last line says what did not run.
"""

import os
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent


def main() -> int:
    """Run the tests of this folder alone, and return pytest's exit code."""
    has_device = torch.cuda.is_available()
    if not has_device:
        os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # Hydra brings one
    import pytest

    # The configuration above this folder asks for plugins, its fixtures for Hydra.
    alone = [
        "-c",
        os.devnull,
        f"--rootdir={HERE.parents[1]}",
        f"--confcutdir={HERE}",
        "-p",
        "no:cacheprovider",
    ]
    sys.stdout.write(
        f"torch {torch.__version__}, {torch.cuda.get_device_name() if has_device else 'no CUDA device'}\n"
    )
    sys.stdout.flush()
    return pytest.main([*alone, "-q", "-W", "ignore", str(HERE), *sys.argv[1:]])


if __name__ == "__main__":
    raise SystemExit(main())
