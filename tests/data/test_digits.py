"""The bundled digits. Oracle: scikit-learn's own arrays."""

import numpy as np
from sklearn.datasets import load_digits

from qat.data import Digits
from tests.conftest import compose

SETTINGS = {
    "image_size": 8,
    "patch_size": 4,
    "in_chans": 1,
    "num_classes": 10,
    "mean": [0.3051],
    "std": [0.3759],
}
SPLITS = ("train", "val", "test")


def rows(arrays):
    return [
        (image.tobytes(), int(label))
        for image, label in zip(arrays.images, arrays.labels, strict=True)
    ]


def test_splits_are_of_fixed_size_and_share_out_all_images():
    data = Digits(**SETTINGS)
    assert [len(data.split(s)) for s in SPLITS] == [1257, 180, 360]
    source = load_digits()
    everything = [
        (np.rint(i * 255 / 16).astype(np.uint8).tobytes(), int(t))
        for i, t in zip(source.images, source.target, strict=True)
    ]
    assert sorted(sum((rows(data.split(s)) for s in SPLITS), [])) == sorted(everything)


def test_each_split_has_the_images_that_it_always_had():
    # As the checkpoints of published results hold them; a resumed run compares them.
    assert Digits(**SETTINGS, seed=1).fingerprints() == {
        "train": "e0cd41f40df91fa7538688a15b646cbb",
        "val": "23fc198a1b10dabfbdf289f826baa37c",
        "test": "4e5d4579db436314064663b37ade3cc8",
    }


def test_configured_mean_and_std_are_those_of_the_training_images():
    pixels = Digits(**SETTINGS).split("train").images / 255
    cfg = compose("train").data
    assert [round(float(pixels.mean()), 4)] == list(cfg.mean)
    assert [round(float(pixels.std()), 4)] == list(cfg.std)


def test_evaluation_is_on_the_test_split():
    data = Digits(**SETTINGS)
    assert data.evaluation_split == "test"
    assert sum(len(target) for _, target in data.test_dataloader()) == 360
    assert data.input_size == (1, 8, 8)
