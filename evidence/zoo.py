"""`python -m evidence.zoo --root CIFAR10`: write the models in `zoo/`, each with a model card.

The models are checkpoints of runs; `python -m evidence one C16/tensor_w4a4 --root CIFAR10` trains a
missing checkpoint, and replaces its record. Results in a card are measured with `eval.py` on the
file itself.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import qat
from evidence.claims.arms import ROOT, Arms
from evidence.claims.run import command_line
from qat.model.pretrained import save_pretrained
from qat.utils.files import write_text

ZOO = ROOT / "zoo"
# The run of each model: claim and arm.
NETS = {
    "cifar10_w2a2": "AIM/seq_w2",
    "cifar10_w4a4": "C16/tensor_w4a4",
    "cifar10_w8a8": "C16/tensor_w8a8",
}


def main() -> None:
    """Write the named models."""
    parser = argparse.ArgumentParser(prog="python -m evidence.zoo", description=__doc__)
    parser.add_argument(
        "names", nargs="*", default=list(NETS), help=f"models: {', '.join(NETS)}; none = all"
    )
    parser.add_argument("--root", required=True, help="folder of CIFAR-10")
    args = parser.parse_args()
    for name in args.names:
        write_model(name, args.root)


def write_model(name: str, root: str) -> None:
    """Write `zoo/NAME.safetensors` and its card."""
    arms = Arms()
    arm = arms[NETS[name]]
    net = qat.load(ROOT / arms.run_dir(arm, 0) / "checkpoints" / "best.ckpt")
    target = ZOO / f"{name}.safetensors"
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(save_pretrained(net, folder) / "model.safetensors", target)
        save_pretrained(
            net,
            folder,
            results=measured(target, root, Path(folder) / "eval"),
            license="mit",
            source=f"zoo/{target.name}",
        )
        card = Path(folder, "README.md").read_text(encoding="utf-8")
    command = shlex.join(command_line(arm.command, Path("RUN"), arms.settings(arm, 0), "FOLDER"))
    write_text(target.with_suffix(".md"), f"{card}\n## Training\n\n```text\n{command}\n```\n")


def measured(path: Path, root: str, run_dir: Path) -> dict[str, object]:
    """Evaluate a file, and return the content of `results.json`."""
    command = [
        sys.executable,
        ROOT / "eval.py",
        f"ckpt={path}",
        f"data.root={root}",
        f"run_dir={run_dir}",
        "report=false",
    ]
    subprocess.run(command, cwd=ROOT, check=True)
    results: dict[str, object] = json.loads((run_dir / "results.json").read_text(encoding="utf-8"))
    return results


if __name__ == "__main__":
    main()
