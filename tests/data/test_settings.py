"""Values of settings. Oracle: the messages in this file."""

import math
import re

import pytest

from qat.data import Cifar10, DataSettings, Digits, FashionMnist, ImageData
from tests.conftest import compose
from tests.data.files import DIGITS
from tests.errors import usage_error


class Unread(ImageData):
    """A dataset without defaults."""

    def read(self):
        return {}


WRONG = [
    ("augment", "bad"),
    ("batch_size", 0),
    ("num_workers", 300),
    ("calibration_images", 0),
    ("image_size", 0),
    ("image_size", None),
    ("patch_size", 0),
    ("hflip", 1.5),
    ("shift", -1),
    ("random_erasing", None),
    ("train_interpolation", "best"),
    ("interpolation", "best"),
    ("crop_pct", 0.001),
    ("crop_pct", 2.1),
    ("scale", [0.5]),
    ("scale", [0.5, 0.4]),
    ("scale", [0, 1]),
    ("scale", ["0.1", "1"]),
    ("scale", 0.5),
    ("repeats", 0),
    ("on_error", "ignore"),
    ("mixup", -1),
    ("cutmix", math.inf),
    ("mixup_prob", 2),
    ("mixup_switch_prob", "a"),
    ("mixup_off_epoch", -1),
    ("memory_mb", -1),
    ("std", [0]),
    ("std", [math.nan]),
    ("std", []),
    ("mean", [math.inf]),
    ("mean", [0.1, 0.2, 0.3]),
    ("mean", None),
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_bad_settings_name_themselves(name, value):
    with usage_error(rf"^data\.{name}={re.escape(repr(value))}: must be "):
        Digits(**{**DIGITS, name: value})


@pytest.mark.parametrize(
    "wrong",
    [{"rand_augment": text} for text in ("rand-x9", "random-m9", "v1")]
    + [{"color_jitter": [0.1]}, {"color_jitter": {"hue": 0.1}}],
)
def test_what_timms_augmentation_does_not_take_is_refused_before_the_run(wrong):
    with usage_error(r"^data\.rand_augment=.*, data\.color_jitter=.*: "):
        Digits(**DIGITS, augment="timm", **({"rand_augment": None} | wrong))


def test_unknown_and_missing_settings_are_named():
    with usage_error("^data: .* 'colour'"):
        Digits(**DIGITS, colour=3)
    with usage_error("^data: .* missing .* 'image_size'"):
        Unread(**{name: value for name, value in DIGITS.items() if name != "image_size"})


@pytest.mark.parametrize(
    ("kind", "name"), [(Digits, "digits"), (FashionMnist, "fashion_mnist"), (Cifar10, "cifar10")]
)
def test_what_may_be_left_out_is_that_of_the_command(kind, name):
    config = compose("train", f"data={name}").data
    assert kind.DEFAULTS.keys() == DIGITS.keys()
    for key, value in kind.DEFAULTS.items():
        expected = config[key]
        assert value == (expected if isinstance(expected, int) else tuple(expected)), key


@pytest.mark.parametrize(
    ("typed", "images", "cores", "ranks", "workers"),
    [
        (None, 10**6, 64, 1, 8),
        (None, 10**6, 4, 1, 4),
        (None, 10**6, 64, 16, 4),  # of this machine
        (None, 10**6, 2, 4, 1),
        (None, 600, 64, 1, 0),
        (3, 600, 1, 4, 3),
        (0, 10**6, 64, 1, 0),
    ],
)
def test_workers_are_the_machines(typed, images, cores, ranks, workers, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(cores), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    assert DataSettings(**DIGITS, num_workers=typed).workers(images) == workers


def test_settings_cannot_change_afterwards():
    with pytest.raises(AttributeError):
        DataSettings(**DIGITS).batch_size = 3


def test_settings_of_older_files_mean_what_they_meant():
    # A checkpoint's data config may lack the newer knobs, and hold one that was removed.
    settings = Digits(**DIGITS, cache="auto", class_weights=None, mixup_mode="batch").settings
    assert (settings.rand_augment, settings.random_erasing) == ("rand-m9-mstd0.5-inc1", 0.25)
    assert (settings.repeats, settings.mixes) == (1, False)
