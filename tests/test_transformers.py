"""Files of Transformers. Oracles: the model that was saved, and a process without the package."""

import copy
import json
import shutil
from unittest import mock

import huggingface_hub
import pytest
import torch

import qat
from qat.callbacks import CGA, IterativeFreezing
from tests.commands import run_python
from tests.conftest import ROOT
from tests.errors import usage_error
from tests.hf_models import KINDS, REFUSED, are_equal, outputs, transformers

# After a module that skips these tests without the package.
import qat.transformers  # isort: skip
from evidence.pages import transformers_page  # isort: skip

AutoModel = transformers.AutoModel
AutoModelForImageClassification = transformers.AutoModelForImageClassification

VIT = KINDS["ViTForImageClassification"]
X = VIT.images()
PAGE = (ROOT / "docs/transformers_models.md").read_text()
# One whose outputs depend on values, one with buffers that are not stored, one with tied heads.
SHORT = ["EomtForUniversalSegmentation", "LevitForImageClassification", "DetrForObjectDetection"]


@pytest.fixture(scope="module")
def net():
    return VIT.quantized(bits=4)


@pytest.fixture
def folder(net, tmp_path):
    net.save_pretrained(tmp_path / "net")
    return tmp_path / "net"


@pytest.mark.parametrize("options", [{}, {"device_map": "cpu"}, {"dtype": torch.float32}])
def test_from_pretrained_gives_the_model_again(net, folder, options, tmp_path):
    again = AutoModelForImageClassification.from_pretrained(folder, **options)
    assert are_equal(outputs(again, X), outputs(net, X))
    assert qat.conversion_report(again) == qat.conversion_report(net)
    assert are_equal(outputs(qat.freeze(again), X), outputs(qat.freeze(net), X))
    again.save_pretrained(tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize(
    ("kind", "task"),
    [
        ("ViTForImageClassification", "image-classification"),
        ("YolosForObjectDetection", "object-detection"),
        ("SegformerForSemanticSegmentation", "image-segmentation"),
        ("SiglipVisionModel", "image-feature-extraction"),
    ],
)
def test_the_card_names_the_task(kind, task, tmp_path):
    folder = qat.save_pretrained(KINDS[kind].build(), tmp_path / "net")
    card = (folder / "README.md").read_text()
    assert f"pipeline_tag: {task}\n" in card
    assert f"\n# {kind}\n" in card


def test_another_dtype(net, folder, tmp_path):
    again = AutoModelForImageClassification.from_pretrained(folder, dtype=torch.bfloat16)
    theirs = VIT.quantized(bits=4)
    float_names = VIT.build().state_dict()
    for name, tensor in theirs.state_dict().items():
        if name in float_names:  # step sizes keep their dtype
            theirs.get_parameter(name).data = tensor.bfloat16()
    assert are_equal(outputs(again, X.bfloat16()), outputs(theirs, X.bfloat16()))
    again.save_pretrained(tmp_path)  # older versions still read the file in `folder`
    same = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert are_equal(outputs(same, X.bfloat16()), outputs(again, X.bfloat16()))


@pytest.mark.parametrize("is_encoder", [False, True])
def test_scales_that_a_folder_lacks_are_not_set(folder, is_encoder, tmp_path):
    options = {"num_labels": 7, "ignore_mismatched_sizes": True}
    if not (is_encoder or hasattr(transformers.quantizers.HfQuantizer, "get_new_dtype")):
        pytest.skip("older versions ignore num_labels if the model is quantized")
    if is_encoder:
        folder, options = tmp_path, {}
        encoder = qat.convert(VIT.build().vit, qat.recipe("seq", bits=4))
        qat.initialize_scales(encoder, [X]).save_pretrained(folder)
    other = AutoModelForImageClassification.from_pretrained(folder, **options)
    with usage_error("scales of classifier.* are not initialized"):
        other(X)
    assert qat.initialize_scales(other, [X])(X).logits.isfinite().all()


@pytest.mark.parametrize("part", ["", "vit"])
def test_quantized_attention_stays(folder, part):
    model = AutoModelForImageClassification.from_pretrained(folder)
    with usage_error("set_attn_implementation.*eager"):
        model.get_submodule(part).set_attn_implementation("eager")


def test_a_loaded_model_saves_its_own_config(folder):
    model = AutoModelForImageClassification.from_pretrained(folder)
    model.config = copy.deepcopy(model.config)
    model.config.id2label = {0: "cat", 1: "dog"}
    model.save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["id2label"]["0"] == "cat"


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", SHORT)
def test_models_that_do_not_run_without_values(name, tmp_path):
    kind = KINDS[name]
    model = kind.quantized(bits=4)
    state = torch.get_rng_state()
    model.save_pretrained(tmp_path)
    again = kind.cls.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert are_equal(outputs(again, kind.images()), outputs(model, kind.images()))


def test_a_loaded_model_trains_on(folder):
    again = AutoModelForImageClassification.from_pretrained(folder).train()
    again(X, labels=torch.zeros(2).long()).loss.backward()
    assert again.vit.layers[0].mlp.fc1.weight.grad.abs().sum() > 0
    assert again.is_quantized


@pytest.mark.parametrize("recipe", ["seq", qat.recipe("seq", bits=4)])
def test_a_float_folder_is_converted(recipe, tmp_path):
    plain = VIT.build()
    plain.save_pretrained(tmp_path)
    knobs = {"bits": 4} if isinstance(recipe, str) else {}
    config = qat.transformers.QatConfig(recipe, **knobs)
    again = AutoModelForImageClassification.from_pretrained(tmp_path, quantization_config=config)
    with usage_error("scales of .* are not initialized"):
        again(X)
    ours = qat.initialize_scales(VIT.converted(bits=4), [X])
    assert are_equal(outputs(qat.initialize_scales(again, [X]), X), outputs(ours, X))
    wrong = qat.transformers.QatConfig("seq", input_size=(3, 64, 64))
    with usage_error(r"input_size=\(3, 64, 64\)"):
        AutoModelForImageClassification.from_pretrained(tmp_path, quantization_config=wrong)


@pytest.mark.long
def test_an_upload_is_what_is_saved(net, folder):
    files = {}

    def create_commit(*_, operations, **__):
        for operation in operations:
            with operation.as_file() as file:
                files[operation.path_in_repo] = file.read()

    api = huggingface_hub.HfApi
    with (
        mock.patch.object(api, "create_commit", create_commit),
        mock.patch.object(api, "create_repo", return_value=mock.Mock(repo_id="me/net")),
    ):
        net.push_to_hub("me/net")
    for name in ("config.json", "model.safetensors"):
        assert files[name] == (folder / name).read_bytes()


def test_a_frozen_model_has_a_file_of_its_own(net, tmp_path):
    with usage_error("save_pretrained: the model is frozen; use qat.save,"):
        qat.freeze(net).save_pretrained(tmp_path)


def test_a_folder_without_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        AutoModelForImageClassification.from_pretrained(folder)
    with usage_error("from_pretrained"):
        qat.from_pretrained(folder)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("recipe", {"name": "seq", "act_quantizer": "nope"}, "act_quantizer='nope'"),
        ("recipe", {"name": "seq", "bits": 99}, "bits=99"),
        ("input_size", [3, -1, 32], "input_size"),
    ],
)
def test_a_damaged_config(folder, key, value, message):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"][key] = value
    (folder / "config.json").write_text(json.dumps(config))
    with usage_error(message):
        AutoModelForImageClassification.from_pretrained(folder)


@pytest.mark.parametrize(
    ("recipe", "knobs", "message"),
    [
        (None, {}, "recipe=None: must be a recipe, or its name"),
        ([1], {}, "must be a recipe, or its name"),
        (qat.recipe("seq", bits=4), {"bits": 2}, "{.bits.: 2}: must be part of the recipe"),
    ],
)
def test_settings_that_cannot_be_used(recipe, knobs, message):
    with usage_error(message):
        qat.transformers.QatConfig(recipe, **knobs)


def test_code_of_a_folder_is_not_run(folder):
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "evil.Evil"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text("raise SystemExit('run')")
    assert type(AutoModel.from_pretrained(folder, trust_remote_code=False)).__name__ == "ViTModel"


def test_images_of_another_size(tmp_path):
    model = KINDS["Dinov2WithRegistersModel"].quantized(bits=4)
    with pytest.raises((qat.UsageError, RuntimeError), match="tokens|size"):
        model(torch.zeros(1, 3, 64, 64))


@pytest.mark.long
def test_without_the_package_nothing_changes(tmp_path):
    code = """import sys; sys.modules["transformers"] = None
import timm, torch, qat
net = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32)
qat.convert(net, qat.recipe("seq", bits=4))
x = torch.randn(2, 3, 32, 32)
qat.initialize_scales(net, [x]); qat.save(net, "net.ckpt")
assert torch.equal(qat.load("net.ckpt")(x), net.eval()(x))
content = torch.load("net.ckpt"); content["qat"]["model"] = {"name": "transformers_model", "kwargs": {"architecture": "ViTModel", "config": {}}}
torch.save(content, "net.ckpt")
try: qat.load("net.ckpt")
except qat.UsageError as error: print(error)
"""
    done = run_python("-c", code, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    assert "needs the package transformers, which is not installed" in done.stdout


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", ["AIMv2", "Data2Vec"])
def test_the_page_says_what_it_does(name):
    kind = next(kind for kind in KINDS.values() if kind.title == name)
    assert transformers_page.row(kind) in PAGE.splitlines()


def test_the_page_has_all_classes():
    rows = [line.split(" | ") for line in PAGE.splitlines() if "| `" in line]
    assert [row[1].strip("`") for row in rows[: len(KINDS)]] == [*KINDS]
    with_attention = [row for row in rows[: len(KINDS)] if row[2][0] not in "0n"]
    assert len(with_attention) >= 15
    assert "not equal" not in PAGE
    for name in ("BertModel", "CLIPModel"):
        assert transformers_page.refusal(REFUSED[name]) in PAGE


@pytest.mark.long
def test_the_whole_page():
    assert transformers_page.page() == PAGE, "make transformers-page"


CALLBACKS = {
    "cga": lambda: [qat.transformers.Callback(CGA(epochs=1, boundary_range=0.1))],
    "none": lambda: [],
    "freezing": lambda: [
        qat.transformers.Callback(IterativeFreezing(threshold=0.02, momentum=0.1))
    ],
}


def trained(folder, callbacks, *, resume=False, **settings):
    """Tensors of a 2-bit model after two epochs of three steps with the `Trainer`."""
    transformers.set_seed(0)
    images = torch.randn(12, *X.shape[1:])
    model = VIT.quantized(bits=2)
    arguments = transformers.TrainingArguments(
        folder,
        **{"num_train_epochs": 2, **settings},
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        weight_decay=0.05,
        save_strategy="epoch",
        logging_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    data = [{"pixel_values": image, "labels": i % 2} for i, image in enumerate(images)]
    trainer = transformers.Trainer(model, arguments, train_dataset=data, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume)
    return list(trainer.model.state_dict().values())


@pytest.mark.sample(1)
@pytest.mark.slow
@pytest.mark.parametrize("name", CALLBACKS)
def test_a_trainer_resumes_exactly(name, tmp_path):
    """Oracle: the uninterrupted run, whose first checkpoint the second run continues."""
    pytest.importorskip("accelerate")
    whole = trained(tmp_path / "run", CALLBACKS[name]())
    assert are_equal(whole, trained(tmp_path / "free", [])) == (name == "none")
    if name == "freezing":
        with usage_error(
            "checkpoint-3, which does not exist; the checkpoint must be in output_dir"
        ):
            elsewhere = str(tmp_path / "run" / "checkpoint-3")
            trained(tmp_path / "other", CALLBACKS[name](), resume=elsewhere)
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    assert are_equal(trained(tmp_path / "run", CALLBACKS[name](), resume=True), whole)


@pytest.mark.slow
def test_epochs_are_those_of_max_steps(tmp_path):
    pytest.importorskip("accelerate")
    by_steps = trained(tmp_path, CALLBACKS["cga"](), num_train_epochs=9, max_steps=6)
    assert are_equal(by_steps, trained(tmp_path, CALLBACKS["cga"]()))
