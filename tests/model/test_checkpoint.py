"""Checkpoints. Oracle: the saved model, and a line about each file that is not a checkpoint."""

import argparse
import contextlib
import io
import math
import pickle
import pickletools
import re
import sys
import time
import zipfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import safetensors.torch
import torch
from timm.models.vision_transformer import VisionTransformer
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel

import qat
from qat.model.bounds import SizeLimit
from qat.model.checkpoint import read_checkpoint
from qat.model.metadata import classes_of, data_of
from qat.model.storage import build_from
from tests.errors import usage_error
from tests.nets import FAMILIES
from tests.payload import Payload
from tests.tiny import (
    DISTILLED,
    KWARGS,
    VIT,
    convert,
    converted,
    fitted,
    identical,
    logits,
    quantized,
    shake,
    vit,
    with_scales,
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "net.ckpt"


def saved(net, path, **arguments):
    qat.save(net, path, **arguments)
    return torch.load(path, weights_only=True)


def refused(path, *said):
    """The message of `qat.load`: one line that names the file and says what is wrong."""
    with usage_error(re.escape(f"ckpt={str(path)!r}: ")) as caught:
        qat.load(path)
    for part in said:
        assert part in str(caught.value)


@pytest.mark.sample(3)
@pytest.mark.parametrize("preset", ["ofq", "ofq_noqkr", "lsq", "seq", "minmax", "fp"])
@pytest.mark.parametrize("name", [VIT, DISTILLED])
def test_round_trip(preset, name, path):
    net = quantized(preset, name, **({} if preset == "fp" else {"bits": 2})).train()
    qat.save(net, path)
    random_state = torch.get_rng_state()
    loaded = qat.load(path)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not loaded.training
    assert type(loaded) is type(net)
    assert torch.equal(logits(loaded), logits(net))
    assert loaded.state_dict().keys() == net.state_dict().keys()
    assert qat.conversion_report(loaded) == qat.conversion_report(net)


def test_missing_scales_survive_as_missing(path):
    qat.save(converted(), path)
    with usage_error("not initialized"):
        qat.assert_ready(qat.load(path))


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("name", "pool"),
    [
        ("vit", None),
        ("vit", "avg"),
        ("siglip", "avg"),
        ("swin", "max"),
        ("swin", ""),
        ("hiera", "max"),
    ],
)
def test_a_new_head_is_rebuilt(path, name, pool):
    family = FAMILIES[name]
    net, x = family.build(), family.images()
    net.reset_classifier(3, pool)
    qat.save(fitted(net, x, "lsq"), path)
    assert torch.equal(logits(qat.load(path), x), logits(net, x))
    assert logits(net, x).shape[-1] == 3


def test_what_cannot_be_rebuilt_is_written_and_said(path, tmp_path):
    net = quantized("lsq")
    net.prune_intermediate_layers([0])
    for write, target in ((qat.save, path), (qat.save_pretrained, tmp_path)):
        with usage_error("^the file was written, but qat.load cannot rebuild"):
            write(net, target)
    assert read_checkpoint(path).state.keys() == net.state_dict().keys()


@pytest.mark.sample(1)
@pytest.mark.parametrize("preset", ["ofq", "lsq", "minmax"])
@pytest.mark.parametrize("name", [VIT, DISTILLED])
def test_a_new_head_of_a_quantized_net_is_in_float(path, preset, name):
    net = quantized(preset, name)
    net.reset_classifier(3)
    for _ in range(2):
        qat.save(net, path)
        again = qat.load(path)
        assert torch.equal(logits(again), logits(net))
        net = again
    frozen = qat.freeze(net)
    qat.save(frozen, path)
    assert torch.equal(logits(qat.load(path)), logits(frozen))


@pytest.mark.parametrize("rules", [{}, {"*": {"act_quantizer": "lsq"}}])
@pytest.mark.parametrize("num_classes", [0, 3])
def test_rules_for_a_head_do_not_hold_for_its_successor(path, num_classes, rules):
    net = quantized("lsq", overrides={"head": {"bits": 8}, **rules})
    net.reset_classifier(num_classes)
    qat.save(net, path)
    assert torch.equal(logits(qat.load(path)), logits(net))


def test_a_new_head_of_a_compiled_net(path):
    net = torch.compile(quantized("lsq"), backend="eager")
    net.reset_classifier(3)
    qat.save(net, path)
    assert torch.equal(logits(qat.load(path)), logits(net))


def test_a_head_that_was_put_there_by_hand_is_refused(path):
    net = vit()
    net.head = nn.Linear(net.head.in_features, 7)
    with usage_error("^save: the head has 7 outputs, num_classes=10"):
        qat.save(net, path)


@pytest.mark.parametrize("write", [qat.save, qat.export_onnx])
def test_a_folder_is_no_file(write, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    with usage_error(rf"path='{folder}': must be a file, not a folder"):
        write(quantized("deploy_w8a8"), folder)
    assert [path.name for path in tmp_path.rglob("*")] == ["folder"]


def test_content_is_plain_data(path):
    content = saved(quantized(bits=2), path)
    assert set(content) == {"qat", "state_dict"}
    meta = content["qat"]
    assert (meta["format_version"], meta["model"]) == (1, {"name": VIT, "kwargs": KWARGS})
    recipe = meta["recipe"]
    assert (recipe["name"], recipe["bits"], meta["input_size"]) == ("ofq", 2, [1, 8, 8])


def test_a_net_built_by_hand_is_described_by_its_caller(path):
    torch.manual_seed(0)
    net = with_scales(convert(shake(VisionTransformer(**KWARGS))))
    with usage_error("set model='timm name'"):
        qat.save(net, path)
    qat.save(net, path, model=VIT, model_kwargs=KWARGS)
    assert torch.equal(logits(qat.load(path)), logits(net))


@pytest.mark.parametrize(
    "meta",
    [
        {"data": {"classes": defaultdict(int)}},
        {"data": [1]},
        {"classes": [0, 1, 2]},
        {"classes": "cat"},
        {"classes": 3},
        {"classes": [np.str_("a")]},
    ],
)
def test_what_could_not_be_read_is_not_written(path, meta):
    with usage_error("save: data must be a dict of .*, classes a list of names"):
        qat.save(vit(), path, **meta)
    assert not path.exists()


def test_data_and_classes_come_back(path):
    data = {"mean": [0.5], "image_size": 8, "root": None, "nested": {"a": (1, 2.5), "b": True}}
    qat.save(vit(), path, data=data, classes=("a", "b"))
    assert (data_of(qat.load(path)), classes_of(qat.load(path))) == (data, ["a", "b"])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("net.onnx", "must be the checkpoint that it was exported from"),
        ("net.PTE", "must be the checkpoint that it was exported from"),
        ("photo.png", "must be a file of torch.save or safetensors"),
        ("empty.ckpt", "must be a file of torch.save or safetensors"),
    ],
)
def test_another_kind_of_file_is_not_called_damaged(tmp_path, name, said):
    (tmp_path / name).write_bytes(b"" if name.startswith("empty") else b"\x08\x0a\x12")
    refused(tmp_path / name, said)


@pytest.mark.parametrize("content", [b"", b"this is no checkpoint\n" * 50, 0.1, 0.5, 0.999])
def test_a_file_of_something_else_or_a_truncated_one(path, content):
    qat.save(quantized(), path)
    whole = path.read_bytes()
    path.write_bytes(content if isinstance(content, bytes) else whole[: int(content * len(whole))])
    refused(path, "not a checkpoint that can be read safely")


@pytest.mark.long
def test_a_flipped_byte_anywhere_is_noticed_or_harmless(path):
    qat.save(quantized(), path)
    whole, good = path.read_bytes(), read_checkpoint(path)
    with zipfile.ZipFile(path) as archive:
        directory = archive.start_dir
    noticed = 0
    for i in [*range(0, directory, 1009), *range(directory, len(whole), 17)]:
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 0x55]) + whole[i + 1 :])
        try:
            read = read_checkpoint(path)
            assert read.meta == good.meta
            assert identical(read.state, good.state)
        except qat.UsageError:
            noticed += 1
    assert noticed > 200


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("legacy", [True, False])
def test_code_in_a_pickle_is_not_run(path, tmp_path, legacy):
    victim = tmp_path / "executed"
    torch.save(
        {"state_dict": {"w": torch.ones(1)}, "x": Payload(victim)},
        path,
        _use_new_zipfile_serialization=not legacy,
    )
    refused(path, "not a checkpoint that can be read safely")
    path.write_bytes(pickle.dumps(Payload(victim)))
    refused(path, "not a checkpoint that can be read safely")
    assert not victim.exists()


def changed(path, change):
    """A checkpoint of ours after `change(content)`, or with these entries in its description."""
    content = saved(quantized(), path)
    if isinstance(change, dict):
        content["qat"] |= change
    else:
        change(content)
    torch.save(content, path)


OTHER_KIND = "was not written by qat (a value has the wrong type"


def with_weights(**tensors):
    return lambda content: content["state_dict"].update(tensors)


def with_arguments(**arguments):
    """The description of our net with other arguments for timm."""
    return {"model": {"name": VIT, "kwargs": KWARGS | arguments}}


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format_version": "2"}, OTHER_KIND),
        ({"data": {"model": 7}}, OTHER_KIND),
        ({"data": {"in_chans": [3], "mean": [0.5]}}, "data.mean=[0.5]: must be"),
        ({"format_version": 2}, "(format 2)"),
        ({"data": 3}, "its description of the model"),
        ({"model": None}, "its description of the model"),
        (with_weights(**{"head.bias": torch.zeros(7)}), f"weights do not fit {VIT}"),
        (lambda c: c["state_dict"].pop("head.bias"), "head.bias"),
        (with_weights(extra=torch.zeros(1)), "extra"),
    ],
    ids=[
        "version",
        "data",
        "mean",
        "newer",
        "data of a number",
        "no model",
        "another shape",
        "missing",
        "more",
    ],
)
def test_a_file_that_does_not_fit(path, change, said):
    changed(path, change)
    refused(path, said)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([1, 2], "contains a list; must contain a dictionary of tensors"),
        ({}, "must contain weights; has none"),
        (
            {
                "state_dict": {1: torch.zeros(1)},
                "optimizer_states": [{"param_groups": [{"lr": 1.0}, 3]}],
            },
            "must contain weights; has none",
        ),
        (vit().state_dict(), "does not name its model; set model="),
    ],
    ids=["list", "empty", "optimizer", "plain state dict"],
)
def test_content_that_is_no_model(path, content, said):
    torch.save(content, path)
    refused(path, said)


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("meta", "said"),
    [
        ({"model": {"name": VIT, "kwargs": {"colour": 1}}}, "colour"),
        ({"model": {"name": "hf-hub:someone/net", "kwargs": {}}}, "'hf-hub:someone/net'"),
        ({"model": {"name": "vit_nope", "kwargs": {}}}, "'vit_nope'"),
        ({**with_arguments(), "recipe": 3, "input_size": [1, 8, 8]}, "int"),
        ({**with_arguments(), "recipe": {"colour": 3}, "input_size": [1, 8, 8]}, "colour"),
        ({**with_arguments(), "recipe": {}, "input_size": [1, 8]}, "expected 4"),
        (with_arguments(pretrained=True), "argument pretrained is not allowed"),
        (with_arguments(checkpoint_path="/etc/hosts"), "argument checkpoint_path is not allowed"),
        (
            {**with_arguments(), "recipe": {"bits": 99}, "input_size": [1, 8, 8]},
            "quant.bits=99",
        ),
        ({**with_arguments(), "recipe": {}, "input_size": [1, 9, 9]}, "input_size=(1, 9, 9)"),
    ],
    ids=str,
)
def test_a_description_that_cannot_be_followed(path, meta, said):
    changed(path, lambda c: c.update(qat={"format_version": 1, **meta}))
    refused(path, "cannot build the model that the file describes", said)


@pytest.mark.parametrize("knob", ["weight_quantizer", "act_quantizer", "overrides"])
def test_a_file_imports_nothing(path, tmp_path, monkeypatch, knob):
    (tmp_path / "stranger.py").write_text("from qat.quantizers.lsq import LSQ as X\n")
    monkeypatch.syspath_prepend(tmp_path)
    name = {"blocks.*": {"weight_quantizer": "stranger:X"}} if knob == "overrides" else "stranger:X"
    changed(path, lambda c: c["qat"]["recipe"].update({knob: name}))
    refused(
        path,
        "quantizer='stranger:X': must be built in or from an imported module",
        "qat.load(path, imports=['stranger'])",
    )
    assert "stranger" not in sys.modules
    with contextlib.suppress(qat.UsageError):  # its weights are those of another quantizer
        qat.load(path, imports=["stranger"])
    assert sys.modules.pop("stranger").X


def with_quantizer(name):
    return lambda content: content["qat"]["recipe"].update(weight_quantizer=name)


@pytest.mark.parametrize(
    "name", ["os:system", "this:X", "unittest.__main__:X", "collections:OrderedDict", "qat:report"]
)
def test_a_file_names_no_other_code(path, name):
    changed(path, with_quantizer(name))
    before = set(sys.modules)
    refused(path, f"quantizer={name!r}: must be")
    assert not set(sys.modules) & {"this", "unittest.__main__"} - before


def nested(depth):
    return [nested(depth - 1)] if depth else 1


def shared(levels):
    """Ten to the power of `levels` values, of which a file holds few."""
    value = ["a"]
    for _ in range(levels):
        value = [value] * 10
    return value


LARGER = "the model is much larger than the weights of the file"
ANY_SIZE = with_arguments(pos_embed="none", dynamic_img_size=True)
LARGE = {"in_chans": 1, "image_size": 8000}
DEEP = {"nested": nested(150)}


@pytest.mark.sample(4)
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (with_arguments(depth=10**9), "argument depth=1000000000: numbers must be from -"),
        (with_arguments(depth=50_000), LARGER),
        (with_arguments(embed_dim=12_000), LARGER),
        (with_arguments(img_size=100_000), LARGER),
        ({**ANY_SIZE, "input_size": [1, 5000, 5000]}, "an image of (1, 5000, 5000) takes"),
        (
            {**ANY_SIZE, "recipe": None, "input_size": None, "data": LARGE},
            "an image of (1, 8000, 8000) takes",
        ),
        (
            {**ANY_SIZE, "recipe": None, "input_size": [3, 8, 8], "data": LARGE},
            "an image of (1, 8000, 8000) takes",
        ),
        (
            {**ANY_SIZE, "recipe": None, "input_size": None, "data": {"image_size": 8000}},
            "an image of (1, 8000, 8000) takes",
        ),
        (
            {**ANY_SIZE, "recipe": None, "pretrained_cfg": {"input_size": [1, 8000, 8000]}},
            "an image of (1, 8000, 8000) takes",
        ),
        ({"input_size": [1, 10**6, 10**6]}, OTHER_KIND),
        ({"data": DEEP}, "was not written by qat (has values at a depth of 32 or more"),
        (
            {"classes": shared(30)},
            "was not written by qat (contains more than 1000000 values",
        ),
        ({"classes": "0123456789"}, OTHER_KIND),
        ({"classes": {"0": "a"}}, OTHER_KIND),
        ({"classes": [*"012345678", 9]}, OTHER_KIND),
        ({"data": {"_target_": ["qat.data.Digits"]}}, OTHER_KIND),
    ],
    ids=[
        "depth",
        "blocks",
        "width",
        "positions",
        "tokens",
        "data",
        "data next to a small size",
        "data without channels",
        "pretrained",
        "image",
        "nested",
        "shared",
        "classes as text",
        "classes by number",
        "a class that is a number",
        "target",
    ],
)
def test_what_a_file_asks_for_has_bounds(path, change, said):
    changed(path, change)
    began = time.monotonic()
    refused(path, said)
    assert time.monotonic() - began < 20


def test_the_limits_of_a_file_are_not_those_of_other_threads(path):
    qat.save(quantized(), path)
    small = {"w": torch.zeros(1)}
    with ThreadPoolExecutor(1) as other, SizeLimit(small) as limit:
        large = other.submit(vit, embed_dim=1024, depth=4).result()
        assert sum(p.numel() for p in large.parameters()) > limit.numbers_left
        other.submit(qat.load, path).result()
        with pytest.raises(ValueError, match="the model is much larger than the weights"):
            vit(embed_dim=1024, depth=4)


@pytest.mark.sample(3)
@pytest.mark.parametrize("part", ["pretrained_cfg", "data"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("input_size", "abc"),
        ("input_size", [3, 10**6, 10**6]),
        ("mean", [0.5] * 4),
        ("mean", "abc"),
        ("std", [0.5, 0.5, 0]),
        ("crop_pct", -1),
        ("crop_pct", math.nan),
        ("crop_mode", "x"),
        ("interpolation", ["bicubic"]),
    ],
)
def test_images_that_cannot_be_prepared_are_refused(path, part, name, value):
    changed(path, {part: {"in_chans": 3, name: value}})
    refused(path, f"{part}.{name}={value!r}: must be ")


@pytest.mark.parametrize(
    ("weight", "kind"),
    [
        (torch.zeros(2, dtype=torch.complex64), "complex64"),
        (torch.eye(3).to_sparse(), "sparse_coo"),
        (torch.zeros(2, device="meta"), "without values"),
    ],
    ids=["complex", "sparse", "meta"],
)
@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
def test_weights_are_dense_real_numbers(path, weight, kind):
    changed(path, with_weights(**{"blocks.0.mlp.fc1.weight": weight}))
    refused(path, f"weight blocks.0.mlp.fc1.weight is {kind}; ")


@pytest.mark.parametrize("count", [1, 100])
def test_weights_have_no_more_numbers_than_the_file_has_room_for(path, count):
    """Views of one number, each below every bound of a tensor alone, would let the net be as large as they pretend."""
    view = torch.zeros(1).expand(10**8 // count)

    def change(content):
        content["state_dict"] |= {f"blocks.{i}.mlp.fc1.weight": view for i in range(count)}
        content["qat"]["model"]["kwargs"]["embed_dim"] = 12_000

    changed(path, change)
    size = path.stat().st_size
    refused(
        path,
        "is damaged, because the weights have",
        f"more than a file of {size} bytes can contain",
    )


def test_a_storage_that_is_only_promised_is_refused(path):
    """The old format of torch says how large a storage is, and which storages follow: here, none."""
    qat.save(quantized(), path)
    content = {**torch.load(path), "state_dict": {"w": torch.zeros(4)}}
    torch.save(content, path, _use_new_zipfile_serialization=False)
    data, four, many = path.read_bytes(), b"K\x04", b"\x8a\x05" + (10**8).to_bytes(5, "little")
    at = data.index(b"cpuq")
    at = data.index(four + b"N", at)
    data = data[:at] + many + data[at + 2 :].replace(four + b"\x85", many + b"\x85", 1)
    stops, file = [], io.BytesIO(data)
    for _ in range(4):
        list(pickletools.genops(file))
        stops.append(file.tell())
    path.write_bytes(data[: stops[-1]] + pickle.dumps([], protocol=2))
    refused(path, "is damaged, because the weights have 100000000 numbers")


def test_a_compressed_file_is_not_unpacked(path):
    qat.save(quantized(), path)
    content = {name: zipfile.ZipFile(path).read(name) for name in zipfile.ZipFile(path).namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    refused(path, "(the file is damaged: it is compressed, which torch.save never does)")


def test_formats(path):
    qat.save(quantized(), path)
    assert read_checkpoint(path, fmt="auto").meta == read_checkpoint(path, fmt="qat").meta
    assert read_checkpoint(path, fmt="timm").meta is None
    torch.save(vit().state_dict(), path)
    assert read_checkpoint(path, fmt="timm").meta is None
    with usage_error("must be a checkpoint of qat"):
        read_checkpoint(path, fmt="qat")
    with usage_error("ckpt_format='zip': must be one of auto, qat, timm"):
        read_checkpoint(path, fmt="zip")


def test_safetensors(tmp_path):
    state = vit().state_dict()
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    read = read_checkpoint(tmp_path / "model.safetensors")
    assert read.meta is None
    assert identical(read.state, state)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "half.safetensors").write_bytes(whole[: len(whole) // 2])
    refused(tmp_path / "half.safetensors", "not a checkpoint that can be read safely")


@pytest.mark.parametrize("key", [None, "state_dict", "model", "state_dict_ema"])
@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.net."]
)
def test_wrappers_leave_no_trace(path, key, prefix):
    state = {prefix + k: v for k, v in vit().state_dict().items()}
    torch.save({key: state, "epoch": 3, "model_ema": {}} if key else state, path)
    assert read_checkpoint(path).state.keys() == vit().state_dict().keys()


def test_a_compiled_block_leaves_no_trace(path, tmp_path):
    net = quantized()
    expected = logits(net)
    net.blocks[1] = torch.compile(net.blocks[1], backend="eager")
    qat.save(net, path)
    assert torch.equal(logits(qat.load(path)), expected)
    shared = qat.from_pretrained(qat.save_pretrained(net, tmp_path / "shared"))
    assert shared.state_dict().keys() == qat.freeze(quantized()).state_dict().keys()


@pytest.mark.sample(1)
@pytest.mark.parametrize("wrap", [nn.DataParallel, AveragedModel, ModelEmaV3])
def test_a_wrapper_is_refused_and_what_it_holds_is_saved(path, wrap):
    net = wrap(quantized())
    with usage_error(r"if this model is a wrapper, save net\.module"):
        qat.save(net, path)
    qat.save(net.module, path)
    assert torch.equal(logits(qat.load(path)), logits(net.module))


def test_training_checkpoint(path):
    net = quantized()
    content = saved(net, path)
    state = {f"net.{name}": tensor for name, tensor in content["state_dict"].items()}
    content |= {
        "pytorch-lightning_version": "2.6.6",
        "global_step": 7,
        "optimizer_states": [{"lr": 0.1}],
        "state_dict": {"loss.weight": torch.ones(1)} | state,
    }
    torch.save(content, path)
    read = read_checkpoint(path)
    assert read.step == 7
    assert torch.equal(logits(build_from(read)), logits(net))


def test_checkpoints_of_timms_trainer(path):
    state = vit().state_dict()
    arguments = argparse.Namespace(lr=0.1)
    torch.save({"state_dict": state, "args": arguments}, path)
    assert read_checkpoint(path).state.keys() == state.keys()
    averaged = {name: tensor + 1 for name, tensor in state.items()}
    torch.save({"arch": VIT, "state_dict": state, "state_dict_ema": averaged}, path)
    assert torch.equal(read_checkpoint(path).state["head.bias"], averaged["head.bias"])


@pytest.mark.sample(4)
@pytest.mark.parametrize("name", ["blocks.0.mlp.fc1.weight", "pos_embed", "running_mean"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("make", [quantized, converted, vit])
def test_numbers_that_are_not_finite_are_refused(path, monkeypatch, make, name, value):
    content = saved(make(), path)
    content["state_dict"] |= {"running_mean": torch.zeros(2)}
    content["state_dict"][name].view(-1)[-1] = value
    torch.save(content, path)
    create = qat.model.storage._build

    def with_statistics(*arguments):
        built = create(*arguments)
        built.register_buffer("running_mean", torch.zeros(2))
        return built

    monkeypatch.setattr(qat.model.storage, "_build", with_statistics)
    kind = "buffer" if name == "running_mean" else "weight"
    refused(path, f"{kind} {name} is NaN or infinite")
