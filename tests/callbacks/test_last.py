"""`last.ckpt`. Oracle: the steps at which it has to be there."""

import pytest
import torch

from qat.callbacks import LastCheckpoint
from tests.conftest import tiny
from tests.errors import usage_error


@pytest.mark.parametrize("every", [0, -1, 1.5, True, "2"])
def test_interval(every):
    with usage_error(rf"^checkpoint\.every_n_steps={every!r}: must be "):
        LastCheckpoint(every_n_steps=every)


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("every", "steps"),
    [
        (None, [5, 10]),
        (2, [2, 4, 5, 6, 8, 10]),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in ((5, [5, 10]), (1, [*range(1, 11)]))
        ),
    ],
)
def test_when(every, steps, tmp_path, monkeypatch):
    from lightning.pytorch import Trainer

    from qat.tasks.train import train

    saved = []
    save = Trainer.save_checkpoint

    def spy(trainer, path, *args, **kwargs):
        if str(path).endswith("last.ckpt"):
            saved.append(trainer.global_step)
        save(trainer, path, *args, **kwargs)

    monkeypatch.setattr(Trainer, "save_checkpoint", spy)
    every_n = "null" if every is None else every
    train(
        tiny(
            tmp_path / "run",
            "trainer.limit_train_batches=5",
            "trainer.max_epochs=2",
            f"checkpoint.every_n_steps={every_n}",
        )
    )
    assert saved == steps
    folder = tmp_path / "run" / "checkpoints"
    assert [
        torch.load(folder / n, weights_only=True)["global_step"]
        for n in ("last.prev.ckpt", "last.ckpt")
    ] == steps[-2:]
    assert sorted(p.name for p in folder.iterdir()) == ["best.ckpt", "last.ckpt", "last.prev.ckpt"]
