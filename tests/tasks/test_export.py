"""`export.py`. Oracle: the checkpoint's own logits; what is left where a file disagrees."""

import importlib.util
import json
import re

import numpy as np
import onnx
import pytest
import timm
import torch
from PIL import Image

import qat
import qat.tasks.export
from qat.export.runtimes import open_session, session_logits
from qat.tasks.export import export
from tests.commands import run_python
from tests.conftest import compose, results, train
from tests.errors import usage_error
from tests.tasks.test_evaluate import last
from tests.tiny import images

SMALL = {
    "img_size": 8,
    "patch_size": 4,
    "in_chans": 1,
    "num_classes": 10,
    "embed_dim": 24,
    "depth": 1,
    "num_heads": 3,
}


RATIO = r"^  %s\b.*; \d+\.\d\d of float's time \(this machine, 1 thread\)$"


def exported(run_dir, *overrides):
    export(compose("export", f"run_dir={run_dir}", "images=24", "latency=2", *overrides))
    return results(run_dir)


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory, run_2bit):
    run_dir = tmp_path_factory.mktemp("onnx")
    return run_dir / "net.onnx", exported(run_dir, f"ckpt={last(run_2bit)}")


@pytest.fixture(scope="module")
def run_2bit(tmp_path_factory):
    return train(tmp_path_factory.mktemp("trained"), "quant=ofq_2bit")


def test_an_onnx_file(onnx_file, run_2bit):
    path, found = onnx_file
    x = images(5)
    torch.testing.assert_close(
        session_logits(open_session(path), x), qat.load(last(run_2bit))(x), rtol=0, atol=1e-4
    )
    assert (found["command"], found["quant"], found["agreement"]) == ("export", "ofq_2bit", 100)
    assert (
        found["size_bytes"]
        == path.stat().st_size
        == found["bytes"]["this"]
        < found["bytes"]["float"]
    )
    assert all(set(times) == {"float", "int8", "this"} for times in found["latency_ms"].values())
    assert set(found["latency_ms"]) == {"onnxruntime", "openvino"}
    for runtime, taken in found["latency_ms"].items():
        assert found["time_of_float"][runtime] == pytest.approx(
            taken["this"] / taken["float"], rel=0.01
        )
    assert list(path.parent.glob(".*")) == []


def test_a_file_says_how_to_use_it(onnx_file):
    path, _ = onnx_file
    said = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert "qat.session_options" not in said
    assert json.loads(said["qat.classes"]) == [str(i) for i in range(10)]
    assert json.loads(said["qat.preprocessing"])["size"] == 8
    assert json.loads(said["qat"])["recipe"]["bits"] == 2


def test_the_example_needs_no_torch(onnx_file, run_2bit, tmp_path):
    path, _ = onnx_file
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (31, 40, 3), dtype=np.uint8)).save(
        tmp_path / "image.png"
    )
    blocked = "import sys; sys.modules['torch'] = sys.modules['torchvision'] = sys.modules['timm'] = None; import runpy;"
    arguments = ["", str(path), str(tmp_path / "image.png")]
    code = f"{blocked} sys.argv = {arguments!r}; runpy.run_path('examples/classify.py', run_name='__main__')"
    done = run_python("-c", code)
    net = qat.load(last(run_2bit))
    shares = net(qat.transform(net)(tmp_path / "image.png")[None]).softmax(-1)[0]
    expected = [f"{100 * shares[i]:5.1f} %  {i}" for i in shares.argsort(descending=True)[:5]]
    assert done.stdout.splitlines() == expected, done.stderr


@pytest.fixture(scope="module")
def deployable(tmp_path_factory):
    net = qat.convert(
        timm.create_model("vit_tiny_patch16_224", **SMALL),
        qat.recipe("deploy_w4a8"),
        input_size=(1, 8, 8),
    )
    path = tmp_path_factory.mktemp("deployable") / "net.ckpt"
    qat.save(qat.initialize_scales(net, [torch.randn(8, 1, 8, 8)]), path)
    return path


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("typed", "is_without_vnni", "expected"),
    [
        ("format=packed", False, {"qat": r"qat\.load"}),
        (
            "",
            False,
            {
                "onnxruntime, with VNNI or on ARM": "with format.cpu=fast .* of float's time",
                "onnxruntime, other CPUs": "default settings$",
                "OpenVINO": "INFERENCE_PRECISION_HINT=f32.* of float's time",
            },
        ),
        (
            "format.cpu=any",
            True,
            {
                "onnxruntime, with VNNI or on ARM": "8-bit weights are faster$",
                "onnxruntime, other CPUs": "default settings; .* of float's time",
                "OpenVINO": "INFERENCE_PRECISION_HINT=f32",
            },
        ),
        (
            "format.cpu=fast",
            False,
            {
                "onnxruntime, with VNNI or on ARM": "default settings; .* of float's time",
                "onnxruntime, other CPUs": "wrong results; export with format.cpu=any$",
                "OpenVINO": "only with VNNI or on ARM; .* of float's time",
            },
        ),
        ("format.target=tensorrt", False, {"TensorRT": "qat has not tested it$"}),
    ],
)
def test_a_line_for_each_target_of_a_file(
    typed, is_without_vnni, expected, deployable, tmp_path, caplog, monkeypatch
):
    caplog.set_level("INFO")
    monkeypatch.setattr(qat.tasks.export, "int8_sums_saturate", lambda: is_without_vnni)
    exported(tmp_path, f"ckpt={deployable}", *typed.split())
    (text,) = [text for text in caplog.messages if text.startswith("run it in")]
    lines = dict(re.split(r"  +", line.strip(), maxsplit=1) for line in text.splitlines()[1:])
    assert list(lines) == list(expected)
    assert all(re.search(pattern, lines[target]) for target, pattern in expected.items()), lines


@pytest.mark.slow
def test_an_executorch_file(deployable, tmp_path, caplog):
    pytest.importorskip("executorch.runtime")
    caplog.set_level("INFO")
    found = exported(tmp_path, f"ckpt={deployable}", "format=executorch")
    assert (found["agreement"], found["agrees"]) == (100, {"executorch": True})
    assert (
        found["size_bytes"]
        == (tmp_path / "net.pte").stat().st_size
        == found["bytes"]["this"]
        < found["bytes"]["float"]
    )
    assert set(found["latency_ms"]["executorch"]) == {"float", "this"}
    assert found["float_products"] == ["patch_embed.proj", "blocks.*.attn"]
    assert re.search(RATIO % "ExecuTorch", "\n".join(caplog.messages), re.MULTILINE)


def test_executorch_that_is_not_installed_is_one_line(deployable, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with usage_error(
        r"^format=executorch: executorch is not installed; pip install -e '.\[executorch\]'$",
    ):
        exported(tmp_path, f"ckpt={deployable}", "format=executorch")
    assert list(tmp_path.glob("net*")) == []


def test_a_packed_file(run_2bit, tmp_path):
    found = exported(tmp_path, f"ckpt={last(run_2bit)}", "format=packed")
    x = images(5)
    net = qat.load(tmp_path / "net.safetensors")
    assert torch.equal(net(x), qat.freeze(qat.load(last(run_2bit)))(x))
    assert found["size_bytes"] == (tmp_path / "net.safetensors").stat().st_size
    assert (found["agreement"], found["file"]) == (100, str(tmp_path / "net.safetensors"))
    again = exported(tmp_path / "again", f"ckpt={tmp_path}/net.safetensors", "format=packed")
    assert again["size_bytes"] == found["size_bytes"]


def test_a_killed_export_leaves_nothing_next_to_its_file(run_2bit, tmp_path):
    folder = tmp_path / "other"
    folder.mkdir()
    others = [".net1.safetensors.9.part", ".thesis.pdf.9.part"]
    left = [".net[1].safetensors.9.part", "..unchecked.net[1].safetensors.9.part"]
    for name in [*others, *left]:
        (folder / name).touch()
    file = f"file='{folder}/net[1].safetensors'"
    exported(tmp_path / "run", f"ckpt={last(run_2bit)}", "format=packed", file)
    assert {path.name for path in folder.iterdir()} == {*others, "net[1].safetensors"}


def test_a_file_that_disagrees_is_kept_under_another_name(run_2bit, tmp_path, monkeypatch):
    def broken(path, *args):
        net = qat.freeze(qat.load(last(run_2bit)))
        net.head.bias.data.add_(torch.arange(10.0))
        sizes = real(net, tmp_path / "broken.safetensors", *args[1:])
        (tmp_path / "broken.safetensors").replace(path)
        return sizes

    real = qat.tasks.export.write_packed
    monkeypatch.setattr(
        qat.tasks.export, "write_packed", lambda net, path, meta: broken(path, net, meta)
    )
    (tmp_path / "net.safetensors").write_text("the older one")
    with usage_error(
        r"does not agree with the model \(qat.load: logits differ by .* kept as .*rejected",
    ):
        exported(tmp_path, f"ckpt={last(run_2bit)}", "format=packed", "overwrite=true")
    assert (tmp_path / "net.safetensors").read_text() == "the older one"
    assert (tmp_path / "net.safetensors.rejected").exists()


MISTAKES = {
    "ckpt=null": "ckpt is not set",
    "ckpt=nowhere.ckpt": "ckpt='nowhere.ckpt': no such file",
    "format.two_bit=int3": "format.two_bit='int3': must be one of int4, int2",
    "format.target=gpu": "format.target='gpu': must be one of cpu, tensorrt",
    "format.precision=bf16": "format.precision='bf16': must be one of fp16, fp32",
    "format.name=tflite": "format.name='tflite': must be one of onnx, packed, executorch",
    "format=packed dynamic_batch=false": "dynamic_batch=false: works only with format=onnx; must be true with format=packed",
    "images=0": "images=0: must be an integer of at least 1",
    "file=net.bin": "file='net.bin': must end in .onnx with format=onnx",
    "split=all": "split='all': must be one of train, val, test",
}


@pytest.mark.parametrize("typed", MISTAKES)
def test_mistakes_are_one_line(typed, run_2bit, tmp_path):
    with usage_error(MISTAKES[typed]):
        exported(tmp_path, f"ckpt={last(run_2bit)}", *typed.split())
    assert list(tmp_path.glob("net*")) == []


def test_a_float_net_is_refused(tmp_path, float_run):
    with usage_error("contains a float model; must be a quantized model"):
        exported(tmp_path, f"ckpt={last(float_run)}")


def test_a_file_that_is_there_stays(onnx_file, run_2bit):
    path, _ = onnx_file
    before = path.read_bytes()
    with usage_error("net.onnx exists already; set overwrite=true to replace it"):
        exported(path.parent, f"ckpt={last(run_2bit)}")
    assert path.read_bytes() == before
