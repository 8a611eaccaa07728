"""Checkpoints. Oracle: the net that was saved, and one line for every file that is none."""

import contextlib
import io
import math
import pickle
import pickletools
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
from tests.campaign.checkpoints import Payload
from tests.nets import FAMILIES
from tests.tiny import (
    DISTILLED,
    KWARGS,
    SIZE,
    VIT,
    converted,
    images,
    logits,
    quantized,
    shake,
    vit,
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "net.ckpt"


def saved(net, path, **arguments):
    qat.save(net, path, **arguments)
    return torch.load(path, weights_only=True)


def refused(path, *said):
    """The message of `qat.load`: one line that names the file and says what is wrong."""
    with pytest.raises(qat.UsageError) as caught:
        qat.load(path)
    message = str(caught.value)
    assert f"ckpt={str(path)!r}: " in message
    assert "\n" not in message
    for part in said:
        assert part in message


@pytest.mark.parametrize("preset", ["ofq", "ofq_noqkr", "lsq", "seq", "minmax", "fp"])
@pytest.mark.parametrize("name", [VIT, DISTILLED])
def test_round_trip(preset, name, path):
    net = quantized(preset, name, **({} if preset == "fp" else {"bits": 2})).train()
    qat.save(net, path)
    loaded = qat.load(path)
    assert not loaded.training
    assert type(loaded) is type(net)
    assert torch.equal(logits(loaded), logits(net))
    assert loaded.state_dict().keys() == net.state_dict().keys()
    assert qat.conversion_report(loaded) == qat.conversion_report(net)


def test_missing_scales_survive_as_missing(path):
    qat.save(converted(), path)
    with pytest.raises(qat.UsageError, match="not initialised"):
        qat.assert_ready(qat.load(path))


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
    net, x = FAMILIES[name].build(), FAMILIES[name].images()
    net.reset_classifier(3, pool)
    qat.convert(net, qat.recipe("lsq"), input_size=FAMILIES[name].input_size)
    qat.initialize_scales(net, [x])
    qat.save(net, path)
    assert torch.equal(logits(qat.load(path), x), logits(net, x))
    assert logits(net, x).shape[-1] == 3


def test_what_cannot_be_rebuilt_is_written_and_said(path, tmp_path):
    net = quantized("lsq")
    net.prune_intermediate_layers([0])
    with pytest.raises(qat.UsageError, match="^save: written, but qat.load cannot rebuild"):
        qat.save(net, path)
    assert read_checkpoint(path).state.keys() == net.state_dict().keys()
    with pytest.raises(qat.UsageError, match="^save: written, but qat.load cannot rebuild"):
        qat.save_pretrained(net, tmp_path)


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


def test_a_head_that_was_put_there_by_hand_is_refused(path):
    net = vit()
    net.head = nn.Linear(net.head.in_features, 7)
    with pytest.raises(
        qat.UsageError,
        match=r"save: the head has 7 outputs, num_classes=10; net.reset_classifier\(7\) sets both",
    ):
        qat.save(net, path)


@pytest.mark.parametrize("write", [qat.save, qat.export_onnx])
def test_a_folder_is_no_file(write, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(qat.UsageError, match=rf"path='{folder}': must be a file, not a folder"):
        write(quantized("deploy_w8a8"), folder)
    assert [path.name for path in tmp_path.rglob("*")] == ["folder"]


def test_content_is_plain_data(path):
    content = saved(quantized("ofq", bits=2), path)
    assert set(content) == {"qat", "state_dict"}
    meta = content["qat"]
    assert meta["format_version"] == 1
    assert meta["model"] == {"name": VIT, "kwargs": KWARGS}
    assert (meta["recipe"]["name"], meta["recipe"]["bits"], meta["input_size"]) == (
        "ofq",
        2,
        [1, 8, 8],
    )


def test_a_net_built_by_hand_is_described_by_its_caller(path):
    torch.manual_seed(0)
    net = shake(VisionTransformer(**{**KWARGS, "num_classes": 10}))
    qat.convert(net, qat.recipe("ofq"), input_size=SIZE)
    qat.initialize_scales(net, [images()])
    with pytest.raises(qat.UsageError, match="set model='timm name'"):
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
    with pytest.raises(
        qat.UsageError, match="save: data must be a dict of .*, classes a list of names"
    ):
        qat.save(vit(), path, **meta)
    assert not path.exists()


def test_data_and_classes_come_back(path):
    data = {"mean": [0.5], "image_size": 8, "root": None, "nested": {"a": (1, 2.5), "b": True}}
    qat.save(vit(), path, data=data, classes=("a", "b"))
    assert (data_of(qat.load(path)), classes_of(qat.load(path))) == (data, ["a", "b"])


@pytest.mark.parametrize("content", [b"", b"this is no checkpoint\n" * 50, b"hello there\n"])
def test_a_file_of_something_else(path, content):
    path.write_bytes(content)
    refused(path, "not a checkpoint that can be read safely")


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


def test_missing_file(tmp_path):
    refused(tmp_path / "nowhere.ckpt", "no such file")
    refused(tmp_path, "must be a file, not a folder")


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.999])
def test_truncated_file(path, fraction):
    qat.save(quantized(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(fraction * len(whole))])
    refused(path, "not a checkpoint that can be read safely")


def same(a, b):
    return (
        a.meta == b.meta
        and a.state.keys() == b.state.keys()
        and all(torch.equal(a.state[k], b.state[k]) for k in a.state)
    )


def test_a_flipped_byte_anywhere_is_noticed_or_harmless(path):
    qat.save(quantized(), path)
    whole, good = path.read_bytes(), read_checkpoint(path)
    with zipfile.ZipFile(path) as archive:
        directory = archive.start_dir
    noticed = 0
    for i in [*range(0, directory, 1009), *range(directory, len(whole), 17)]:
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 0x55]) + whole[i + 1 :])
        try:
            assert same(read_checkpoint(path), good)
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
    """A checkpoint of ours after `change(content)`."""
    content = saved(quantized(), path)
    change(content)
    torch.save(content, path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda c: c["qat"].update(format_version="2"),
            "its description of the model: has something of another kind",
        ),
        (
            lambda c: c["qat"].update(data={"model": 7}),
            "its description of the model: has something of another kind",
        ),
        (
            lambda c: c["qat"].update(data={"in_chans": [3], "mean": [0.5]}),
            "its data.mean=[0.5]: must be a finite number for each",
        ),
        (
            lambda c: c["qat"].update(format_version=2),
            "written by a newer qat (format 2); this one reads up to 1",
        ),
        (
            lambda c: c["state_dict"].update({"head.bias": torch.zeros(7)}),
            f"weights do not fit {VIT}",
        ),
        (lambda c: c["state_dict"].pop("head.bias"), "head.bias"),
        (lambda c: c["state_dict"].update({"extra": torch.zeros(1)}), "extra"),
    ],
)
def test_a_file_that_does_not_fit(path, change, said):
    changed(path, change)
    refused(path, said)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([1, 2], "holds a list, expected a dictionary of tensors"),
        ({}, "holds no weights"),
        (
            {
                "state_dict": {1: torch.zeros(1)},
                "optimizer_states": [{"param_groups": [{"lr": 1.0}, 3]}],
            },
            "holds no weights",
        ),
    ],
)
def test_content_without_weights(path, content, said):
    torch.save(content, path)
    refused(path, said)


def test_a_plain_state_dict_does_not_say_what_it_is(path):
    torch.save(vit().state_dict(), path)
    refused(path, "does not say which model it holds; set model=")


@pytest.mark.parametrize(
    ("meta", "said"),
    [
        ({"model": {"name": VIT, "kwargs": {"colour": 1}}}, "colour"),
        (
            {"model": {"name": "hf-hub:someone/net", "kwargs": {}}},
            "timm has no model 'hf-hub:someone/net'",
        ),
        (
            {"model": {"name": VIT, "kwargs": {**KWARGS, "pretrained": True}}},
            "argument pretrained is not allowed",
        ),
        (
            {"model": {"name": VIT, "kwargs": {**KWARGS, "checkpoint_path": "/etc/hosts"}}},
            "argument checkpoint_path is not allowed",
        ),
        (
            {
                "model": {"name": VIT, "kwargs": KWARGS},
                "recipe": {"bits": 99},
                "input_size": [1, 8, 8],
            },
            "quant.bits=99",
        ),
        (
            {"model": {"name": VIT, "kwargs": KWARGS}, "recipe": {}, "input_size": [1, 9, 9]},
            "input_size=(1, 9, 9)",
        ),
    ],
    ids=str,
)
def test_a_description_that_cannot_be_followed(path, meta, said):
    changed(path, lambda c: c.update(qat={"format_version": 1, **meta}))
    refused(path, "cannot build the model it describes", said)


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


@pytest.mark.parametrize(
    "name", ["os:system", "this:X", "unittest.__main__:X", "collections:OrderedDict", "qat:report"]
)
def test_a_file_names_no_other_code(path, name):
    changed(path, lambda c: c["qat"]["recipe"].update(weight_quantizer=name))
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


ANY_SIZE, LARGE = (
    {"pos_embed": "none", "dynamic_img_size": True},
    {"in_chans": 1, "image_size": 8000},
)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda c: c["qat"]["model"]["kwargs"].update(depth=10**9),
            "argument depth=1000000000 must be at most",
        ),
        (
            lambda c: c["qat"]["model"]["kwargs"].update(depth=50_000),
            "the model is much larger than the weights of the file",
        ),
        (
            lambda c: c["qat"]["model"]["kwargs"].update(embed_dim=12_000),
            "the model is much larger than the weights of the file",
        ),
        (
            lambda c: c["qat"]["model"]["kwargs"].update(img_size=100_000),
            "the model is much larger than the weights of the file",
        ),
        (
            lambda c: c["qat"].update(
                model={"name": VIT, "kwargs": {**KWARGS, **ANY_SIZE}}, input_size=[1, 5000, 5000]
            ),
            "an image of (1, 5000, 5000) takes much more memory than the weights of the file",
        ),
        (
            lambda c: c["qat"].update(
                model={"name": VIT, "kwargs": {**KWARGS, **ANY_SIZE}},
                recipe=None,
                input_size=None,
                data=LARGE,
            ),
            "an image of (1, 8000, 8000) takes much more memory than the weights of the file",
        ),
        *(
            (
                lambda c, sizes=sizes: c["qat"].update(
                    model={"name": VIT, "kwargs": {**KWARGS, **ANY_SIZE}}, recipe=None, **sizes
                ),
                "an image of (1, 8000, 8000) takes much more memory than the weights of the file",
            )
            for sizes in (
                {"input_size": [3, 8, 8], "data": LARGE},
                {"input_size": None, "data": {"image_size": 8000}},
                {"pretrained_cfg": {"input_size": [1, 8000, 8000]}},
            )
        ),
        (
            lambda c: c["qat"].update(input_size=[1, 10**6, 10**6]),
            "its description of the model: has something of another kind",
        ),
        (
            lambda c: c["qat"].update(data={"nested": nested(150)}),
            "its description of the model: is nested more than 32 deep",
        ),
        (
            lambda c: c["qat"].update(classes=shared(30)),
            "its description of the model: holds more than 1000000 values",
        ),
        *(
            (
                lambda c, classes=classes: c["qat"].update(classes=classes),
                "its description of the model: has something of another kind",
            )
            for classes in ("0123456789", {"0": "a"}, [*"012345678", 9])
        ),
        (
            lambda c: c["qat"].update(data={"_target_": ["qat.data.Digits"]}),
            "its description of the model: has something of another kind",
        ),
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


@pytest.mark.parametrize("part", ["pretrained_cfg", "data"])
@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("input_size", "abc", "must be channels, height and width, integers from 1 to 16384"),
        (
            "input_size",
            [3, 10**6, 10**6],
            "must be channels, height and width, integers from 1 to 16384",
        ),
        ("mean", [0.5] * 4, "must be a finite number for each of the 3 channels"),
        ("mean", "abc", "must be a finite number for each of the 3 channels"),
        ("std", [0.5, 0.5, 0], "must be a finite number above 0 for each of the 3 channels"),
        ("crop_pct", -1, "must be a number from 0.1 to 2"),
        ("crop_pct", math.nan, "must be a number from 0.1 to 2"),
        ("crop_mode", "x", "must be one of center, squash, border"),
        ("interpolation", ["bicubic"], "must be one of nearest, bilinear, bicubic, lanczos"),
    ],
)
def test_images_that_cannot_be_prepared_are_refused(path, part, name, value, said):
    changed(path, lambda c: c["qat"].update({part: {"in_chans": 3, name: value}}))
    refused(path, f"{part}.{name}={value!r}: {said}")


@pytest.mark.parametrize(
    ("weight", "said"),
    [
        (torch.zeros(2, dtype=torch.complex64), "is complex64; weights must be dense real numbers"),
        (torch.eye(3).to_sparse(), "is sparse_coo; weights must be dense real numbers"),
        (torch.zeros(2, device="meta"), "is without values; weights must be dense real numbers"),
    ],
    ids=["complex", "sparse", "meta"],
)
@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
def test_weights_are_dense_real_numbers(path, weight, said):
    changed(path, lambda c: c["state_dict"].update({"blocks.0.mlp.fc1.weight": weight}))
    refused(path, f"its weight blocks.0.mlp.fc1.weight {said}")


@pytest.mark.parametrize("count", [1, 100])
def test_weights_have_no_more_numbers_than_the_file_has_room_for(path, count):
    """Views of one number, each below every bound of a tensor alone, would let the net be as large as they pretend."""
    views = {
        f"blocks.{i}.mlp.fc1.weight": torch.zeros(1).expand(10**8 // count) for i in range(count)
    }
    changed(
        path,
        lambda c: (
            c["state_dict"].update(views),
            c["qat"]["model"]["kwargs"].update(embed_dim=12_000),
        ),
    )
    refused(
        path,
        "is damaged: its weights have",
        f"numbers, more than a file of {path.stat().st_size} bytes holds",
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
    refused(path, "is damaged: its weights have 100000000 numbers")


def test_a_compressed_file_is_not_unpacked(path):
    qat.save(quantized(), path)
    content = {name: zipfile.ZipFile(path).read(name) for name in zipfile.ZipFile(path).namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    refused(path, "(it is damaged (it is compressed, which torch.save never does))")


def test_formats(path):
    qat.save(quantized(), path)
    assert read_checkpoint(path, fmt="auto").meta == read_checkpoint(path, fmt="qat").meta
    assert read_checkpoint(path, fmt="timm").meta is None
    torch.save(vit().state_dict(), path)
    assert read_checkpoint(path, fmt="timm").meta is None
    with pytest.raises(qat.UsageError, match="not a checkpoint of qat"):
        read_checkpoint(path, fmt="qat")
    with pytest.raises(qat.UsageError, match="ckpt_format='zip': must be one of auto, qat, timm"):
        read_checkpoint(path, fmt="zip")


def test_safetensors(tmp_path):
    state = vit().state_dict()
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    read = read_checkpoint(tmp_path / "model.safetensors")
    assert read.meta is None
    assert read.state.keys() == state.keys()
    assert all(torch.equal(read.state[k], state[k]) for k in state)
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
    assert (
        qat.from_pretrained(qat.save_pretrained(net, tmp_path / "shared")).state_dict().keys()
        == qat.freeze(quantized()).state_dict().keys()
    )


@pytest.mark.parametrize("wrap", [nn.DataParallel, AveragedModel, ModelEmaV3])
def test_a_wrapper_is_refused_and_what_it_holds_is_saved(path, wrap):
    net = wrap(quantized())
    with pytest.raises(qat.UsageError, match=r"save net\.module if it is a wrapper"):
        qat.save(net, path)
    qat.save(net.module, path)
    assert torch.equal(logits(qat.load(path)), logits(net.module))


@pytest.mark.long
def test_compiled_in_place_saves_the_same_names(path):
    net = quantized()
    net.compile(backend="eager")
    qat.save(net, path)
    assert torch.equal(logits(qat.load(path)), logits(net))


def test_training_checkpoint(path):
    net = quantized()
    lightning = {
        "pytorch-lightning_version": "2.6.6",
        "global_step": 7,
        "optimizer_states": [{"lr": 0.1}],
    }
    changed(
        path,
        lambda c: c.update(
            lightning,
            state_dict={"loss.weight": torch.ones(1)}
            | {f"net.{k}": v for k, v in c["state_dict"].items()},
        ),
    )
    read = read_checkpoint(path)
    assert read.step == 7
    assert torch.equal(logits(build_from(read)), logits(net))


def test_of_timms_trainer_the_averaged_weights_are_read(path):
    trained, averaged = (
        vit().state_dict(),
        {name: tensor + 1 for name, tensor in vit().state_dict().items()},
    )
    torch.save({"arch": VIT, "state_dict": trained, "state_dict_ema": averaged}, path)
    assert torch.equal(read_checkpoint(path).state["head.bias"], averaged["head.bias"])


def test_arguments_of_timms_trainer_are_read(path):
    import argparse

    torch.save({"state_dict": vit().state_dict(), "args": argparse.Namespace(lr=0.1)}, path)
    assert read_checkpoint(path).state.keys() == vit().state_dict().keys()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("blocks.0.mlp.fc1.weight", "its weight blocks.0.mlp.fc1.weight holds NaN or infinity"),
        ("pos_embed", "its weight pos_embed holds NaN or infinity"),
        ("running_mean", "its buffer running_mean holds NaN or infinity"),
    ],
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("make", [quantized, converted, vit])
def test_numbers_that_are_not_finite_are_refused(path, monkeypatch, make, damage, said, value):
    net = make()
    content = saved(net, path)
    content["state_dict"] |= {"running_mean": torch.zeros(2)}
    content["state_dict"][damage].view(-1)[-1] = value
    torch.save(content, path)
    create = qat.model.storage._build

    def with_statistics(*arguments):
        built = create(*arguments)
        built.register_buffer("running_mean", torch.zeros(2))
        return built

    monkeypatch.setattr(qat.model.storage, "_build", with_statistics)
    refused(path, said)
