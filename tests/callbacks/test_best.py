"""`best.ckpt` of a run that was resumed. Oracle: the run that was not."""

import shutil

import pytest
import torch

from tests.tasks.test_resume import full, killed_at, last, results, run  # noqa: F401  (a fixture)


def record(content, kind="ModelCheckpoint"):
    (name,) = (name for name in content["callbacks"] if name.startswith(kind))
    return name, content["callbacks"][name]


def best(run_dir):
    return torch.load(run_dir / "checkpoints" / "best.ckpt", weights_only=True)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A run killed in its last epoch, after step 24, whose best score no later epoch reaches."""
    with pytest.MonkeyPatch.context() as patch:
        run_dir = killed_at(25, tmp_path_factory.mktemp("killed") / "run", patch)
    path, content = run_dir / "checkpoints" / "last.ckpt", last(run_dir)
    _, state = record(content)
    score = torch.tensor(99.0)
    state.update(best_model_score=score, kth_value=score, best_k_models=dict.fromkeys(state["best_k_models"], score))
    torch.save(content, path)
    return run_dir


@pytest.mark.parametrize("written_by", ["ModelCheckpoint", "BestCheckpoint"])
def test_the_record_goes_on_in_a_directory_that_was_moved(written_by, tmp_path, killed):
    moved = shutil.copytree(killed, tmp_path / "moved")
    content, before = last(moved), best(moved)["global_step"]
    name, state = record(content)
    del content["callbacks"][name]
    content["callbacks"][name.replace("ModelCheckpoint", written_by)] = state
    torch.save(content, moved / "checkpoints" / "last.ckpt")
    run(moved, "resume=true")
    assert record(last(moved))[1]["best_model_path"] == str(moved / "checkpoints" / "best.ckpt")
    assert best(moved)["global_step"] == before
    assert results(moved)["val_top1"] == 99.0


def test_a_best_that_is_gone_is_forgotten(tmp_path, killed, caplog):
    run_dir = shutil.copytree(killed, tmp_path / "run")
    path = run_dir / "checkpoints" / "best.ckpt"
    path.unlink()
    run(run_dir, "resume=true")
    assert f"resume: {path} is missing; the best epoch is chosen from the epochs that follow" in caplog.text
    assert best(run_dir)["global_step"] == 27
    assert results(run_dir)["weights"] == "best.ckpt"
