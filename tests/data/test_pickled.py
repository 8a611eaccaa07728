"""CIFAR-10's pickled batches. Oracles: the arrays written here, Python's own pickle for the fabricated files, and files that attack."""

import io
import os
import pickle

import numpy as np
import pytest

import qat
from qat.data import Cifar10
from qat.data.cifar import TEST, TRAIN, read_batches
from tests.conftest import results, train, write_cifar
from tests.data.files import python2_batch, python3_batch, write_cifar_batches

SETTINGS = {"image_size": 32, "patch_size": 4, "in_chans": 3, "num_classes": 4, "mean": [0.5] * 3, "std": [0.25] * 3}
PIXELS = np.random.default_rng(0).integers(0, 256, (4, 3072), dtype=np.uint8)


def batch(tmp_path, content):
    (tmp_path / "batch").write_bytes(content)
    return read_batches(tmp_path, ("batch",), chans=3)


def test_the_fabricated_files_are_what_python_2_wrote():
    read = pickle.load(io.BytesIO(python2_batch(PIXELS, [3, 1, 2, 0])), encoding="bytes")
    assert np.array_equal(read[b"data"], PIXELS)
    assert read[b"labels"] == [3, 1, 2, 0]


def test_splits(tmp_path):
    made = write_cifar_batches(tmp_path)
    data = Cifar10(**SETTINGS, root=str(tmp_path))
    assert [len(data.split(s)) for s in ("train", "val", "test")] == [36, 4, 8]
    test = data.split("test")
    assert np.array_equal(test.images, made["test_batch"][0])
    assert test.labels.tolist() == made["test_batch"][1]
    everything = read_batches(tmp_path / "cifar-10-batches-py", TRAIN, chans=3)
    assert np.array_equal(everything.images, np.concatenate([made[name][0] for name in TRAIN]))
    inside = Cifar10(**SETTINGS, root=str(tmp_path / "cifar-10-batches-py"))
    assert np.array_equal(inside.split("val").images, data.split("val").images)


def test_colours_can_be_read_as_grey(tmp_path):
    write_cifar_batches(tmp_path)
    assert read_batches(tmp_path / "cifar-10-batches-py", TEST, chans=1).images.shape == (8, 32, 32, 1)


def test_parquet_files_come_first(tmp_path):
    write_cifar(tmp_path)
    expected = Cifar10(**SETTINGS, root=str(tmp_path)).split("test").images
    write_cifar_batches(tmp_path)
    assert np.array_equal(Cifar10(**SETTINGS, root=str(tmp_path)).split("test").images, expected)


def test_a_folder_with_neither_says_so(tmp_path):
    with pytest.raises(qat.UsageError, match=r"holds neither train\*\.parquet nor cifar-10-batches-py/data_batch_1"):
        Cifar10(**SETTINGS, root=str(tmp_path)).train_dataloader()


@pytest.mark.parametrize("protocol", [3, 4])
def test_files_of_python_3(tmp_path, protocol):
    arrays = batch(tmp_path, python3_batch(PIXELS, [3, 1, 2, 0], protocol))
    assert np.array_equal(arrays.images, PIXELS.reshape(4, 3, 32, 32).transpose(0, 2, 3, 1))
    assert arrays.labels.tolist() == [3, 1, 2, 0]


class Attack:
    """Calls `function` when it is unpickled."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def test_a_pickle_that_attacks_would_work(tmp_path):
    pickle.loads(pickle.dumps(Attack(os.mkdir, str(tmp_path / "owned"))))
    assert (tmp_path / "owned").is_dir()


@pytest.mark.parametrize("function", [os.mkdir, eval, getattr, np.save, __import__])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_no_function_is_called(tmp_path, function, protocol):
    owned = tmp_path / "owned"
    args = {eval: (f"__import__('os').mkdir({str(owned)!r})",), np.save: (str(owned), 1), getattr: ("", "join"), __import__: ("os",)}
    content = {b"data": PIXELS, b"labels": [0] * 4, b"x": Attack(function, *args.get(function, (str(owned),)))}
    with pytest.raises(
        qat.UsageError, match=r"batch: cannot be read as a batch of CIFAR-10 \(it asks for .*, which no CIFAR-10 file needs"
    ):
        batch(tmp_path, pickle.dumps(content, protocol=protocol))
    assert not owned.exists()


def test_numpy_itself_is_not_called():
    # An array of objects and a dtype from text reach numpy's own parsers when they are really built.
    from qat.data.cifar import _Record, _Unpickler

    assert {value for (module, _), value in _Unpickler.KNOWN.items() if module.startswith("numpy")} == {_Record}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello",
        python3_batch(PIXELS, [0, 1, 2, 3])[:-50],
        pickle.dumps([1, 2]),
        pickle.dumps({b"data": PIXELS}),
        pickle.dumps({b"data": [1, 2], b"labels": [1, 2]}),
        python3_batch(PIXELS, [0, 1]),
        python3_batch(PIXELS.astype(np.int64), [0, 1, 2, 3]),
        python3_batch(PIXELS[:, :100], [0, 1, 2, 3]),
        python3_batch(np.asfortranarray(PIXELS), [0, 1, 2, 3]),
        python3_batch(PIXELS, ["a", "b", "c", "d"]),
        b"cnumpy\nndarray\n(N}Vx\nK\x01stb.",
    ],
)
def test_a_file_that_is_no_batch_is_named(tmp_path, content):
    with pytest.raises(qat.UsageError, match=f"{tmp_path}/batch: cannot be read as a batch of CIFAR-10") as caught:
        batch(tmp_path, content)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    write_cifar_batches(tmp_path)
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").unlink()
    with pytest.raises(qat.UsageError, match=r"data_batch_3: cannot be read"):
        Cifar10(**SETTINGS, root=str(tmp_path)).train_dataloader()


def test_a_net_trains(tmp_path):
    write_cifar_batches(tmp_path / "data")
    small = ["data.num_workers=0", "data.batch_size=16", "data.num_classes=4"]
    assert results(train(tmp_path / "run", "data=cifar10", f"data.root={tmp_path}/data", *small))["split"] == "test"
