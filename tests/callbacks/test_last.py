"""`last.ckpt`. Oracle: the steps after which it must exist."""

import pytest
import torch
from lightning.pytorch import Trainer

from tests.conftest import train


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("every", "steps"),
    [
        ("null", [5, 10]),
        (2, [2, 4, 5, 6, 8, 10]),
        (5, [5, 10]),
        (1, [*range(1, 11)]),
    ],
)
def test_when(every, steps, tmp_path, monkeypatch):
    saved = []
    save = Trainer.save_checkpoint

    def spy(trainer, path, *args, **kwargs):
        if str(path).endswith("last.ckpt"):
            saved.append(trainer.global_step)
        save(trainer, path, *args, **kwargs)

    monkeypatch.setattr(Trainer, "save_checkpoint", spy)
    settings = ("trainer.limit_train_batches=5", "trainer.max_epochs=2")
    run = train(tmp_path / "run", *settings, f"checkpoint.every_n_steps={every}")
    assert saved == steps
    folder = run / "checkpoints"
    assert [
        torch.load(folder / n, weights_only=True)["global_step"]
        for n in ("last.prev.ckpt", "last.ckpt")
    ] == steps[-2:]
    assert sorted(p.name for p in folder.iterdir()) == ["best.ckpt", "last.ckpt", "last.prev.ckpt"]
