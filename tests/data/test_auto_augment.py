"""timm's augmentation strings. Oracles: timm's own transform under the same seed, and Pillow's limits."""

import numpy as np
import pytest
import timm.data
import torch
from PIL import Image

import qat
from qat.data import DataSettings
from qat.data.auto_augment import check_auto_augment
from qat.data.sampler import isolated_rng
from qat.data.transforms import train_transform


def settings(chans=3, **changes):
    fixed = {
        "image_size": 8,
        "patch_size": 4,
        "in_chans": chans,
        "num_classes": 10,
        "mean": [0.25] * chans,
        "std": [0.5] * chans,
        "crop_pct": 1.0,
    }
    return DataSettings(**{**fixed, "augment": "timm", **changes})


def image(chans=3):
    return np.random.default_rng(0).integers(0, 256, (10, 12, chans), dtype=np.uint8)


def outputs(transform, source, n):
    made = []
    for i in range(n):
        with isolated_rng(i):
            made.append(transform(source))
    return torch.stack(made)


@pytest.mark.parametrize(
    ("ours", "timms"),
    [
        ({"rand_augment": "rand-m5-n3-p0.8-inc1"}, {"auto_augment": "rand-m5-n3-p0.8-inc1"}),
        ({"rand_augment": "augmix-m3-w2"}, {"auto_augment": "augmix-m3-w2"}),
        ({"rand_augment": "original"}, {"auto_augment": "original"}),
        ({"rand_augment": "3a", "color_jitter": 0.3}, {"auto_augment": "3a", "color_jitter": 0.3}),
        ({"rand_augment": None, "color_jitter": [0.1, 0.2, 0.3, 0.4]}, {"color_jitter": (0.1, 0.2, 0.3, 0.4)}),
        ({"rand_augment": None, "random_erasing": 0}, {"re_prob": 0}),
        ({"rand_augment": None, "random_erasing": 1.0, "erase_mode": "const", "erase_count": 3}, {"re_prob": 1.0, "re_count": 3}),
        ({"rand_augment": None, "random_erasing": 0.5, "erase_mode": "rand"}, {"re_prob": 0.5, "re_mode": "rand"}),
        ({"rand_augment": None, "scale": [0.5, 0.6], "hflip": 0.2}, {"scale": (0.5, 0.6), "hflip": 0.2}),
        ({"rand_augment": None, "train_interpolation": "nearest"}, {"interpolation": "nearest"}),
    ],
)
def test_settings_are_timms(ours, timms):
    plain = {"color_jitter": None, "interpolation": "random", "re_prob": 0.25, "re_mode": "const" if "re_prob" in timms else "pixel"}
    expected = timm.data.create_transform((3, 8, 8), is_training=True, mean=(0.25,) * 3, std=(0.5,) * 3, **{**plain, **timms})
    found = outputs(train_transform(settings(**ours)), image(), 60)
    assert torch.equal(found, outputs(lambda pixels: expected(Image.fromarray(pixels)), image(), 60))
    assert found.std(0).min() > 0


# Those with noise, levels beyond 10 or falling strength ask Pillow for an image of 0 bits now and then.
@pytest.mark.parametrize("chans", [1, 3])
@pytest.mark.parametrize(
    "text",
    [
        "rand-m9-mstd0.5-inc1",
        "rand-m0",
        "rand-m5-mstd3",
        "rand-m15-mmax20-inc1",
        "rand-m9-mstd101",
        "rand-n3-tweights-inc1",
        "rand-n3-t3aw",
        "augmix-m10-mstd3",
        "augmix-m10-w2-d2-b1-a0.5",
        "originalr-mstd5",
        "v0-mstd5",
        "v0r-mstd9",
        "3a",
    ],
)
def test_every_draw_of_a_string_works(text, chans):
    found = outputs(train_transform(settings(chans, rand_augment=text, random_erasing=0)), image(chans), 200)
    assert found.isfinite().all()
    assert found.std(0).min() > 0


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos", "random"])
def test_every_interpolation_works_beside_rotation(interpolation):
    found = outputs(train_transform(settings(train_interpolation=interpolation, rand_augment="rand-n9")), image(), 50)
    assert found.isfinite().all()


def test_levels_beyond_ten_stay_those_of_the_string():
    # The strongest posterize keeps one bit; other operations go as far as they are told.
    strong, capped = (
        outputs(train_transform(settings(rand_augment=f"rand-m20-inc1{end}", random_erasing=0)), image(), 50) for end in ("-mmax20", "")
    )
    assert not torch.equal(strong, capped)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "rand-x9",
        "rand-m9.5",
        "rand-foo",
        "rand-mstd",
        "rand-m9-inc2",
        "rand-tother",
        "rand-m9 ",
        "rand_m9",
        "random-m9",
        "augmix-n3",
        "original-m9",
        "v1",
        "rand-n50-tweights",
        "augmix-w0",
        7,
        True,
    ],
)
def test_strings_that_timm_cannot_read_or_passes_over_are_refused(text):
    with pytest.raises(qat.UsageError) as caught:
        check_auto_augment("data.rand_augment", text)
    line = str(caught.value)
    assert line.startswith(f"data.rand_augment={text!r}: ")
    assert "must be one of null, rand with sections -mN" in line
    assert "\n" not in line


def test_a_check_draws_from_no_global_generator():
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    check_auto_augment("data.rand_augment", "rand-m9-mstd0.5-inc1")
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
