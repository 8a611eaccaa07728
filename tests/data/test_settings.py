"""What settings may hold. Oracle: the lines written down here."""

import math

import pytest

import qat
from qat.data import DataSettings, ImageNet
from tests.conftest import compose

SETTINGS = {"image_size": 8, "patch_size": 4, "in_chans": 1, "num_classes": 10, "mean": [0.25], "std": [0.5]}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hflip": -0.1}, "data.hflip=-0.1: must be a number from 0 to 1"),
        ({"shift": -1}, "data.shift=-1: must be an integer from 0 to 7"),
        ({"shift": 8}, "data.shift=8: must be an integer from 0 to 7"),
        ({"random_erasing": 1.5}, "data.random_erasing=1.5: must be a number from 0 to 1"),
        ({"random_erasing": None}, "data.random_erasing=None: must be a number from 0 to 1"),
        ({"erase_mode": "black"}, "data.erase_mode='black': must be one of pixel, const, rand"),
        ({"erase_count": 0}, "data.erase_count=0: must be an integer of at least 1"),
        ({"train_interpolation": "best"}, "data.train_interpolation='best': must be one of random, nearest, bilinear, bicubic, lanczos"),
        ({"rand_augment": "rand-x"}, "data.rand_augment='rand-x': must be one of null, rand with sections -mN -nN -pX"),
        ({"scale": [0.5]}, "data.scale=[0.5]: must be two shares of the image's area [lowest, highest], above 0 to 1"),
        ({"scale": [0.5, 0.4]}, "data.scale=[0.5, 0.4]: must be"),
        ({"scale": [0, 1]}, "data.scale=[0, 1]: must be"),
        ({"scale": (0.5, 1.5)}, "data.scale=[0.5, 1.5]: must be"),
        ({"scale": 0.5}, "data.scale=0.5: must be"),
        ({"scale": "ab"}, "data.scale='ab': must be"),
        ({"color_jitter": -0.1}, "data.color_jitter=-0.1: must be null, a number of at least 0, [brightness,"),
        ({"color_jitter": "a"}, "data.color_jitter='a': must be"),
        ({"color_jitter": [0.1, 0.2]}, "data.color_jitter=[0.1, 0.2]: must be"),
        ({"color_jitter": [0, 0, 0, 0.6]}, "data.color_jitter=[0, 0, 0, 0.6]: must be"),
        ({"repeats": 0}, "data.repeats=0: must be an integer from 1 to"),
        ({"mixup": -1}, "data.mixup=-1: must be a number of at least 0"),
        ({"cutmix": math.inf}, "data.cutmix=inf: must be a number of at least 0"),
        ({"mixup_prob": 2}, "data.mixup_prob=2: must be a number from 0 to 1"),
        ({"mixup_switch_prob": "a"}, "data.mixup_switch_prob='a': must be a number from 0 to 1"),
        ({"mixup_mode": "half"}, "data.mixup_mode='half': must be one of batch, pair, elem"),
        ({"mixup_off_epoch": -1}, "data.mixup_off_epoch=-1: must be an integer of at least 0"),
        ({"std": [0]}, "data.std=[0]: must be a finite number above 0"),
        ({"std": [-0.5]}, "data.std=[-0.5]: must be a finite number above 0"),
        ({"std": [math.nan]}, "data.std=[nan]: must be a finite number above 0"),
        ({"mean": [math.inf]}, "data.mean=[inf]: must be a finite number"),
        ({"mean": ["a"]}, "data.mean=['a']: must be a finite number"),
        ({"mean": "a"}, "data.mean=a: needs one number for each of the 1 channels"),
        ({"mean": None}, "data.mean=None: needs one number for each of the 1 channels"),
    ],
)
@pytest.mark.parametrize("augment", ["none", "light", "timm"])
def test_bad_settings_name_themselves(settings, message, augment):
    with pytest.raises(qat.UsageError) as caught:
        DataSettings(**{**SETTINGS, "augment": augment, **settings})
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("settings", [{"augment": "timm"}, {"augment": "light", "crop_pct": 0.9}])
def test_a_shift_belongs_to_images_that_are_not_cropped(settings):
    with pytest.raises(qat.UsageError, match=r"^data\.shift=1: crops are of random size here \(data\.scale\); allowed with "):
        DataSettings(**SETTINGS, **settings, shift=1)
    DataSettings(**SETTINGS, augment="none", shift=1)


ASKED = {
    "rand_augment": "rand-m7",
    "random_erasing": 0.1,
    "erase_mode": "const",
    "erase_count": 2,
    "train_interpolation": "bicubic",
    "color_jitter": 0.3,
}


@pytest.mark.parametrize("name", ASKED)
def test_light_refuses_what_only_timm_does(name):
    line = rf"^data\.{name}={ASKED[name]!r}: data\.augment='light' does nothing of the kind; must be with data\.augment=timm$"
    with pytest.raises(qat.UsageError, match=line):
        DataSettings(**SETTINGS, augment="light", **{name: ASKED[name]})


def test_all_that_light_refuses_is_in_one_line():
    with pytest.raises(qat.UsageError, match=r"^data\.rand_augment='rand-m7', data\.color_jitter=0\.3: data\.augment"):
        DataSettings(**SETTINGS, augment="light", rand_augment="rand-m7", color_jitter=0.3)


@pytest.mark.parametrize("nothing", [{"rand_augment": None}, {"random_erasing": 0}, {"color_jitter": 0}, {"color_jitter": None}])
def test_light_takes_what_asks_for_nothing(nothing):
    assert DataSettings(**SETTINGS, augment="light", **nothing).augment == "light"


def test_light_has_a_scale_only_where_it_crops_by_area():
    assert DataSettings(**SETTINGS, augment="light", scale=[0.5, 1], crop_pct=0.9).scale == [0.5, 1]
    with pytest.raises(qat.UsageError, match=r"data\.scale=\[0\.5, 1\]: data\.augment='light' does nothing"):
        DataSettings(**SETTINGS, augment="light", scale=[0.5, 1])


def test_none_switches_a_whole_recipe_off():
    settings = {**ASKED, "scale": [0.5, 1], "repeats": 3, "mixup": 0.8}
    assert DataSettings(**SETTINGS, augment="none", **settings).augment == "none"


def test_colour_jitter_that_timm_would_leave_out_is_refused():
    with pytest.raises(
        qat.UsageError, match=r"^data\.color_jitter=0\.3: timm leaves it out beside data\.rand_augment='rand-m9-mstd0\.5-inc1'"
    ):
        DataSettings(**SETTINGS, augment="timm", color_jitter=0.3)
    for rand_augment in (None, "3a", "rand-t3a"):
        assert DataSettings(**SETTINGS, augment="timm", color_jitter=0.3, rand_augment=rand_augment).color_jitter == 0.3


def test_a_config_of_a_whole_recipe_is_taken(tmp_path):
    from qat.tasks.build import build_data

    recipe = ["data.augment=timm", "data.rand_augment=3a", "data.color_jitter=0.3", "data.random_erasing=0", "data.scale=[0.2,1.0]"]
    mixing = ["data.mixup=0.8", "data.cutmix=1.0", "data.repeats=3", "data.mixup_off_epoch=250"]
    data = build_data(compose("train", "data=imagenet", f"data.root={tmp_path}", "model=deit_s", *recipe, *mixing, "run_dir=a"))
    assert isinstance(data, ImageNet)
    assert (data.settings.scale, data.settings.mixup, data.settings.repeats) == ([0.2, 1.0], 0.8, 3)


def test_settings_of_older_files_mean_what_they_meant():
    # A checkpoint's data config may lack the newer knobs.
    settings = DataSettings(**SETTINGS)
    assert (settings.rand_augment, settings.random_erasing, settings.erase_mode) == ("rand-m9-mstd0.5-inc1", 0.25, "pixel")
    assert (settings.repeats, settings.mixes) == (1, False)
