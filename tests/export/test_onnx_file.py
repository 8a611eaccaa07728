"""`qat.export_onnx`. Oracle: the net itself."""

import copy
import gc
import json
import os
import signal

import onnx
import pytest
import timm
import torch

import qat
from qat.export import onnx_file
from qat.export.check import Checked
from qat.export.session import LEVELS, OPENVINO, Onnxruntime, OpenVino, logits_of, open_session
from qat.model.frozen.agreement import Agreement
from tests import tiny
from tests.model.frozen.test_freeze import made

NET = {"img_size": 8, "in_chans": 1, "patch_size": 2, "embed_dim": 24, "depth": 1, "num_heads": 3, "num_classes": 5}


@pytest.fixture
def net():
    made = qat.convert(timm.create_model("vit_tiny_patch16_224", **NET), qat.recipe("deploy_w8a8"), input_size=(1, 8, 8))
    return qat.initialize_scales(made, [torch.randn(8, 1, 8, 8)])


def test_a_net_converted_in_python(net, tmp_path):
    net.train()
    x = torch.randn(4, 1, 8, 8)
    checked = qat.export_onnx(net, tmp_path / "new" / "net.onnx", images=x)
    assert net.training
    assert checked.agreement["ORT_ENABLE_ALL"].images == 4
    torch.testing.assert_close(logits_of(open_session(tmp_path / "new" / "net.onnx"), x), net.eval()(x), rtol=0, atol=1e-4)
    model = onnx.load(tmp_path / "new" / "net.onnx")
    assert ([value.name for value in model.graph.input], [value.name for value in model.graph.output]) == (["image"], ["logits"])
    said = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert (said["qat.preprocessing"]["size"], said["qat"]["recipe"]["name"]) == (8, "deploy")


def test_modules_keep_their_modes(net, tmp_path):
    net.train()
    net.blocks[0].eval()
    before = [module.training for module in net.modules()]
    qat.export_onnx(net, tmp_path / "net.onnx", images=torch.randn(4, 1, 8, 8))
    assert [module.training for module in net.modules()] == before


def test_a_net_in_double_precision(net, tmp_path):
    x = torch.randn(4, 1, 8, 8)
    qat.export_onnx(copy.deepcopy(net).double(), tmp_path / "net.onnx", images=x.double())
    torch.testing.assert_close(logits_of(open_session(tmp_path / "net.onnx"), x), net.eval()(x), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("images", "what"),
    [
        (torch.zeros(1, 8, 8), r"torch.float32 of \(1, 8, 8\)"),
        (torch.zeros(0, 1, 8, 8), r"torch.float32 of \(0, 1, 8, 8\)"),
        (torch.zeros(2, 1, 16, 8), r"torch.float32 of \(2, 1, 16, 8\)"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), r"torch.uint8 of \(2, 1, 8, 8\)"),
    ],
)
def test_images_that_do_not_fit(net, tmp_path, images, what):
    with pytest.raises(qat.UsageError, match=rf"images: {what}; must be floating-point of \(at least 1, 1, 8, 8\)"):
        qat.export_onnx(net, tmp_path / "net.onnx", images=images)
    assert list(tmp_path.iterdir()) == []


def test_images_of_any_size_have_the_nets_channels(net, tmp_path):
    with pytest.raises(qat.UsageError, match=r"images: .*; must be floating-point of \(at least 1, 1, height, width\)"):
        qat.export_onnx(net, tmp_path / "net.onnx", images=torch.zeros(2, 3, 16, 8), dynamic_size=True)
    with pytest.raises(qat.UsageError, match="dynamic_size=true: this net takes images of one size"):
        qat.export_onnx(net, tmp_path / "net.onnx", images=torch.zeros(2, 1, 16, 8), dynamic_size=True)


def test_without_images_noise_does(net, tmp_path):
    assert qat.export_onnx(qat.freeze(net), tmp_path / "net.onnx", target="tensorrt").agreement["ORT_ENABLE_BASIC"].images == 16


def test_images_that_are_not_square(tmp_path):
    size = (1, 8, 16)
    made = qat.convert(timm.create_model("vit_tiny_patch16_224", **NET | {"img_size": (8, 16)}), qat.recipe("deploy_w8a8"), input_size=size)
    qat.export_onnx(qat.initialize_scales(made, [torch.randn(8, *size)]), tmp_path / "net.onnx", images=torch.randn(4, *size))
    said = {entry.key for entry in onnx.load(tmp_path / "net.onnx").metadata_props}
    assert "qat" in said
    assert "qat.preprocessing" not in said


def test_a_file_that_disagrees_is_kept_under_another_name(net, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_file, "check_onnx", lambda *_: type("No", (Checked,), {"problem": "it is blue"})())
    (tmp_path / "net.onnx").write_text("the older one")
    with pytest.raises(qat.UsageError, match=r"does not agree with the checkpoint \(it is blue\); kept as .*net.onnx.rejected"):
        qat.export_onnx(net, tmp_path / "net.onnx")
    assert (tmp_path / "net.onnx").read_text() == "the older one"
    assert (tmp_path / "net.onnx.rejected").is_file()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"path": "net.bin"}, r"path='net.bin': must end in .onnx"),
        ({"target": "gpu"}, r"target='gpu': must be one of cpu, tensorrt"),
        ({"two_bit": "int3"}, r"two_bit='int3': must be one of int4, int2"),
        ({"dynamic_size": True}, r"dynamic_size=true: this net takes images of one size"),
        ({"net": tiny.vit()}, r"export_onnx: a float net; qat.convert\(net, qat.recipe\(...\)\) quantizes it"),
        ({"net": made(qat.recipe("ofq", bits=2)), "target": "tensorrt"}, r"format.target=tensorrt: .* has an offset behind it"),
    ],
)
def test_mistakes(net, given, said, tmp_path):
    with pytest.raises(qat.UsageError, match=said):
        qat.export_onnx(**{"net": net, "path": tmp_path / "net.onnx"} | given)
    assert list(tmp_path.iterdir()) == []


def test_a_signal_behind_openvino_arrives(net, tmp_path):
    qat.export_onnx(net, tmp_path / "net.onnx")
    gc.collect()
    seen = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: seen.append(number))
    os.kill(os.getpid(), signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, before)
    assert seen == [signal.SIGUSR1]


@pytest.mark.parametrize("method", ["__init__", "run"])
def test_an_error_of_openvino_is_said_and_rejects_no_file(net, tmp_path, monkeypatch, method):
    def broken(*_):
        raise RuntimeError("Exception from src/core.cpp:117:\nException from src/plugin.cpp:54:\n[Add] failed:\nindex '0' out of range\n\n")

    monkeypatch.setattr(OpenVino, method, broken)
    checked = qat.export_onnx(net, tmp_path / "net.onnx", images=torch.randn(4, 1, 8, 8))
    assert (tmp_path / "net.onnx").is_file()
    assert (tuple(checked.agreement), checked.problem) == (LEVELS, None)
    said = "not for OpenVINO: it fails ([Add] failed: index '0' out of range); a file with format.dynamic_batch=false may be"
    assert checked.to_text().splitlines()[-1] == said


def test_an_error_of_onnxruntime_ends_the_export(net, tmp_path, monkeypatch):
    monkeypatch.setattr(Onnxruntime, "run", lambda *_: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        qat.export_onnx(net, tmp_path / "net.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_of_openvino_is_said_and_rejects_no_file():
    found = {level: Agreement(images=10, same_top1=10, without_flip=10) for level in (*LEVELS, OPENVINO)}
    checked = Checked(found, {OPENVINO: 5})
    assert checked.problem is None
    said = "not for OpenVINO: on 5 of 10 images it is not what its graph gives step by step; a file with format.dynamic_batch=false may be"
    assert checked.to_text().splitlines()[-1] == said
    assert Checked(found, {LEVELS[1]: 5}).problem == f"{LEVELS[1]}: on 5 of 10 images it is not what its graph gives step by step"
