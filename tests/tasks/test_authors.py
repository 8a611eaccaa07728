"""The paper's own checkpoints in the commands. Oracles: the file's tensors, and its logits by plain formulas (tests/interop/authors.py)."""

import argparse

import pytest
import timm
import torch
from torch.testing import assert_close

import qat
from qat.data import Digits
from tests.conftest import compose, evaluate
from tests.interop import authors
from tests.tasks.test_ptq import SMALL, quantize
from tests.tiny import DISTILLED, images

NET = ("model=deit_t_distilled", "++model.args.depth=1", "++model.args.embed_dim=192")
STILL = (
    "optimizer.lr=1e-30",
    "scheduler.min_lr=0",
    "trainer.max_epochs=1",
    "trainer.limit_train_batches=1",
)
DIGITS = {"side": 8, "patch": 4, "chans": 1, "classes": 10}


@pytest.fixture(scope="module")
def theirs():
    return authors.deit(**DIGITS)


@pytest.fixture
def path(tmp_path, theirs):
    file = tmp_path / "theirs.pth.tar"
    torch.save(
        {"state_dict": theirs, "args": argparse.Namespace(wq_bitw=2, aq_bitw=2), "arch": DISTILLED},
        file,
    )
    return file


def train(run_dir, *overrides):
    from qat.tasks.train import train as task

    task(compose("train", *NET, *STILL, f"run_dir={run_dir}", *overrides))
    return run_dir


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    "how", [(), ("ckpt_format=ofq",), ("ckpt_format=ofq", "model=deit_t_distilled")]
)
def test_eval_gives_the_accuracy_of_their_logits(tmp_path, path, theirs, how):
    out = evaluate(tmp_path / "run", f"ckpt={path}", *how)
    cfg = compose("train", "run_dir=a").data
    batches = list(Digits(**{k: v for k, v in cfg.items() if k != "_target_"}).test_dataloader())
    hits = sum(
        (authors.deit_logits(theirs, images, 2, 2).argmax(1) == target).sum().item()
        for images, target in batches
    )
    assert out["top1"] == pytest.approx(100 * hits / sum(len(target) for _, target in batches))
    assert (out["quant"], out["model"]) == ("ofq_2bit", DISTILLED)


def test_train_starts_from_their_weights_and_scales(tmp_path, path, theirs):
    run = train(tmp_path / "run", f"ckpt={path}", "ckpt_format=ofq", "quant=ofq_2bit")
    net = qat.load(f"{run}/checkpoints/last.ckpt")
    x = images(4)
    with torch.no_grad():
        assert_close(net(x), authors.deit_logits(theirs, x, 2, 2), rtol=0, atol=1e-4)


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("command", "typed", "message"),
    [
        (
            "eval",
            "ckpt_bits=3",
            "bits=3: ckpt='{}' was trained with 2, according to the arguments in the file",
        ),
        (
            "eval",
            "data=digits data.image_size=16",
            "data.image_size=16: images must be (1, 8, 8), for which the model is quantized, not (1, 16, 16)",
        ),
        (
            "eval",
            "ckpt_format=qat",
            "ckpt='{}': must be a checkpoint of qat; for other files, ckpt_format must be one of auto, timm, ofq",
        ),
        (
            "train",
            "model=deit_s_distilled",
            "model='deit_small_distilled_patch16_224': the weights of ckpt='{}' do not fit it",
        ),
        (
            "train",
            "loss=kd",
            "ckpt='{}' is already quantized and cannot be the float teacher; set teacher.ckpt to",
        ),
        (
            "train",
            "data.num_classes=4",
            "ckpt='{}': has 10 classes, the data 4; model.reset_head=true gives the model a new head",
        ),
    ],
)
def test_mistakes_are_one_line(tmp_path, refused, path, command, typed, message):
    net = NET if command == "train" else ()
    given = (f"ckpt={path}", f"run_dir={tmp_path}/run", *net, *typed.split())
    assert message.format(path) in refused(compose(command, *given))


@pytest.mark.long
def test_a_search_over_their_steps_needs_no_word_about_the_net(tmp_path, path, theirs):
    net = timm.create_model(
        DISTILLED, img_size=8, patch_size=4, in_chans=1, num_classes=10, depth=1
    )
    torch.save(net.state_dict(), tmp_path / "float.pth")
    given = (
        f"ckpt={path}",
        f"teacher.ckpt={tmp_path}/float.pth",
        "search=evolution",
        "search.passes=1",
        "search.targets=[mlp.*.input]",
    )
    found = quantize(tmp_path / "run", "ptq=keep", *given, *SMALL)
    again = qat.load(tmp_path / "run" / "quantized.ckpt")
    assert (found["model"], len(again.blocks)) == (DISTILLED, 1)
    assert torch.equal(again.blocks[0].mlp.fc1.weight, theirs["blocks.0.mlp.fc1.weight"])
