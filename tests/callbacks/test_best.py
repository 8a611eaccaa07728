"""`best.ckpt` of a run that was resumed. Oracle: the run that was not."""

import shutil

import pytest
import torch

from qat.callbacks import BestCheckpoint
from tests.tasks.test_resume import full, killed_at, last, results, run  # noqa: F401  (a fixture)


def record(content):
    return next(state for name, state in content["callbacks"].items() if name.startswith("BestCheckpoint"))


def best(run_dir):
    return torch.load(run_dir / "checkpoints" / "best.ckpt", weights_only=True)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A run killed in its last epoch, behind step 24."""
    with pytest.MonkeyPatch.context() as patch:
        return killed_at(25, tmp_path_factory.mktemp("killed") / "run", patch)


@pytest.mark.long
def test_in_a_directory_that_was_moved(tmp_path, killed, full):  # noqa: F811
    moved = shutil.copytree(killed, tmp_path / "moved")
    run(moved, "resume=true")
    ours, theirs = record(last(moved)), record(last(full))
    assert ours["best_model_score"] == theirs["best_model_score"]
    assert ours["best_model_path"] == str(moved / "checkpoints" / "best.ckpt")
    assert best(moved)["global_step"] == best(full)["global_step"]
    assert results(moved)["val_top1"] == results(full)["val_top1"]


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-500])])
def test_a_best_that_is_gone_or_damaged_is_forgotten(damage, tmp_path, killed, caplog):
    run_dir = shutil.copytree(killed, tmp_path / "run")
    damage(run_dir / "checkpoints" / "best.ckpt")
    run(run_dir, "resume=true")
    (warning,) = [r.getMessage() for r in caplog.records if "best" in r.getMessage() and r.levelname == "WARNING"]
    assert warning.startswith(f"resume: {run_dir / 'checkpoints' / 'best.ckpt'}: ")
    assert warning.endswith("; the best epoch is chosen among those to come")
    assert best(run_dir)["global_step"] == 27
    assert results(run_dir)["weights"] == "best.ckpt"


def test_the_record_is_that_of_the_file(tmp_path, full):  # noqa: F811
    """A kill between best.ckpt and last.ckpt, on a machine that does not repeat itself: the file is better than what comes again."""
    folder = shutil.copytree(full / "checkpoints", tmp_path / "checkpoints")
    content = best(full)
    own = next(name for name in content["callbacks"] if name.startswith("BestCheckpoint"))
    earlier = content["callbacks"][own] | {"best_model_score": torch.tensor(1.0), "step": 1}
    one = BestCheckpoint(dirpath=folder, filename="best", monitor="val/top1", mode="max", enable_version_counter=False)
    one.load_state_dict(earlier)
    assert one.best_model_score == content["callbacks"][own]["best_model_score"]
    assert one.best_model_path == str(folder / "best.ckpt")
    assert one.best_k_models == {str(folder / "best.ckpt"): one.best_model_score}
