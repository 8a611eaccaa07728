"""A trained encoder, quantized. Oracles: the float encoder's features; a product by hand."""

import numpy as np
import onnx
import pytest
import timm
import torch
from onnx import TensorProto, helper, numpy_helper

import qat
from evidence.claims.arms import Arms
from evidence.real import __main__ as real
from evidence.real.weights import MODEL, WHEEL, build, tensors_of
from tests.conftest import compose, results, write_cifar
from tests.errors import usage_error


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A small random encoder in the place of the trained one, and few images."""
    monkeypatch.setattr(real, "FOLDER", tmp_path)
    monkeypatch.setattr(real, "FIT_IMAGES", 30)
    monkeypatch.setattr(real, "TEST_IMAGES", 10)
    torch.manual_seed(0)
    small_net = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=112,
        patch_size=14,
        embed_dim=24,
        depth=2,
        num_heads=2,
        num_classes=0,
    )
    monkeypatch.setattr(real, "build", lambda folder, image_size: small_net.eval())
    return [f"data.root={write_cifar(tmp_path / 'cifar', train=60)}", "seed=0"]


@pytest.mark.sample(1)
@pytest.mark.parametrize("recipe", ["compensate_w4a4", "reconstruct_w4a4", "evolq_w8a8"])
def test_features_are_compared_with_those_in_float(recipe, small, tmp_path):
    cosines = {}
    for bits in (2, 8):
        run_dir = tmp_path / f"{recipe}_{bits}"
        overrides = [f"ptq={recipe}", f"ptq.bits={bits}", f"ptq.act_bits={bits}"]
        if recipe.startswith("reconstruct"):
            overrides += ["ptq.reconstruct.steps=2", "ptq.reconstruct.batch=4"]
        if recipe.startswith("evolq"):
            overrides += ["search.passes=1", "search.population=2", "search.tournament=1"]
        images = ["data.calibration_images=8", "ptq.batch=4"]
        real.main([f"run_dir={run_dir}", *overrides, *images, *small])
        found = results(run_dir)
        cosines[bits] = found["cosine"]
        assert found["quant"] == f"{recipe.partition('_')[0]}_w{bits}a{bits}"
        for name in ("top1", "top1_fp", "top1_float_probe"):
            assert found[name] in np.arange(0, 101, 10)
    assert cosines[2] < cosines[8]
    # In a random net the class token is small, and the grids of FQ-ViT are coarse for it.
    assert (0.85 if recipe.startswith("evolq") else 0.99) < cosines[8] < 1


def test_a_classifier_has_the_first_blocks_of_the_encoder(small, tmp_path, monkeypatch):
    encoder = timm.create_model(MODEL, img_size=112, num_classes=0, depth=9)
    monkeypatch.setattr(real, "build", lambda folder, image_size: encoder)
    real.main([f"run_dir={tmp_path}/run", "measure=classifier", *small])
    state = qat.load(tmp_path / "run/checkpoints/best.ckpt").state_dict()
    assert state.pop("head.weight").shape == (10, 384)
    assert not state.pop("head.bias").any()
    expected = {k: v for k, v in encoder.state_dict().items() if not k.startswith("blocks.8.")}
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], value) for name, value in expected.items())


def test_largest_activations_are_measured_by_block(small, tmp_path):
    real.main([f"run_dir={tmp_path}/float", "measure=encoder", *small])
    curves = results(tmp_path / "float")["curves"]
    assert set(curves) == {"block", "qkv", "fc2"}
    for points in curves.values():
        assert [block for block, _ in points] == [0, 1]
        assert all(ratio > 1 for _, ratio in points)


def test_inputs_are_rounded_one_at_a_time(small, tmp_path):
    cosines = {}
    for bits in (2, 8):
        recipe = ["ptq=compensate_w4a4", f"ptq.act_bits={bits}", "ptq.batch=4"]
        images = "data.calibration_images=8"
        real.main([f"run_dir={tmp_path}/{bits}", "measure=inputs", *recipe, images, *small])
        curves = results(tmp_path / str(bits))["curves"]
        assert set(curves) == {"qkv", "probs", "fc1", "fc2", "fc2_patches"}
        cosines[bits] = [cosine for points in curves.values() for _, cosine in points]
    assert len(cosines[2]) == 10
    # Features are those of the class token, so the patches of the last block do not change them.
    assert cosines[2].pop() == cosines[8].pop() == pytest.approx(1)
    assert all(low < high for low, high in zip(cosines[2], cosines[8], strict=True))


def test_settings_of_all_arms_compose():
    arms = Arms()
    encoders = [arm for arm, _ in arms.ordered(["REAL"])]
    for arm in encoders:
        settings = [one for one in arms.settings(arm, 0) if not one.startswith("measure=")]
        assert compose("ptq", *real.IMAGES, *settings)


def test_a_matrix_without_a_name_is_found_by_its_product():
    weight = np.arange(6, dtype=np.float32).reshape(2, 3)
    node = helper.make_node(
        "MatMul", ["x", "onnx::MatMul_7"], ["y"], name="/layer.0/mlp/fc1/MatMul"
    )
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (("x", [1, 2]), ("y", [1, 3]))
    ]
    constant = numpy_helper.from_array(weight, "onnx::MatMul_7")
    graph = helper.make_graph([node], "net", values[:1], values[1:], [constant])
    model = onnx.load_from_string(helper.make_model(graph).SerializeToString())
    assert np.array_equal(tensors_of(model.graph)["/layer.0/mlp/fc1/MatMul"], weight)


def test_another_file_is_refused(tmp_path):
    (tmp_path / WHEEL).write_bytes(b"other")
    with usage_error("SHA-256"):
        build(tmp_path, 112)
