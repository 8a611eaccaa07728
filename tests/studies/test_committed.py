"""The page and the README of this repository say what its records say. Oracle: both made anew."""

import pytest
from omegaconf import OmegaConf

from studies import page
from studies.arms import Arms, Places
from studies.run import outdated
from tests.conftest import ROOT, compose

# What the headline's experiments are called, and the arms that they pin.
HEADLINE = {
    "cifar10_fp": "START/float",
    "cifar10_qat": "TUNE/seq_longest_shifts",
    "cifar10_qat quant=seq_3bit": "TUNE/seq_longest_w3_shifts_lr2e-3",
    "cifar10_qat quant=seq_4bit": "TUNE/seq_longest_w4_shifts_lr2e-3",
    "cifar10_qat quant=fp quant.steps=absolute": "AIM/control_longest_shifts_lr2e-3",
    "cifar10_qat quant=ofq_2bit quant.steps=absolute": "TUNE/longest_shifts_fast",
}


def test_page_and_readme_are_up_to_date():
    assert page.check(ROOT) == []


def test_every_record_was_made_by_what_its_claim_says():
    assert outdated(Arms.read(Places())) == []


@pytest.mark.parametrize("name", HEADLINE)
def test_the_headline_has_a_name_that_trains_the_same(name):
    arms = Arms.read(Places())
    asked = arms.settings(arms[HEADLINE[name]], 0)
    start = [one for one in asked if one.startswith("ckpt=")]
    # The float net that a run starts from is its teacher where none is named; loader processes change nothing.
    ours = compose("train", *f"experiment={name}".split(), *start, "data.num_workers=0", "run_dir=a")
    theirs = compose("train", *(one for one in asked if not one.startswith("teacher.ckpt=")), "run_dir=a")
    assert OmegaConf.to_container(ours, resolve=True) == OmegaConf.to_container(theirs, resolve=True)
