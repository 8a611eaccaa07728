"""The bundled digits. Oracle: scikit-learn's own arrays."""

from qat.data import Digits
from tests.conftest import compose
from tests.data.files import DIGITS


def test_each_split_has_the_images_that_it_always_had():
    # As the checkpoints of published results hold them; a resumed run compares them.
    assert Digits(**DIGITS, seed=1).fingerprints() == {
        "train": "e0cd41f40df91fa7538688a15b646cbb",
        "val": "23fc198a1b10dabfbdf289f826baa37c",
        "test": "4e5d4579db436314064663b37ade3cc8",
    }


def test_configured_mean_and_std_are_those_of_the_training_images():
    pixels = Digits(**DIGITS).split("train").images / 255
    cfg = compose("train").data
    assert [round(float(pixels.mean()), 4)] == list(cfg.mean)
    assert [round(float(pixels.std()), 4)] == list(cfg.std)
