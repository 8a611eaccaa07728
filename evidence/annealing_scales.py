"""`python -m evidence.annealing_scales`: StatsQ's scales during annealing, on digits.

OFQ (arXiv 2302.02210) computes a scale from all weights of a row, so a weight that flips between
two codes moves the scale of its row. A small ViT is trained at W2A2 with OFQ. From there it trains
further with confidence-guided annealing, and at the same learning rate with all weights free. The
script writes evidence/pages/figures/annealing-scales.svg and prints
evidence/logs/annealing-scales.log.
"""

from __future__ import annotations

import copy
import sys

import lightning
import matplotlib as mpl
import timm
import torch
from torch import nn

import qat
from evidence.claims.arms import ROOT
from evidence.pages.drawing import STYLE, for_dark_pages
from evidence.pages.page import PAGES
from evidence.speed.timing import table
from qat.analysis.analysis import PALETTE, panels
from qat.callbacks.cga import CGA
from qat.data import Digits
from qat.lit import QATModule
from qat.model.sites import iter_quantizers
from qat.utils.files import write_text

FIGURE = ROOT / PAGES / "figures" / "annealing-scales.svg"
SHAPE = {"img_size": 8, "patch_size": 4, "in_chans": 1, "num_classes": 10, "depth": 4}
EPOCHS = 30
LR = 1e-4


class ConstantRate(lightning.Callback):
    """Keeps the learning rate at `LR`, as annealing does."""

    def on_train_batch_start(self, trainer: lightning.Trainer, *_: object) -> None:
        """Set the learning rate of the next step."""
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = LR


class ScaleRecorder(lightning.Callback):
    """Records how far the scales of the weights in blocks are from their initial values.

    Attributes:
        changes: after each training step, the mean of |s / s_0 - 1| over all scales, in percent.
    """

    def __init__(self) -> None:
        self.changes: list[float] = []

    def on_train_start(self, trainer: lightning.Trainer, pl_module: QATModule) -> None:
        """Record the initial scales."""
        self.initial = scales(pl_module.net)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: QATModule, *_: object
    ) -> None:
        """Record the scales after a training step."""
        ratios = scales(pl_module.net) / self.initial
        self.changes.append(100 * float((ratios - 1).abs().mean()))


@torch.no_grad()
def scales(net: nn.Module) -> torch.Tensor:
    """All scales of StatsQ's weights in the blocks of a model, (n,)."""
    parts = []
    for site in iter_quantizers(net):
        if site.role == "weight" and site.quantizer.spec.quantizer == "statsq":
            parts.append(site.quantizer.scale_of(site.latent()).flatten())
    return torch.cat(parts)


def train(net: nn.Module, data: Digits, *callbacks: lightning.Callback, lr: float) -> None:
    """Train a model on digits; the order of the images depends only on the seed."""
    lightning.seed_everything(0, verbose=False)
    trainer = lightning.Trainer(
        max_epochs=EPOCHS,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(QATModule.for_data(net, data, lr=lr), data)


def main() -> None:
    """Write the figure and print the table."""
    lightning.seed_everything(0, verbose=False)
    data = Digits()
    net = timm.create_model("vit_tiny_patch16_224", **SHAPE)
    train(net, data, lr=1e-3)
    qat.convert(net, qat.recipe("ofq", bits=2), input_size=data.input_size)
    qat.initialize_scales(net, data.calibration_batches())
    train(net, data, lr=5e-4)

    rows = []
    with mpl.rc_context(mpl.rcParamsDefault | STYLE):
        figure, (axis,) = panels(height=3.0)
        axis.set(xlabel="training step", ylabel="mean change of scales, %", yscale="log")
        runs = {"annealed": CGA(epochs=EPOCHS, lr=LR), "all weights free": ConstantRate()}
        for number, (name, callback) in enumerate(runs.items()):
            recorder = ScaleRecorder()
            train(copy.deepcopy(net), data, callback, recorder, lr=LR)
            axis.plot(recorder.changes, color=PALETTE[number], label=name)
            rows.append([name, f"{recorder.changes[-1]:.3f}"])
        axis.legend(frameon=False)
        figure.savefig(FIGURE, transparent=True, metadata={"Date": None, "Creator": None})
    write_text(FIGURE, for_dark_pages(FIGURE.read_text(encoding="utf-8")))
    sys.stdout.write(table(["weights", "mean change of a scale at the end, %"], rows) + "\n")


if __name__ == "__main__":
    main()
