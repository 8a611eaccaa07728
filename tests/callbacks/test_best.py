"""`best.ckpt` of a resumed run. Oracle: the uninterrupted run."""

import shutil

import pytest
import torch

from tests.tasks.test_resume import killed_at, last, results, run


def record(content):
    (state,) = (
        state for name, state in content["callbacks"].items() if name.startswith("ModelCheckpoint")
    )
    return state


def best(run_dir):
    return torch.load(f"{run_dir}/checkpoints/best.ckpt", weights_only=True)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A run killed in its last epoch, after step 15, whose best score no later epoch reaches."""
    run_dir = killed_at(16, tmp_path_factory.mktemp("killed") / "run")
    content = last(run_dir)
    state = record(content)
    score = torch.tensor(99.0)
    state["best_model_score"] = state["kth_value"] = score
    state["best_k_models"] = dict.fromkeys(state["best_k_models"], score)
    torch.save(content, run_dir / "checkpoints" / "last.ckpt")
    return run_dir


@pytest.mark.long
def test_the_record_goes_on_in_a_directory_that_was_moved(tmp_path, killed):
    moved = shutil.copytree(killed, tmp_path / "moved")
    run(moved, "resume=true")
    assert record(last(moved))["best_model_path"] == str(moved / "checkpoints" / "best.ckpt")
    assert best(moved)["global_step"] == best(killed)["global_step"]
    assert results(moved)["val_top1"] == 99.0


@pytest.mark.long
def test_a_best_that_is_gone_is_forgotten(tmp_path, killed, caplog):
    run_dir = shutil.copytree(killed, tmp_path / "run")
    path = run_dir / "checkpoints" / "best.ckpt"
    path.unlink()
    run(run_dir, "resume=true")
    assert (
        f"resume: {path} is missing; the best epoch is chosen from the epochs that follow"
        in caplog.text
    )
    assert best(run_dir)["global_step"] == 18
    assert results(run_dir)["weights"] == "best.ckpt"
