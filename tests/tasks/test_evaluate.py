"""`eval.py`: evaluation of a file. Oracle: logits of the rebuilt model."""

import shutil

import pytest
import timm
import torch
from torch import nn

import qat
from qat.data import Digits
from qat.model.checkpoint import read_checkpoint
from qat.model.metadata import META_KEY
from qat.tasks import build
from qat.tasks.stored_data import choose_data
from qat.tasks.subject import build_evaluated_net
from tests.conftest import TINY, compose, contents, evaluate, results, train, write_cifar
from tests.data import files
from tests.data.files import write_image
from tests.errors import usage_error
from tests.tiny import quantized, vit

DIGITS = {**files.DIGITS, "mean": [0.3051], "std": [0.3759]}
MODEL = [o for o in TINY if "model.args" in o]


@torch.no_grad()
def counted(net, data, split="test"):
    """Top-1 in percent and mean cross-entropy on a split."""
    batches = [
        (net.eval()(images).log_softmax(-1), target) for images, target in data.sample(split)
    ]
    log_p, target = (torch.cat(t) for t in zip(*batches, strict=True))
    return 100 * (log_p.argmax(-1) == target).float().mean().item(), -log_p[
        torch.arange(len(target)), target
    ].mean().item()


def edited(path, target, data):
    """A copy of a checkpoint with another description of its data."""
    content = torch.load(path, weights_only=True)
    content[META_KEY]["data"] = data
    torch.save(content, target)
    return target


def last(run):
    return run / "checkpoints" / "last.ckpt"


def assert_scores(results, net, data, split="test"):
    top1, loss = counted(net, data, split)
    assert results["top1"] == pytest.approx(top1)
    assert results["loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("typed", "split"), [("", "test"), ("split=train", "train"), ("split=val", "val")]
)
def test_accuracy_is_that_of_the_rebuilt_net(tmp_path, run_4bit, typed, split):
    found = evaluate(tmp_path, f"ckpt={last(run_4bit)}", *typed.split())
    data = Digits(**DIGITS)
    assert_scores(found, qat.load(last(run_4bit)), data, split)
    assert [found[key] for key in ("command", "quant", "data")] == ["eval", "ofq_4bit", "digits"]
    assert (found["split"], found["images"]) == (split, len(data.split(split)))
    assert found["weights"] == str(last(run_4bit))


@pytest.mark.parametrize(
    ("command", "typed"),
    [
        ("eval", ""),
        ("analyze", "analysis=weights"),
        ("export", "format=packed"),
        ("ptq", "resume=auto"),
    ],
)
def test_files_of_a_training_stay(tmp_path, run_4bit, refused, command, typed):
    run = tmp_path / "run"
    shutil.copytree(run_4bit, run)
    before = contents(run)
    cfg = compose(command, f"ckpt={last(run)}", f"run_dir={run}", *typed.split())
    line = f"run_dir={str(run)!r} contains checkpoints/best.ckpt already; choose another run_dir"
    assert refused(cfg) == f"error: {line}"
    assert contents(run) == before


def test_results_of_other_weights_stay(tmp_path, run_4bit, float_run, refused):
    for _ in range(2):
        evaluate(tmp_path, f"ckpt={last(run_4bit)}")
    start = (f"ckpt={last(float_run)}", f"run_dir={tmp_path}")
    content = f"results.json of eval.py {last(run_4bit)}"
    line = f"error: run_dir={str(tmp_path)!r} contains {content} already; choose another run_dir"
    assert refused(compose("eval", *start)) == line
    assert refused(compose("ptq", *start, "resume=auto")) == line
    assert results(tmp_path)["weights"] == str(last(run_4bit))


@pytest.mark.sample(1)
@pytest.mark.parametrize("root", ["/", "//", "/usr/..", "{home}/..", "link"])
def test_a_file_does_not_name_all_folders_of_a_machine(tmp_path, refused, monkeypatch, root):
    monkeypatch.setenv("HOME", str(tmp_path / "users/me"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "users/me").mkdir(parents=True)
    (tmp_path / "link").symlink_to("/")
    stored = {"_target_": "qat.data.HfParquet", **DIGITS, "root": root.format(home="users/me")}
    qat.save(quantized(), tmp_path / "x.ckpt", data=stored)
    line = refused(compose("eval", "ckpt=x.ckpt", f"run_dir={tmp_path}/e"))
    assert "must be the folder of a dataset; set data.root=FOLDER" in line
    other = compose("eval", "ckpt=x.ckpt", "data.root=users", f"run_dir={tmp_path}/e")
    assert "data.root='users'" in refused(other)


def test_images_for_a_file_have_bounds(tmp_path):
    net = vit(pos_embed="none", dynamic_img_size=True)
    qat.save(net, tmp_path / "x.ckpt", data={"_target_": "qat.data.Digits", **DIGITS})
    cfg = compose("eval", f"ckpt={tmp_path}/x.ckpt", "data=digits", "data.image_size=8000")
    with usage_error(r"an image of \(1, 8000, 8000\) takes much more"):
        build_evaluated_net(cfg)


@pytest.mark.long
def test_the_stored_data_with_another_root(tmp_path):
    first, second = (write_cifar(tmp_path / str(seed), seed=seed) for seed in (0, 1))
    small = (
        "data=cifar10",
        "data.num_workers=0",
        "data.batch_size=16",
        "data.num_classes=4",
        "data.image_size=8",
    )
    run = train(tmp_path / "run", *small, f"data.root={first}", "quant=fp")
    for root, override in ((first, ()), (second, (f"data.root={second}",))):
        found = evaluate(tmp_path / f"eval{root.name}", f"ckpt={last(run)}", *override)
        data = build.build_data(compose("train", *small, f"data.root={root}", "run_dir=a"))
        assert_scores(found, qat.load(last(run)), data)
        assert found["data"] == "cifar10"


@pytest.mark.parametrize(
    ("command", "typed", "workers"),
    [("eval", "", None), ("ptq", "", None), ("analyze", "data.num_workers=1", 1)],
)
def test_the_workers_of_a_file_are_not_started(tmp_path, float_run, command, typed, workers):
    data = read_checkpoint(last(float_run)).meta["data"]
    file = edited(last(float_run), tmp_path / "a.ckpt", data | {"num_workers": 200})
    cfg = compose(command, f"ckpt={file}", f"run_dir={tmp_path}/run", *typed.split())
    choose_data(cfg, read_checkpoint(file))
    assert cfg.data.num_workers == workers
    assert build.build_data(cfg).sample("test").num_workers == (workers or 0)


@pytest.mark.parametrize("typed", [(), ("model.name=vit_tiny_patch16_224",)])
def test_photos_are_prepared_as_the_file_says(tmp_path, float_run, typed):
    data = read_checkpoint(last(float_run)).meta["data"]
    file = edited(last(float_run), tmp_path / "a.ckpt", data | {"mean": [0.25], "std": [0.75]})
    folder = ("data=imagefolder", f"data.root={tmp_path}", "data.in_chans=1", f"ckpt={file}")
    cfg = compose("eval", *folder, *typed, f"run_dir={tmp_path}/run")
    choose_data(cfg, read_checkpoint(file))
    assert (list(cfg.data.mean), list(cfg.data.std)) == ([0.25], [0.75])


def test_a_timm_model_from_a_weight_file(tmp_path):
    net = timm.create_model("vit_tiny_patch16_224", **build.model_args(compose("train", *MODEL)))
    torch.save(net.state_dict(), tmp_path / "w.pt")
    found = evaluate(tmp_path, "model=vit_tiny_demo", *MODEL, f"model.weights={tmp_path}/w.pt")
    assert_scores(found, net, Digits(**DIGITS))
    assert (found["model"], found["quant"]) == ("vit_tiny_patch16_224", "fp")
    assert found["weights"] == f"{tmp_path}/w.pt"


@pytest.mark.sample(1)
@pytest.mark.parametrize("to", ["split=test", "predict={photo}"])
@pytest.mark.parametrize("bias", [torch.inf, -torch.inf, torch.nan])
def test_logits_that_are_not_finite_are_an_error(
    tmp_path, refused, float_run, monkeypatch, bias, to
):
    photo, heads = write_image(tmp_path / "a.png", 8, 8), nn.Linear.forward

    def forward(layer, x):
        out = heads(layer, x)
        return torch.cat([out[:, :-1], out[:, -1:] + bias], 1) if layer.out_features == 10 else out

    monkeypatch.setattr(nn.Linear, "forward", forward)
    message = refused(
        compose(
            "eval", f"ckpt={last(float_run)}", f"run_dir={tmp_path}/eval", to.format(photo=photo)
        ),
    )
    assert ": the model's logits contain NaN or infinity; must be finite" in message


@pytest.mark.sample(1)
@pytest.mark.parametrize("command", ["eval", "ptq"])
@pytest.mark.parametrize("setting", ["ckpt", "model.weights"])
def test_a_head_that_nobody_trained_is_refused(command, setting, tmp_path, refused, float_run):
    state = qat.load(last(float_run)).state_dict()
    torch.save(
        state | {name: state[name][:5] for name in ("head.weight", "head.bias")}, tmp_path / "w.pt"
    )
    settings = [
        f"{setting}={tmp_path}/w.pt",
        "model=vit_tiny_demo",
        *MODEL,
        "data=digits",
        f"run_dir={tmp_path}/a",
    ]
    message = refused(compose(command, *settings))
    assert message.endswith(f"{setting}='{tmp_path}/w.pt': has 5 classes, the data 10")


def test_a_dataset_from_elsewhere_is_only_used_when_asked_for(tmp_path, refused, run_4bit):
    path = edited(
        last(run_4bit), tmp_path / "a.ckpt", {**DIGITS, "_target_": "somebody.elses.Digits"}
    )
    message = refused(compose("eval", f"ckpt={path}", f"run_dir={tmp_path}/a"))
    line = f"ckpt='{path}' was trained on 'somebody.elses.Digits', which is not a dataset of qat; "
    assert f"{line}choose it with data=..." in message
    assert evaluate(tmp_path / "b", f"ckpt={path}", "data=digits")["top1"] is not None


@pytest.mark.parametrize("asked", [[], ["data=digits"]])
def test_what_a_file_holds_and_its_dataset_ignores_is_no_mistake_of_the_user(
    tmp_path, run_4bit, asked
):
    stored = {**DIGITS, "_target_": "qat.data.Digits", "root": "photos", "memory_mb": 1}
    cfg = compose("eval", f"ckpt={edited(last(run_4bit), tmp_path / 'a.ckpt', stored)}", *asked)
    assert build_evaluated_net(cfg).data.settings.root is None


@pytest.mark.parametrize(
    "named", [{"name": "hfds/some/body"}, {"name": "torch/mnist", "download": True}]
)
def test_a_checkpoint_downloads_nothing(tmp_path, refused, run_4bit, named):
    path = edited(
        last(run_4bit), tmp_path / "a.ckpt", {**DIGITS, "_target_": "qat.data.Timm", **named}
    )
    message = refused(compose("eval", f"ckpt={path}", f"run_dir={tmp_path}/a"))
    download = " data.download=true" if "download" in named else ""
    assert message.endswith(f": set data=timm data.name={named['name']}{download}")
    write_image(tmp_path / "photo.png", 8, 8)
    evaluate(tmp_path / "b", f"ckpt={path}", f"predict={tmp_path}/photo.png")
    assert (tmp_path / "b" / "predictions.csv").is_file()


CODE = {"_target_": "os.mkdir", "path": "made"}
OURS = {"_target_": "qat.data.Digits", **DIGITS}
NO_DATASET = "which is not a dataset of qat; choose it with data=..."
NO_VALUE = "a value in its data config contains a class name or '${'; choose the data with data=..."
HOSTILE = {
    "through our imports": ({**CODE, "_target_": "qat.data.sampler.random._os.mkdir"}, NO_DATASET),
    "a function of ours": ({"_target_": "qat.data.image_transform", "settings": CODE}, NO_DATASET),
    "in a field": ({**OURS, "root": CODE}, NO_VALUE),
    "in a list": ({**OURS, "mean": [CODE]}, "data.mean=[{"),
    "without a dataset": ({**DIGITS, "mean": [CODE]}, "data.mean=[{"),
    "a term": ({**OURS, "root": "${oc.env:HOME}"}, NO_VALUE),
}


@pytest.mark.parametrize("asked", [[], ["predict=photo.png"]])
@pytest.mark.parametrize(("data", "line"), HOSTILE.values(), ids=HOSTILE)
def test_a_checkpoint_runs_no_code(tmp_path, refused, run_4bit, data, line, asked, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_image(tmp_path / "photo.png", 8, 8)
    path = edited(last(run_4bit), tmp_path / "a.ckpt", data)
    message = refused(compose("eval", f"ckpt={path}", f"run_dir={tmp_path}/run", *asked))
    assert not (tmp_path / "made").exists()
    assert line in message


def test_photos_are_treated_as_the_checkpoint_s_model_wants(float_run, tmp_path):
    # Its normalization and crop come from the model; with ckpt= alone no model is named on the command line.
    checkpoint = read_checkpoint(float_run / "checkpoints" / "best.ckpt")
    cfg = compose("eval", "data=imagenet", f"data.root={tmp_path}", f"run_dir={tmp_path}/eval")
    assert cfg.data.model is None
    choose_data(cfg, checkpoint)
    assert cfg.data.model == "vit_tiny_patch16_224"


def test_photos_are_prepared_as_the_tag_of_the_weights_says(tmp_path):
    net = timm.create_model(
        "test_vit", pretrained_cfg_overlay={"crop_pct": 0.5, "mean": (0.1,) * 3}
    )
    qat.save(net, tmp_path / "net.ckpt")
    cfg = compose("eval", "data=imagenet", f"data.root={tmp_path}", f"run_dir={tmp_path}/eval")
    choose_data(cfg, read_checkpoint(tmp_path / "net.ckpt"))
    assert (cfg.data.crop_pct, list(cfg.data.mean)) == (0.5, [0.1] * 3)
