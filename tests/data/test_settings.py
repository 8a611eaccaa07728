"""What settings may hold. Oracle: the lines written down here."""

import math

import pytest

import qat
from qat.data import DataSettings, Digits

SETTINGS = {
    "image_size": 8,
    "patch_size": 4,
    "in_chans": 1,
    "num_classes": 10,
    "mean": [0.25],
    "std": [0.5],
}
WRONG = [
    ("augment", "bad", "must be one of none, light, timm"),
    ("batch_size", 0, "must be an integer of at least 1"),
    ("batch_size", 2.5, "must be an integer of at least 1"),
    ("batch_size", True, "must be an integer of at least 1"),
    ("num_workers", 300, "must be an integer from 0 to 256"),
    ("calibration_images", 0, "must be an integer of at least 1"),
    ("image_size", 0, "must be an integer from 1"),
    ("image_size", None, "must be an integer"),
    ("patch_size", 0, "must be an integer from 1"),
    ("hflip", 1.5, "must be a number from 0 to 1"),
    ("shift", -1, "must be an integer of at least 0"),
    ("random_erasing", None, "must be a number from 0 to 1"),
    ("train_interpolation", "best", "must be one of random, nearest, bilinear, bicubic"),
    ("interpolation", "best", "must be one of nearest, bilinear, bicubic, lanczos"),
    ("crop_pct", 0.001, "must be a number from 0.1 to 2"),
    ("crop_pct", 2.1, "must be a number from 0.1 to 2"),
    ("scale", [0.5], "must be two shares of the image's area [lowest, highest], above 0 to 1"),
    ("scale", [0.5, 0.4], "must be two shares"),
    ("scale", [0, 1], "must be two shares"),
    ("scale", ["0.1", "1"], "must be two shares"),
    ("scale", 0.5, "must be two shares"),
    ("repeats", 0, "must be an integer from 1 to 1000"),
    ("on_error", "ignore", "must be one of raise, skip"),
    ("mixup", -1, "must be a number of at least 0"),
    ("cutmix", math.inf, "must be a number of at least 0"),
    ("mixup_prob", 2, "must be a number from 0 to 1"),
    ("mixup_switch_prob", "a", "must be a number from 0 to 1"),
    ("mixup_off_epoch", -1, "must be an integer of at least 0"),
    ("memory_mb", -1, "must be a number of at least 0"),
    ("std", [0], "must be a finite number above 0 for each of the 1 channels"),
    ("std", [math.nan], "must be a finite number above 0"),
    ("std", [], "must be a finite number above 0"),
    ("mean", [math.inf], "must be a finite number for each of the 1 channels"),
    ("mean", [0.1, 0.2, 0.3], "must be a finite number"),
    ("mean", None, "must be a finite number"),
]


@pytest.mark.parametrize(("name", "value", "message"), WRONG)
def test_bad_settings_name_themselves(name, value, message):
    with pytest.raises(qat.UsageError) as caught:
        Digits(**{**SETTINGS, name: value})
    assert str(caught.value).startswith(f"data.{name}={value!r}: {message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "wrong",
    [{"rand_augment": text} for text in ("rand-x9", "random-m9", "v1")]
    + [{"color_jitter": [0.1]}, {"color_jitter": {"hue": 0.1}}],
)
def test_what_timms_augmentation_does_not_take_is_refused_before_the_run(wrong):
    with pytest.raises(
        qat.UsageError,
        match=r"^data\.rand_augment=.*, data\.color_jitter=.*: must be what timm's augmentation takes \(",
    ):
        Digits(**SETTINGS, augment="timm", **({"rand_augment": None} | wrong))


def test_unknown_and_missing_settings_are_named():
    with pytest.raises(
        qat.UsageError,
        match=r"^data: DataSettings\.__init__\(\) got an unexpected keyword argument 'colour'",
    ):
        Digits(**SETTINGS, colour=3)
    with pytest.raises(
        qat.UsageError,
        match=r"^data: DataSettings\.__init__\(\) missing 1 required positional argument: 'image_size'",
    ):
        Digits(**{name: value for name, value in SETTINGS.items() if name != "image_size"})


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
    assert DataSettings(**SETTINGS, num_workers=typed).workers(images) == workers


def test_settings_cannot_change_afterwards():
    with pytest.raises(AttributeError):
        DataSettings(**SETTINGS).batch_size = 3


def test_settings_of_older_files_mean_what_they_meant():
    # A checkpoint's data config may lack the newer knobs, and hold one that was removed.
    settings = Digits(**SETTINGS, cache="auto", class_weights=None, mixup_mode="batch").settings
    assert (settings.rand_augment, settings.random_erasing) == ("rand-m9-mstd0.5-inc1", 0.25)
    assert (settings.repeats, settings.mixes) == (1, False)
