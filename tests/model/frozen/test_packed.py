"""Packed files. Oracle: the frozen net that was written, bit for bit; the sum of its parts."""

import base64
import json
import zlib

import pytest
import safetensors
import safetensors.torch
import torch

import qat
from qat.model.cost import cost
from qat.model.metadata import describe
from qat.model.packed import write_packed
from qat.model.start import from_net
from qat.model.transfer import timm_state_dict
from tests import tiny
from tests.errors import usage_error
from tests.model.frozen.test_freeze import RECIPES, made


def written(net, path):
    return write_packed(
        net, path, describe(net, data={"image_size": 8}, classes=list("abcdefghij"))
    )


BRIEF = ("ofq_2bit", "mixed")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in BRIEF else pytest.mark.long) for name in RECIPES],
)
def test_a_file_gives_the_frozen_net_back(name, tmp_path):
    frozen = qat.freeze(made(RECIPES[name]))
    written(frozen, tmp_path / "net.safetensors")
    again = qat.load(tmp_path / "net.safetensors")
    assert list(again.state_dict()) == list(frozen.state_dict())
    for key, value in frozen.state_dict().items():
        assert again.state_dict()[key].dtype == value.dtype
        assert torch.equal(again.state_dict()[key], value)
    x = tiny.images(4, 1)
    assert torch.equal(again(x), frozen(x))


def test_what_was_found_by_calibration_comes_back(tmp_path):
    recipe = qat.PtqRecipe(bits=4, bias_correction=True, layernorm="integer", act_bits=8)
    # An image without negative values: the range of its codes is not in the recipe.
    frozen = qat.freeze(tiny.fitted(tiny.vit(), tiny.images().abs(), recipe))
    written(frozen, tmp_path / "net.safetensors")
    assert torch.equal(qat.load(tmp_path / "net.safetensors")(tiny.images()), frozen(tiny.images()))


def test_a_file_is_as_large_as_its_parts(tmp_path):
    net = made(RECIPES["ofq_2bit"])
    frozen = qat.freeze(net)
    sizes = written(frozen, tmp_path / "net.safetensors")
    bits = [
        site.latent().numel() * site.quantizer.spec.bits
        for site in qat.iter_quantizers(net)
        if site.is_weight
    ]
    assert sum(sizes.values()) == (tmp_path / "net.safetensors").stat().st_size
    assert sizes["codes"] == sum(-(-n // 8) for n in bits)
    floats = sum(
        4 * value.numel()
        for key, value in frozen.state_dict().items()
        if value.is_floating_point()
        and not key.endswith("shift")
        and not (value == value.flatten()[0]).all()
    )
    bounds = 8 * sum(key.endswith("bounds") for key in frozen.state_dict())
    assert sizes["scales"] + sizes["offsets"] + sizes["rest"] == floats + bounds


def test_cost_counts_codes(tmp_path):
    net = made(RECIPES["ofq_2bit"])
    before, after = cost(net, tiny.SIZE), cost(qat.freeze(net), tiny.SIZE)
    assert after.bitops == before.bitops
    assert after.macs == before.macs
    folded = (
        2 * (32 + 32 + 128 + 32) + 32
    )  # behind the inputs of proj, fc1, fc2 and head, in front of v
    assert before.size_bytes - after.size_bytes == 4 * (
        folded + 1
    )  # and whether the image has a sign
    written(qat.freeze(net), tmp_path / "net.safetensors")
    assert cost(qat.load(tmp_path / "net.safetensors"), tiny.SIZE) == after


@pytest.fixture
def path(tmp_path):
    """A packed file."""
    written(qat.freeze(made(RECIPES["ofq_2bit"])), tmp_path / "net.safetensors")
    return tmp_path / "net.safetensors"


def test_a_file_of_another_version_is_one_line(path):
    path.write_bytes(path.read_bytes().replace(b'"format":"packed-1"', b'"format":"packed-9"'))
    with usage_error("format 'packed-9'"):
        qat.load(path)


def parts_of(path):
    """Metadata and tensors of a file."""
    with safetensors.safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in ("codes", "floats")}
        return file.metadata(), tensors


def save_older(path, metadata, tensors):
    """A file with the checksum of older files."""
    content = b"".join(tensors[name].numpy().tobytes() for name in ("codes", "floats"))
    checksum = f"{zlib.crc32(content):08x}"
    safetensors.torch.save_file(tensors, path, metadata | {"crc32": checksum})


def test_any_flipped_bit_is_noticed_and_an_older_file_is_read(path):
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for at in [*range(0, header, 7), *range(header, len(whole), 1009)]:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        with usage_error("net.safetensors'"):
            qat.load(path)
    path.write_bytes(whole)
    x, net = tiny.images(4, 1), qat.load(path)
    save_older(path, *parts_of(path))
    assert torch.equal(qat.load(path)(x), net(x))


@pytest.mark.parametrize(
    ("index", "line"),
    [
        (
            [["head.weight", [2**40], "c", 0.0, "float32"]],
            "constant tensors of 1099511627776 numbers",
        ),
        (
            [
                ["head.weight", [2**40], "c", 0.0, "float32"],
                ["head.bias", [-(2**40)], "c", 0.0, "float32"],
            ],
            "constant tensors of 1099511627776 numbers",
        ),
        ([["head.weight", [10**9], "f", "float32"]], "not a checkpoint"),
        ([["head.weight", [4], "f", "load"]], "not a checkpoint"),
        ([], "more data than the index lists"),
        ([["n" * 2**24, [1], "c", 0.0, "float32"]], "Unterminated string"),
    ],
    ids=[
        "a large constant",
        "a sum that is small",
        "more floats than there are",
        "no dtype",
        "nothing",
        "a large index",
    ],
)
def test_a_file_that_lies_is_one_line(index, line, path):
    metadata, tensors = parts_of(path)
    metadata["index"] = base64.b64encode(zlib.compress(json.dumps(index).encode())).decode()
    save_older(path, metadata, tensors)
    with usage_error(line):
        qat.load(path)


@pytest.mark.parametrize("name", ["deploy_w8a8", "lsq_4bit", "statsq_2bit"])
def test_a_net_starts_from_the_numbers_that_codes_stand_for(name, tmp_path):
    net = made(qat.recipe(name))
    written(qat.freeze(net), tmp_path / "net.safetensors")
    packed = qat.load(tmp_path / "net.safetensors")
    start = from_net(tiny.VIT, tiny.KWARGS, packed, origin="ckpt='net'", reset_head=False)
    quantized = {
        site.name.replace("_quantizer", ""): site.quantizer(site.latent())
        for site in qat.iter_quantizers(net)
        if site.is_weight
    }
    names = {"patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "head.weight"}
    assert names <= quantized.keys()
    state = start.net.state_dict()
    for name, weight in timm_state_dict(net).items():
        torch.testing.assert_close(state[name], quantized.get(name, weight), rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", ["ofq_2bit", "ofq_noqkr_4bit", "seq_2bit"])
def test_nothing_goes_on_from_folded_weights(name, tmp_path):
    written(qat.freeze(made(RECIPES[name])), tmp_path / "net.safetensors")
    net = qat.load(tmp_path / "net.safetensors")
    with usage_error("^ckpt='net': contains only integer codes"):
        from_net(tiny.VIT, tiny.KWARGS, net, origin="ckpt='net'", reset_head=False)
    with usage_error("weight_quantizer contains only integer codes"):
        next(site for site in qat.iter_quantizers(net) if site.is_weight).latent()
