"""A loader that resumes within an epoch. Oracle: the same epoch from its start."""

import pytest
import torch

from qat.data.sampler import ResumableLoader, SeededSampler


class Keys(torch.utils.data.Dataset):
    """Gives its keys back."""

    def __len__(self):
        return 20

    def __getitem__(self, key):
        return torch.tensor(key)


def loader(workers=0, repeats=1):
    sampler = SeededSampler(20, seed=1, shuffle=True, repeats=repeats)
    return ResumableLoader(
        Keys(), batch_size=4, sampler=sampler, num_workers=workers, persistent_workers=workers > 0
    )


def epoch(made, number):
    made.sampler.set_epoch(number)
    return [batch.tolist() for batch in made]


@pytest.mark.sample(2)
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("done", [0, 1, 3, 5])
@pytest.mark.parametrize("repeats", [1, 3])
def test_continues_after_what_was_handed_out(workers, done, repeats):
    whole, next_epoch = epoch(loader(repeats=repeats), 3), epoch(loader(repeats=repeats), 4)
    made = loader(workers, repeats)
    made.load_state_dict({"batches": done})
    assert epoch(made, 3) == whole[done:]
    assert made.state_dict()["batches"] == 5
    assert epoch(made, 4) == next_epoch


def test_counts_what_was_handed_out_not_what_was_fetched():
    made = loader(workers=2)
    iterator = iter(made)
    for count in (1, 2):
        next(iterator)
        assert made.state_dict()["batches"] == count


def test_the_epoch_counts_that_is_set_after_iter():
    # Lightning asks for the iterator first and sets the epoch afterwards.
    made = loader()
    iterator = iter(made)
    made.sampler.set_epoch(7)
    assert {epoch for epoch, _ in next(iterator).tolist()} == {7}
    assert len(made) == 5


def test_a_whole_epoch_is_not_skipped_in_the_next_one():
    first = loader()
    epoch(first, 3)
    made = loader()
    made.load_state_dict(first.state_dict())
    assert epoch(made, 4) == epoch(loader(), 4)
