"""Checkpoints that are damaged, of another net, lie, or would run code. Oracle: one line that names setting and file, and no file made.

Each with one of the commands that read it, in turns.
"""

import shutil

import pytest
import torch

from tests.campaign.checkpoints import STOPPED, UNREADABLE, WRONG
from tests.campaign.files import checkpoint_cases, judged, resume_cases
from tests.campaign.running import attempt, no_steps
from tests.conftest import train


@pytest.fixture(scope="module")
def run_4bit_tracked(tmp_path_factory, float_run):
    """A quantized run with `callbacks=[default,oscillation]`."""
    return train(
        tmp_path_factory.mktemp("tracked") / "run",
        "quant=ofq_4bit",
        "callbacks=[default,oscillation]",
        f"ckpt={float_run}/checkpoints/best.ckpt",
    )


def wrong_outcomes(folder, cases):
    wrong, count = [], 0
    with no_steps():
        for case in cases:
            count += 1  # noqa: SIM113  (a file of a case is there only while it is its turn)
            outcome = attempt(case.task, case.cfg)
            found = judged(case, outcome, folder)
            if found:
                wrong.append(f"{case.command} {case.name}: {found}: {outcome.message[:200]}")
    return wrong, count


@pytest.mark.long
def test_a_checkpoint_that_is_wrong_is_one_line(tmp_path, float_run, run_4bit_tracked):
    last = run_4bit_tracked / "checkpoints" / "last.ckpt"
    cases = checkpoint_cases(tmp_path, float_run / "checkpoints" / "best.ckpt", last, commands=())
    wrong, count = wrong_outcomes(tmp_path, cases)
    assert count >= len(UNREADABLE) + len(WRONG) - 5
    assert wrong == []


@pytest.mark.long
def test_a_run_does_not_go_on_from_one_that_is_wrong(tmp_path, run_4bit_tracked):
    wrong, count = wrong_outcomes(
        tmp_path, resume_cases(tmp_path, run_4bit_tracked, unreadable=("cut to 95 %", "torch with a payload", "a tensor"))
    )
    assert count == len(STOPPED) + 3
    assert wrong == []


def test_a_run_does_not_go_on_with_another_optimizer(tmp_path, refused, run_4bit_tracked):
    """Torch would take the moments of AdamW for those of SGD."""
    from tests.conftest import tiny

    choices = ("quant=ofq_4bit", "callbacks=[default,oscillation]", "resume=true", "trainer.max_epochs=3", "optimizer=sgd")
    assert "optimizer.opt='sgd' (it had 'adamw')" in refused("train", tiny(run_4bit_tracked, *choices))
    moved = shutil.copytree(run_4bit_tracked, tmp_path / "run")
    (moved / "config.yaml").unlink()  # the checkpoint says so as well
    assert "optimizer.opt='sgd' (it had 'adamw')" in refused("train", tiny(moved, *choices))
    path = moved / "checkpoints" / "last.ckpt"
    content = torch.load(path, weights_only=True)
    del content["qat"]["run"]  # as in a file of an older version, of which the optimizer's state is left
    torch.save(content, path)
    assert "last.ckpt has another optimizer, or one of other parameters; use ckpt=PATH" in refused("train", tiny(moved, *choices))
