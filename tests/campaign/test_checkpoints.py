"""Checkpoints that are damaged, of another net, lie, or would run code. Oracle: one line that names setting and file, and no file made."""

import shutil

import pytest
import torch

from qat.errors import UsageError
from qat.tasks.evaluate import evaluate
from qat.tasks.train import train as task
from tests.campaign.checkpoints import STOPPED, UNREADABLE, WRONG, cut_safetensors
from tests.conftest import compose, tiny, train
from tests.errors import usage_error


@pytest.fixture(scope="module")
def tracked(tmp_path_factory, float_run):
    """A quantized run with `callbacks=[default,oscillation]`."""
    run = tmp_path_factory.mktemp("tracked") / "run"
    return train(
        run,
        "quant=ofq_4bit",
        "callbacks=[default,oscillation]",
        f"ckpt={float_run}/checkpoints/best.ckpt",
    )


@pytest.mark.long
@pytest.mark.parametrize("name", [*UNREADABLE, *WRONG])
def test_a_checkpoint_that_is_wrong_is_one_line(tmp_path, tracked, name):
    path = tmp_path / "file.ckpt"
    shutil.copy(tracked / "checkpoints" / "last.ckpt", path)
    (UNREADABLE | WRONG)[name](path)
    with pytest.raises(UsageError) as caught:
        evaluate(compose("eval", f"run_dir={tmp_path}/run", f"ckpt={path}"))
    assert str(path) in str(caught.value) or "data." in str(caught.value)
    assert not (tmp_path / "made").exists(), "code in the file was run"


def test_a_safetensors_file_that_is_cut_is_one_line(tmp_path, refused):
    cut_safetensors(tmp_path / "a.safetensors")
    for setting in ("ckpt", "model.weights"):
        line = refused("train", tiny(tmp_path / "run", f"{setting}={tmp_path}/a.safetensors"))
        assert f"{setting}='{tmp_path}/a.safetensors'" in line


GOES_ON = (
    "quant=ofq_4bit",
    "callbacks=[default,oscillation]",
    "resume=true",
    "trainer.max_epochs=3",
)


@pytest.mark.long
@pytest.mark.parametrize("name", [*STOPPED, "cut to 95 %", "torch with a payload", "a tensor"])
def test_a_run_does_not_go_on_from_one_that_is_wrong(tmp_path, tracked, name):
    run = shutil.copytree(tracked, tmp_path / "run")
    for other in (run / "checkpoints").glob("*.prev.ckpt"):
        other.unlink()
    (STOPPED | UNREADABLE)[name](run / "checkpoints" / "last.ckpt")
    with usage_error(r"resume"):
        task(tiny(run, *GOES_ON))


@pytest.mark.long
def test_a_run_does_not_go_on_with_another_optimizer(tmp_path, refused, tracked):
    """Torch would take the moments of AdamW for those of SGD."""
    assert "optimizer.opt='sgd' (the run had 'adamw')" in refused(
        "train", tiny(tracked, *GOES_ON, "optimizer=sgd")
    )
    moved = shutil.copytree(tracked, tmp_path / "run")
    (moved / "config.yaml").unlink()  # the checkpoint says so as well
    assert "optimizer.opt='sgd' (the run had 'adamw')" in refused(
        "train", tiny(moved, *GOES_ON, "optimizer=sgd")
    )
    path = moved / "checkpoints" / "last.ckpt"
    content = torch.load(path, weights_only=True)
    del content["qat"][
        "run"
    ]  # as in a file of an older version, of which the optimizer's state is left
    torch.save(content, path)
    line = refused("train", tiny(moved, *GOES_ON, "optimizer=sgd"))
    assert "last.ckpt has another optimizer or other parameter groups; use ckpt=PATH" in line
