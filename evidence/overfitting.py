"""`python -m evidence.overfitting data.root=CIFAR10`: fitness of images that the search never sees.

Evol-Q (arXiv 2308.10814) says that infoNCE overfits calibration images less than other losses. The
small float model of the claims is calibrated at W4A4 and searched with each fitness on 100
calibration images. After each block search, the same fitness is computed on 500 validation
images. The script writes evidence/pages/figures/overfitting.svg and prints
evidence/logs/overfitting.log.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence

import hydra
import matplotlib as mpl
import numpy as np
import torch
from torch import Tensor, nn

import qat
from evidence.claims.arms import ROOT
from evidence.pages.drawing import STYLE, for_dark_pages
from evidence.pages.page import PAGES
from evidence.speed.timing import table
from qat.analysis.analysis import PALETTE, panels
from qat.data import Cifar10
from qat.functional.infonce import FITNESSES, logit_fitness
from qat.ptq.search import SearchSettings, logits_of, search
from qat.tasks.conf import CONF
from qat.tasks.ptq_start import build_ptq_recipe
from qat.utils.files import write_text

FIGURE = ROOT / PAGES / "figures" / "overfitting.svg"
SMALL_NET = ROOT / "evidence/weights/START/float-seed0.pt"
HELD_OUT = 500
BATCH = 100
SEEDS = (0, 1, 2)
SETTINGS = (
    "ptq=fqvit_w4a4",
    "ptq.bias_correction=true",
    f"ptq.batch={BATCH}",
    f"data.calibration_images={BATCH}",
    "data=cifar10",
    "data.patch_size=8",
    "data.num_workers=0",
)


class FitnessCurve:
    """Fitness of a net on some images, as its scales change.

    Args:
        net: the quantized net.
        float_net: the float net.
        batches: images (B, C, H, W) each.
        settings: settings of the search.
    """

    def __init__(
        self,
        net: nn.Module,
        float_net: nn.Module,
        batches: Sequence[Tensor],
        settings: SearchSettings,
    ) -> None:
        self.net = net
        self.batches = batches
        self.float_logits = [float_net(batch) for batch in batches]
        self.loss = logit_fitness(settings.fitness, settings.temperature)
        self.values: list[float] = []
        self.record()

    def record(self) -> float:
        """Record the mean fitness over the batches with the current scales, and return it."""
        losses = []
        for batch, target in zip(self.batches, self.float_logits, strict=True):
            losses.append(self.loss(logits_of(self.net, batch, BATCH), target))
        self.values.append(float(torch.stack(losses).double().mean()))
        return self.values[-1]

    def changes(self) -> list[float]:
        """Changes of the fitness since the first record, in percent."""
        return [100 * (value / self.values[0] - 1) for value in self.values]


@torch.no_grad()
def run(fitness: str, seed: int, arguments: list[str]) -> tuple[list[float], list[float]]:
    """Search with one fitness.

    Returns:
        Changes of the fitness after each block search, in percent: on calibration images, and on
        validation images.
    """
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = hydra.compose("ptq", overrides=[*SETTINGS, f"seed={seed}", *arguments])
    data_settings = {name: value for name, value in cfg.data.items() if name != "_target_"}
    data = Cifar10(**data_settings)
    float_net = qat.load(SMALL_NET).eval()
    recipe = build_ptq_recipe(cfg)
    net = qat.convert(copy.deepcopy(float_net), recipe, input_size=data.input_size).eval()
    batches = data.calibration_batches(BATCH)
    qat.ptq.calibrate(net, batches)
    settings = SearchSettings(fitness=fitness, seed=seed, reference_selection=True)
    images = torch.cat([images for images, _ in data.sample("val", HELD_OUT)])
    calibration = FitnessCurve(net, float_net, batches, settings)
    held_out = FitnessCurve(net, float_net, images.split(BATCH), settings)

    def record() -> float:
        calibration.record()
        return held_out.record()

    # `search` calls `validate` after each block search; which scales it selects is not used.
    search(net, batches, calibration.float_logits, settings, validate=record)
    return calibration.changes(), held_out.changes()


def main(arguments: list[str]) -> None:
    """Write the figure and print the table."""
    rows = []
    with mpl.rc_context(mpl.rcParamsDefault | STYLE):
        figure, axes = panels(1, len(FITNESSES), height=3.0)
        for axis, fitness in zip(axes, FITNESSES, strict=True):
            runs = np.array([run(fitness, seed, arguments) for seed in SEEDS])
            axis.set(title=fitness, xlabel="block searches")
            for number, name in enumerate(("calibration images", "validation images")):
                axis.plot(runs[:, number].mean(0), color=PALETTE[number], label=name)
            last = runs[..., -1]
            row = [fitness]
            for values in last.T:
                row.append(f"{values.mean():+.2f} ± {values.std(ddof=1):.2f}")
            rows.append(row)
        axes[0].set_ylabel("change of the fitness, %")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=2, fontsize=8, frameon=False)
        figure.savefig(FIGURE, transparent=True, metadata={"Date": None, "Creator": None})
    write_text(FIGURE, for_dark_pages(FIGURE.read_text(encoding="utf-8")))
    head = ["fitness", "change on calibration images, %", "on validation images, %"]
    sys.stdout.write(table(head, rows) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
