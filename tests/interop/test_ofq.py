"""Files of the paper's code. Oracles: logits and block outputs of that code ($QAT_GOLDENS/interop), and plain formulas on files with
its names and shapes (tests/interop/authors.py)."""

import argparse

import numpy as np
import pytest
import timm
import torch
from torch.testing import assert_close

import qat
from tests.errors import usage_error
from tests.golden import FOLDER
from tests.interop import authors
from tests.tiny import logits, randn

TINY, SWIN = "deit_tiny_distilled_patch16_224", "swin_tiny_patch4_window7_224"
TABLE = "relative_position_bias_table"
GOLDENS = sorted(path.stem for path in (FOLDER / "interop").glob("*.npz"))


def written(tmp_path, content):
    path = tmp_path / "theirs.pth.tar"
    torch.save(content, path)
    return path


def images(side, chans=3, n=4):
    return randn(n, chans, side, side, seed=7)


@pytest.fixture(scope="module")
def state():
    return authors.deit()


def block_outputs(net, names, x):
    """Outputs of stem, blocks and mergings, by the names that the golden cases have for them."""
    seen = {}
    modules = dict(net.named_modules())
    for name in names:
        place = {"stem": "patch_embed"}.get(name, name)
        if name.startswith("features."):
            stage, _, block = name.removeprefix("features.").partition(".")
            place = (
                f"layers.{int(stage) // 2}.blocks.{block}"
                if block
                else f"layers.{int(stage) // 2}.downsample"
            )
        modules[place].register_forward_hook(
            lambda m, args, out, name=name: seen.update({name: out})
        )
    return logits(net, x), seen


@pytest.mark.golden
@pytest.mark.parametrize("case", GOLDENS)
def test_logits_and_blocks_are_those_of_the_reference(case):
    with np.load(FOLDER / "interop" / f"{case}.npz") as file:
        golden = dict(file)
    knobs = {
        "bits": int(golden["weight_bits"]),
        "act_bits": int(golden["act_bits"]),
        "qkr": bool(golden["qkr"]),
    }
    net = qat.load_ofq_checkpoint(FOLDER / "interop" / f"{case}.pth.tar", **knobs)
    names = [str(name) for name in golden["block_names"]]
    out, seen = block_outputs(net, ["stem", *names], torch.from_numpy(golden["images"]))
    assert_close(out, torch.from_numpy(golden["logits"]), rtol=0, atol=1e-4)
    for name, block in seen.items():
        rows = block[0].flatten(0, -2)[:6, :8]
        assert_close(
            rows,
            torch.from_numpy(golden[f"sample/{name}"]),
            rtol=0,
            atol=1e-4,
            msg=lambda m, n=name: f"{n}: {m}",
        )
        assert_close(
            block.flatten(1).std(1),
            torch.from_numpy(golden[f"per_image_std/{name}"]),
            rtol=0,
            atol=1e-4,
        )


@pytest.mark.parametrize(
    ("bits", "act_bits", "shape"),
    [
        (2, 2, {}),
        (3, 4, {"depth": 2, "side": 8, "patch": 4, "chans": 1}),
        (4, 4, {"qkr": False}),
        (2, 2, {"width": 384, "classes": 3}),
        (2, 3, {"qkr": False, "distilled": False}),
    ],
)
def test_deit(tmp_path, bits, act_bits, shape):
    state = authors.deit(**shape)
    net = qat.load_ofq_checkpoint(written(tmp_path, state), bits=bits, act_bits=act_bits)
    x = images(shape.get("side", 16), shape.get("chans", 3))
    assert_close(logits(net, x), authors.deit_logits(state, x, bits, act_bits), rtol=0, atol=1e-4)


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("bits", "shape"), [(2, {}), (4, {"qkr": False, "depths": (1, 2), "classes": 7})]
)
def test_swin(tmp_path, bits, shape):
    state = authors.swin(**shape)
    net = qat.load_ofq_checkpoint(written(tmp_path, state), model=SWIN, bits=bits)
    expected = authors.swin_logits(state, images(32), bits, bits)
    assert_close(logits(net, images(32)), expected, rtol=0, atol=1e-4)
    assert_close(net.layers[1].downsample.reduction.bias, state["features.2.reduction.bias"])
    assert net.layers[0].blocks[0].mlp.fc1.input_quantizer.num_stored_scales == 8, "one per column"
    qat.save(net, tmp_path / "ours.ckpt")
    again = qat.load(tmp_path / "ours.ckpt")
    assert torch.equal(logits(again, images(32)), logits(net, images(32)))
    merging = qat.load_float(tmp_path / "ours.ckpt").layers[1].downsample.reduction
    assert_close(merging.bias, state["features.2.reduction.bias"])


ARGS = {"wq_bitw": 2, "aq_bitw": 2, "model": TINY}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {
            "state_dict": {f"module.{k}": v for k, v in state.items()},
            "epoch": 309,
            "args": argparse.Namespace(**ARGS),
        },
        lambda state: {
            "state_dict_ema": {k: v + 1 for k, v in state.items()},
            "state_dict": state,
            "args": ARGS,
        },
        lambda state: {
            "state_dict": state,
            "optimizer": {"state": {}, "param_groups": []},
            "args": ARGS,
            "metric": 12.5,
        },
    ],
)
def test_wrappers_of_all_kinds(tmp_path, state, wrap):
    net = qat.load_ofq_checkpoint(written(tmp_path, wrap(state)), TINY, bits=2)
    assert_close(
        logits(net, images(16)), authors.deit_logits(state, images(16), 2, 2), rtol=0, atol=1e-4
    )
    assert not net.training


def test_bits_come_from_the_file_where_it_says_them(tmp_path, state):
    path = written(
        tmp_path, {"state_dict": state, "args": argparse.Namespace(wq_bitw=3, aq_bitw=4)}
    )
    recipe = qat.load_ofq_checkpoint(path).qat_conversion.recipe
    assert (recipe.bits, recipe.act_bits, recipe.attention, recipe.qk_bias) == (3, 4, "qkr", "drop")


def test_another_activation_than_gelu_is_refused(tmp_path, state):
    path = written(
        tmp_path, {"state_dict": state, "args": argparse.Namespace(wq_bitw=2, act_layer="relu")}
    )
    with usage_error(r"was trained with act_layer='relu'; must be 'gelu'$"):
        qat.load_ofq_checkpoint(path)


@pytest.mark.parametrize(
    ("change", "knobs", "message"),
    [
        ({}, {}, "bits=None: {} does not state the student's bits"),
        ({}, {"bits": 0}, "quant.bits=0: must be"),
        ({}, {"bits": 2, "act_bits": 0}, "quant.act_bits=0: must be"),
        ({}, {"bits": 2, "qkr": False}, "qkr=False: must be True; {} contains attn.q and attn.k"),
        ({}, {"bits": 2, "model": "nope"}, "model='nope': the weights of {} do not fit it"),
        ({}, {"bits": 2, "model": SWIN}, f"model='{SWIN}': the weights of {{}} do not fit it"),
        ({"head.weight": None}, {"bits": 2}, "{}: tensor head.weight is missing"),
        ({"cls_token": torch.ones(())}, {"bits": 2}, "{}: the shapes do not match any DeiT ("),
        ({"cls_token": torch.ones(1, 1, 0)}, {"bits": 2}, "{}: the shapes do not match any DeiT ("),
        (
            {f"layers.0.{TABLE}": torch.ones(9, 1), "head.fc.weight": torch.ones(2, 2)},
            {"bits": 2},
            f"{{}}: tensor layers.0.blocks.0.attn.{TABLE} is missing",
        ),
        (
            {TABLE: torch.ones(9, 1), "head.fc.weight": torch.ones(2, 2)},
            {"bits": 2},
            "{}: the shapes do not match any Swin (",
        ),
        (
            {"blocks.0.gamma": torch.ones(1)},
            {"bits": 2},
            "{}: tensor blocks.0.gamma has no counterpart in the model",
        ),
        (
            {"blocks.0.mlp.fc1.input_quant_fn.s": torch.ones(5)},
            {"bits": 2},
            "{}: blocks.0.mlp.fc1.input_quant_fn.s has shape (5,), expected (6,)",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(tmp_path, state, change, knobs, message):
    content = {k: v for k, v in (state | change).items() if v is not None}
    path = written(tmp_path, content)
    with pytest.raises(qat.UsageError) as error:
        qat.load_ofq_checkpoint(path, **knobs)
    assert str(error.value).startswith(message.format(f"ckpt={str(path)!r}"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "tensor", "said"),
    [
        ("blocks.2000.gamma", torch.ones(1), "much larger than the weights"),
        ("blocks.1000000000.gamma", torch.ones(1), "numbers must be from"),
        ("patch_embed.proj.move_b4.bias", torch.ones(1).expand(2**22), "takes much more memory"),
    ],
    ids=["depth", "huge depth", "image"],
)
def test_a_file_describes_no_net_that_is_much_larger_than_itself(
    tmp_path, state, name, tensor, said
):
    path = written(tmp_path, {**state, name: tensor})
    with usage_error(f"the shapes do not match any {TINY} .*{said}"):
        qat.load_ofq_checkpoint(path, bits=2)


def test_a_file_of_another_code_is_refused(tmp_path):
    path = written(tmp_path, timm.create_model("vit_tiny_patch16_224", depth=1).state_dict())
    with usage_error("no tensor ends with input_quant_fn.s"):
        qat.load_ofq_checkpoint(path, bits=2)


class Foreign:
    """What no safe file holds."""


def test_a_file_that_would_run_code_is_refused_with_a_way_out(tmp_path, state):
    path = written(tmp_path, {"state_dict": state, "logger": Foreign()})
    with usage_error(r"save only the state_dict\(\)") as error:
        qat.load_ofq_checkpoint(path, bits=2)
    assert "\n" not in str(error.value)


def test_bits_that_contradict_the_file_are_refused(tmp_path, state):
    path = written(tmp_path, {"state_dict": state, "args": argparse.Namespace(**ARGS)})
    for name, bits in (("bits", 3), ("act_bits", 4)):
        with usage_error(f"^{name}={bits}: .* was trained with 2"):
            qat.load_ofq_checkpoint(path, **{name: bits})
