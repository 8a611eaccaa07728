"""`model=hf`: image classifiers of Transformers through the commands. Oracle: Transformers itself, and a run without interruption."""

import json
import re
import shutil

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image

import qat
from qat.data import image_transform
from qat.data.hf_processor import processor_settings
from qat.model.sites import find_blocks
from qat.tasks import build
from qat.tasks.ptq import ptq
from qat.tasks.set_up import set_up
from qat.tasks.train import train
from tests.callbacks.fitting import added
from tests.conftest import compose, evaluate, results
from tests.errors import usage_error
from tests.tasks.test_resume import Kill, Killed, last
from tests.tiny import shake

transformers = pytest.importorskip("transformers")
CLASSES = ["cat", "dog", "owl"]
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
SWIN = {
    "embed_dim": 16,
    "depths": [1, 1],
    "num_heads": [2, 2],
    "window_size": 4,
    "image_size": 32,
}
LABELS = {
    "id2label": dict(enumerate(CLASSES)),
    "label2id": {name: number for number, name in enumerate(CLASSES)},
}
PROCESSOR = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}


def photo(size, number):
    """Random pixels, a function of size and number."""
    return np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)


def write_processor(folder, **settings):
    folder.mkdir(exist_ok=True)
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def save_model(folder, cls, **config):
    """A model with weights far from zero, as `save_pretrained` writes it."""
    torch.manual_seed(0)
    shake(cls(cls.config_class(**config))).save_pretrained(folder)
    write_processor(folder, **PROCESSOR)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Photos of three classes, one colour each, and the folder of a classifier."""
    folder = tmp_path_factory.mktemp("home")
    for split, count in (("train", 12), ("val", 4)):
        for label, name in enumerate(CLASSES):
            place = folder / "photos" / split / name
            place.mkdir(parents=True)
            for number in range(count):
                pixels = photo((34, 40 + number), number) // 2
                pixels[..., label] += 100
                Image.fromarray(pixels).save(place / f"{number}.png")
    save_model(folder / "vit", transformers.ViTForImageClassification, **SMALL, **LABELS)
    return folder


def photos(home):
    return (
        "data=imagefolder",
        f"data.root={home / 'photos'}",
        "data.image_size=32",
        "data.batch_size=8",
    )


def settings(home, run_dir, *overrides):
    model = ("model=hf", f"model.name={home / 'vit'}", "quant=seq_4bit")
    few = ("trainer.max_epochs=2", "checkpoint.every_n_steps=2")
    return compose("train", *model, *photos(home), *few, f"run_dir={run_dir}", *overrides)


@pytest.fixture(scope="module")
def trained(home):
    """A finished run."""
    train(settings(home, home / "run"))
    return home / "run" / "checkpoints" / "last.ckpt"


def test_a_resumed_run_equals_one_without_interruption(home, trained, tmp_path):
    with added(Kill(5)), pytest.raises(Killed):
        train(settings(home, tmp_path))
    train(settings(home, tmp_path, "resume=true"))
    resumed, full = last(tmp_path), last(home / "run")
    for name, tensor in full["state_dict"].items():
        assert torch.equal(resumed["state_dict"][name], tensor), name


def assert_attention_is_quantized(net):
    roles = {site.role for site in qat.iter_quantizers(net)}
    assert {"q", "k", "v", "probs", "weight"} <= roles


def test_a_trained_file_stands_by_itself(home, trained, tmp_path):
    net = qat.load(trained)
    assert_attention_is_quantized(net)
    (classifier,) = [
        s for s in qat.iter_quantizers(net) if s.name.endswith("classifier.weight_quantizer")
    ]
    assert classifier.quantizer.spec.bits == 8
    expected = results(home / "run")["top1"]
    assert evaluate(tmp_path / "a", f"ckpt={trained}")["top1"] == expected
    # Other photos are prepared by the processor too.
    evaluate(tmp_path / "b", f"ckpt={trained}", *photos(home))
    assert "crop_mode: squash" in (tmp_path / "b" / "config.yaml").read_text()
    assert results(tmp_path / "b")["top1"] == expected


SHORT_PTQ = {
    "fqvit_w4a8": (),
    "evolq_w4a8": ("search.passes=1", "search.cycles=1", "search.micro_batch=8"),
    "compensate_w4a4": (),
    "reconstruct_w4a4": ("ptq.reconstruct.steps=2", "ptq.reconstruct.batch=8"),
}
PTQ_MODELS = {"ViT": "vit.layers", "DeiT": "deit.layers", "Dinov2": "dinov2.encoder.layer"}


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", PTQ_MODELS)
@pytest.mark.parametrize("choice", SHORT_PTQ)
def test_ptq_from_a_folder(home, name, choice, tmp_path):
    cls = getattr(transformers, f"{name}ForImageClassification")
    save_model(tmp_path / "model", cls, **SMALL, **LABELS)
    start = ("model=hf", f"model.name={tmp_path / 'model'}", *photos(home))
    few = ("data.calibration_images=16", "ptq.batch=8", f"run_dir={tmp_path / 'run'}")
    ptq(compose("ptq", f"ptq={choice}", *start, *few, *SHORT_PTQ[choice]))
    net = qat.load(tmp_path / "run" / "quantized.ckpt")
    assert list(find_blocks(net)) == [f"model.{PTQ_MODELS[name]}.0"]
    assert_attention_is_quantized(net)
    search = results(tmp_path / "run").get("search")
    assert (search is None) == (choice != "evolq_w4a8")


def test_the_float_model_computes_what_transformers_does(home):
    cfg = compose("eval", "model=hf", f"model.name={home / 'vit'}", *photos(home))
    set_up(cfg)
    cfg.data.num_classes = 3
    net = build.build_start(cfg, keep_head=True).net.eval()
    pixels = photo((50, 41), 1)
    processor = transformers.AutoImageProcessor.from_pretrained(home / "vit", backend="pil")
    model = transformers.AutoModelForImageClassification.from_pretrained(home / "vit").eval()
    expected = model(**processor(Image.fromarray(pixels), return_tensors="pt")).logits
    image = build.build_data(cfg)
    logits = net(image_transform(image.settings)(pixels)[None])
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_predictions_of_the_folder_need_no_data(home, tmp_path):
    images = home / "photos" / "val" / "dog"
    evaluate(tmp_path, "model=hf", f"model.name={home / 'vit'}", f"predict={images}")
    table = (tmp_path / "predictions.csv").read_text()
    assert any(name in table for name in CLASSES)


@pytest.mark.long
def test_an_encoder_gets_a_new_head(home, tmp_path, caplog):
    save_model(tmp_path / "dino", transformers.Dinov2Model, **SMALL)
    caplog.set_level("INFO")
    few = ("trainer.limit_train_batches=1", "trainer.max_epochs=1")
    train(settings(home, tmp_path / "run", f"model.name={tmp_path / 'dino'}", *few))
    assert "new model.classifier for 3 classes" in caplog.text
    net = qat.load(f"{tmp_path}/run/checkpoints/last.ckpt")
    assert type(net.model).__name__ == "Dinov2ForImageClassification"
    # As timm's models: tokens and positions are not decayed.
    assert "model.dinov2.embeddings.cls_token" in net.no_weight_decay()


@pytest.mark.long
def test_settings_of_training(home, tmp_path):
    """Gray photos, other settings of a nested config, checkpointing, layer decay and stochastic depth."""
    save_model(tmp_path / "swin", transformers.SwinForImageClassification, **SWIN, **LABELS)
    train(
        settings(
            home,
            tmp_path / "run",
            f"model.name={tmp_path / 'swin'}",
            "model.args.drop_path_rate=0.3",
            "++model.args.config.hidden_act=relu",
            "model.grad_checkpointing=true",
            "optimizer.layer_decay=0.75",
            "data.in_chans=1",
            "data.mean=[0.4]",
            "data.std=[0.2]",
            "trainer.max_epochs=1",
        )
    )
    net = qat.load(f"{tmp_path}/run/checkpoints/last.ckpt")
    assert net.model.config.drop_path_rate == 0.3
    assert net.model.config.hidden_act == "relu"
    assert net.pretrained_cfg["mean"] == [0.4]


def test_a_setting_of_a_nested_config(home, tmp_path):
    cls = transformers.CLIPForImageClassification
    save_model(
        tmp_path / "clip", cls, vision_config=SMALL, text_config={"hidden_size": 16}, **LABELS
    )
    own = (f"model.name={tmp_path / 'clip'}", "++model.args.config.vision_config.hidden_act=gelu")
    cfg = settings(home, tmp_path / "run", *own)
    set_up(cfg)
    config = build.build_start(cfg).net.model.config.vision_config
    assert config.hidden_act == "gelu"
    assert config.hidden_size == SMALL["hidden_size"]


SQUASH = {"image_processor_type": "ViTImageProcessor", "size": {"height": 48, "width": 48}}
DEIT = {
    "image_processor_type": "DeiTImageProcessor",
    "size": {"height": 40, "width": 40},
    "crop_size": {"height": 32, "width": 32},
}
CLIP = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": 37},
    "crop_size": {"height": 32, "width": 32},
}
CONVNEXT = {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 32}}
HF_STANDARD = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.1]}


@pytest.mark.parametrize(
    ("processor", "crop_mode"),
    [
        (SQUASH, "squash"),
        ({**SQUASH, **HF_STANDARD, "resample": 1}, "squash"),
        ({**DEIT, "resample": 3}, "squash"),
        (CLIP, "center_floor"),
        ({**CLIP, "resample": 0}, "center_floor"),
        ({**CONVNEXT, "crop_pct": 0.8}, "center_floor"),
        ({**CONVNEXT, "size": {"shortest_edge": 384}}, "squash"),
    ],
)
def test_images_are_prepared_as_by_the_processor(processor, crop_mode, tmp_path):
    write_processor(tmp_path, **processor)
    own = processor_settings(tmp_path)
    assert own["crop_mode"] == crop_mode
    transform = image_transform({**own, "patch_size": None, "in_chans": 3, "num_classes": 3})
    theirs = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    std = 255 * torch.tensor(own["std"])[:, None, None]
    # Odd margins on both sides, squares, and photos smaller than the crop.
    for size in ((50, 77), (64, 41), (37, 37), (10, 20)):
        pixels = photo(size, 2)
        expected = theirs(Image.fromarray(pixels), return_tensors="pt")["pixel_values"][0]
        image = transform(pixels)
        torch.testing.assert_close(image, expected, atol=1e-6, rtol=1e-6)
        # In units of pixel values, which are integers.
        assert torch.equal(
            ((image - image.min()) * std).round(), ((expected - expected.min()) * std).round()
        )


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        ({**SQUASH, "rescale_factor": 1 / 127.5}, "data.* cannot express how ViTImageProcessor"),
        ({**SQUASH, "size": {"height": 48, "width": 32}}, "data.* cannot express"),
        ({**SQUASH, "resample": 4}, "interpolation='box'"),
        ({"image_processor_type": "NewImageProcessor"}, "cannot be used"),
        (
            {**SQUASH, "size": {"longest_edge": 48}},
            "'longest_edge': 48} .*=None: must be an integer",
        ),
        ({**SQUASH, "size": {"height": 10**6, "width": 48}}, "must be an integer from 1 to 16384"),
        ({**CLIP, "crop_size": 10**6}, "must be an integer from 1 to 16384"),
    ],
)
def test_a_processor_that_cannot_be_expressed(processor, message, tmp_path):
    write_processor(tmp_path, **processor)
    with usage_error(message.replace("data.*", r"data.\*")):
        processor_settings(tmp_path)


def broken(home, folder, file, change):
    """A copy of the classifier's folder without a file, with so many bytes of it, or with other settings in it."""
    path = shutil.copytree(home / "vit", folder) / file
    if change is None:
        path.unlink()
    elif isinstance(change, int):
        path.write_bytes(path.read_bytes()[:change])
    else:
        settings = json.loads(path.read_text()) | change if isinstance(change, dict) else change
        path.write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "bert"}, "transformers has no image classifier of model_type 'bert'"),
        ({"model_type": "detr"}, "transformers has no image classifier of model_type 'detr'"),
        (
            {"model_type": "own", "auto_map": {"AutoModel": "own.Own"}},
            "transformers has no image classifier of model_type 'own'",
        ),
        ({"quantization_config": {"quant_method": "qat"}}, "the model is already quantized"),
        ({"hidden_size": 4096}, "the model is much larger than the weights"),
        ({"hidden_size": 64}, "classifier.weight has the shape [3, 32]; the model has [3, 64]"),
        ({"num_hidden_layers": 2}, "weights do not fit"),
        ({"hidden_dropout_prob": "high"}, "expected float, got str"),
        ({"hidden_act": "nope"}, "config.json cannot be used ('nope')"),
        ({"patch_size": 0}, "config.json cannot be used (integer division"),
        ({"architectures": 3}, "config.json cannot be used ('int' object"),
        ({"hidden_act": "${oc.env:HOME}"}, "the config contains '${'"),
        ([1], "config.json cannot be used (it must be a JSON object)"),
        (1, "config.json cannot be used (it must be a JSON object)"),
    ],
)
def test_a_config_that_cannot_be_used(home, change, message, tmp_path, refused):
    assert_refused(home, tmp_path, refused, "config.json", change, message)


@pytest.mark.parametrize(
    ("file", "kept", "message"),
    [
        ("model.safetensors", None, "has no model.safetensors"),
        ("model.safetensors", 0, "model.safetensors cannot be used"),
        ("model.safetensors", -1000, "model.safetensors cannot be used"),
        ("preprocessor_config.json", None, "preprocessor_config.json: cannot be used"),
    ],
)
def test_a_file_that_is_gone_or_cut(home, file, kept, message, tmp_path, refused):
    assert_refused(home, tmp_path, refused, file, kept, message)


def assert_refused(home, tmp_path, refused, file, change, message):
    folder = broken(home, tmp_path / "model", file, change)
    line = refused(settings(home, tmp_path / "run", f"model.name={folder}"))
    assert message in line
    assert str(folder) in line
    assert len(line) < 600


def test_blocks_of_the_file_are_not_dropped(home, tmp_path, refused):
    larger = {**SMALL, "num_hidden_layers": 2}
    save_model(tmp_path / "vit", transformers.ViTForImageClassification, **larger, **LABELS)
    fewer = (f"model.name={tmp_path / 'vit'}", "++model.args.config.num_hidden_layers=1")
    line = refused(settings(home, tmp_path / "run", *fewer))
    assert "the weights do not fit the config (the model has no vit.layers.1." in line


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("quant=ofq_2bit", "attentions of Transformers compute queries and keys themselves"),
        ("data.image_size=64", "the model does not accept images of this size"),
        ("model.weights=x.safetensors", "model.weights='x.safetensors': must be null"),
        ("model.name=nobody/nothing", "nothing is not in the local cache and"),
        ("model.name=nowhere", "must be an existing folder, or user/name on the hub"),
        ("++model.args.depth=3", "model.args.depth=3: unknown; must be one of architecture"),
        (
            "model.args.drop_path_rate=0.1",
            "drop_path_rate=0.1: unknown setting of model_type 'vit'",
        ),
        ("model.args.drop_path_rate=1", "drop_path_rate=1: must be a number from 0 to below 1"),
        ("model.args.architecture=BeitModel", "'BeitModel': must be one of ViTFor"),
        ("model.args.config=5", "model.args.config=5: must be a group of settings"),
        (
            "++model.args.config.qkv_bia=true",
            "config.qkv_bia=True: unknown .*; closest: qkv_bias",
        ),
        ("++model.args.config.hidden_act=nope", "config.json with {'hidden_act': 'nope'} cannot"),
        ("model.init=reference", "model.init='reference': must be full"),
    ],
)
def test_settings_that_cannot_work(home, override, message, tmp_path, refused, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    line = refused(settings(home, tmp_path / "run", override))
    assert re.search(re.escape(message).replace(r"\.\*", ".*"), line)
    assert len(line) < 600
