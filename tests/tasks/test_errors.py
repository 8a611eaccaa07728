"""Mistakes of new users: the arguments, and the line that is printed before the first step.

Those that belong to one feature are in the test of that feature, as `test_evaluate.py`.
"""

import os
import pickle
import re
import socket
import time

import pytest
import timm
import torch
from hydra.errors import HydraException
from lightning.pytorch import Trainer
from safetensors.torch import save_file

from qat.cli import mistakes
from qat.model import pretrained
from tests.conftest import compose, contents, tiny
from tests.payload import Payload

WHOLE = "must be an integer (?:of at least|from)"
NOTHING_TO_DO = "must be above 0"
SHARE = r"it has to be in \[0\.0, 1\.0\] or an int"
NUMBERS = "must be a number(?: of at least| from)?"
FLAGS = ("overwrite", "model.pretrained", "model.reset_head", "teacher.pretrained")


def shown(values):
    """Pairs of what is typed and what a message shows."""
    words = {"x": "'x'", "null": "None", "true": "True"}
    return [(value, words.get(value, value).replace(",", ", ")) for value in values.split()]


# Callbacks of Lightning that end a run in its middle, or change what it has laid out.
UNFIT = {
    "BackboneFinetuning": "optimizer.layer_decay",
    "BaseFinetuning": "a second run with ckpt=FILE",
    "BatchSizeFinder": "data.batch_size",
    "GradientAccumulationScheduler +callbacks.x.scheduling={1:4}": "trainer.accumulate_grad_batches",
    "LearningRateFinder": "optimizer.lr",
    "ModelPruning +callbacks.x.pruning_fn=l1_unstructured": "ckpt=FILE",
    "StochasticWeightAveraging +callbacks.x.swa_lrs=0.001": re.escape("callbacks=[default,ema]"),
}
TRAIN = [
    ("command=os", "^error: command='os': must be one of train, eval, ptq, analyze, export"),
    # the recipe
    *((f"quant.bits={v}", rf"quant\.bits={s}: {WHOLE} 2 to 8") for v, s in shown("1 9 1.5 x")),
    ("quant.overrides={blocks.0.*:{bits:9}}", rf"quant\.overrides\['blocks\.0\.\*'\]: quant\.bits=9: {WHOLE} 2 to 8"),
    ("quant.overrides={blocks.0:{attention:standard}}", r"quant\.overrides\['blocks\.0'\]: must match .* 'blocks\.0\.attn"),
    ("quant.overrides={block.0.*:{bits:4}}", r"quant\.overrides\['block\.0\.\*'\]: must match .* names look like 'blocks\.0\.attn"),
    ("quant.offsets=maybe", r"quant\.offsets='maybe': must be true or false"),
    ("+quant.colour=3", r"quant\.colour: must be one of name, bits"),
    ("+model.args.qk_norm=true", r"quant\.attention='qkr': this model normalizes queries and keys.*must be one of standard, float"),
    # the optimizer and its schedule
    *((f"optimizer.lr={v}", rf"optimizer\.lr={s}: {NUMBERS} above 0") for v, s in shown("0 x null")),
    ("optimizer.weight_decay=-1", rf"optimizer\.weight_decay=-1: {NUMBERS} 0"),
    *((f"optimizer.betas={v}", rf"optimizer\.betas={re.escape(s)}, .*opt='adamw': do not work together") for v, s in shown("[2,3] [0.9]")),
    ("optimizer.opt=adammw", r"optimizer\.opt='adammw': unknown; closest: .*adamw"),
    ("scheduler.interval=batch", r"scheduler\.interval='batch': must be one of epoch, step"),
    ("scheduler.warmup_epochs=50", rf"scheduler\.warmup_epochs=50\.0: {NUMBERS} 0 to below 1"),
    *(
        (f"scheduler.interval=epoch scheduler.{name}=0.5", rf"scheduler\.{name}=0\.5: must be an integer with scheduler\.interval=epoch")
        for name in ("warmup_epochs", "cooldown_epochs")
    ),
    ("~optimizer", "missing mandatory value: optimizer"),
    # the trainer
    *((f"trainer.max_epochs={v}", rf"trainer\.max_epochs={s}: must be an integer") for v, s in shown("0 1.5 x")),
    *((f"trainer.accumulate_grad_batches={v}", rf"accumulate_grad_batches={s}: must be an integer") for v, s in shown("0 1.5 x")),
    ("trainer.gradient_clip_val=-1", rf"trainer\.gradient_clip_val=-1: {NUMBERS} 0"),
    ("trainer.precision=foo", r"trainer\.precision='foo': Precision 'foo' is invalid\. Allowed precision values: .*bf16-mixed"),
    *((f"trainer.max_steps={v}", rf"trainer\.max_steps={s}: {WHOLE} -1") for v, s in shown("-5 1.5 x true")),
    *((f"trainer.{name}=x", rf"{name}='x': {WHOLE} -?[01]$") for name in ("min_steps", "log_every_n_steps", "num_sanity_val_steps")),
    *((f"trainer.{name}=x", rf"{name}='x': {NUMBERS} 0$") for name in ("limit_train_batches", "limit_val_batches", "overfit_batches")),
    *((f"trainer.limit_train_batches={v}", rf"limit_train_batches={s}: {NOTHING_TO_DO}") for v, s in shown("0")),
    *((f"trainer.limit_train_batches={v}", rf"limit_train_batches={s}: .*{SHARE}") for v, s in shown("2.5")),
    ("+trainer.max_time=5min", r"trainer\.max_time='5min': .*DD:HH:MM:SS"),
    *((f"+trainer.max_time={v}", rf"trainer\.max_time={v}: must be DD:HH:MM:SS") for v in ("5", "3.5")),
    *((f"+trainer.max_time={v}", r"trainer\.max_time=.*: must be DD:HH:MM:SS and above 0") for v in ("00:00:00:00", "{hours:0}", "soon")),
    ("data.scale=0.5", r"data\.scale=0\.5: must be two fractions of the image's area"),
    ("+trainer.val_check_interval=0", rf"trainer\.val_check_interval=0: {NOTHING_TO_DO}"),
    ("+trainer.val_check_interval=00:00:10:00", rf"val_check_interval='00:00:10:00': {NUMBERS} 0$"),
    ("+trainer.logger=false", r"trainer\.logger=False: must be left out; qat sets it, for example from callbacks, logger or run_dir"),
    ("trainer.max_steps=0", r"trainer\.max_steps=0: must be -1 \(no limit\) or above 0"),
    ("trainer.check_val_every_n_epoch=0", rf"trainer\.check_val_every_n_epoch=0: {WHOLE} 1"),
    ("trainer.check_val_every_n_epoch=5", r"check_val_every_n_epoch=5: no epoch would be validated; must be .* 1 to 1$"),
    ("trainer.devices=0", r"trainer\.devices=0: .*not a valid input using cpu"),
    ("trainer.accelerator=foo", r"trainer\.accelerator='foo': .*Available names are: auto, .*cpu"),
    ("trainer.sync_batchnorm=true", r"trainer\.sync_batchnorm=true: torch does not .* on CPUs; must be false$"),
    ("trainer.colour=3", r"trainer\.colour=3: unknown; must be one of accelerator, "),
    # data and model
    *((f"data.batch_size={v}", rf"data\.batch_size={s}: {WHOLE} 1") for v, s in shown("0 x")),
    ("data.num_workers=-1", rf"data\.num_workers=-1: {WHOLE} 0"),
    ("data.image_size=10", r"data\.image_size=10: must be a multiple of the model's patch size 4 x 4 "),
    ("data.num_classes=3", r"data\.num_classes=3: labels must be from 0 to 2; the train split has 9"),
    ("data=cifar10 data.root=/nowhere", r"data\.root='/nowhere': must be the folder that contains "),
    *(
        (f"data.{setting}=x{more}", rf"data\.{setting}=.x.: data={own} ignores data\.{setting}; data={reader} uses it, as do {others}$")
        for own, setting, more, reader, others in [
            ("digits", "root", "", "imagefolder", "cifar10, fashion_mnist, hf_parquet, imagenet, timm"),
            ("digits", "image_column", "", "hf_parquet", "cifar10, timm"),
            ("fashion_mnist", "label_column", " data=fashion_mnist data.root={files}", "hf_parquet", "cifar10, timm"),
            ("imagefolder", "image_column", " data=imagefolder data.root={files} data.num_classes=2", "hf_parquet", "cifar10, timm"),
        ]
    ),
    *((f"data.{setting}", rf"data=digits ignores data\.{setting.split('=')[0]}; ") for setting in ("memory_mb=0", "on_error=skip")),
    ("data=imagefolder data.root={files} data.num_classes=2 data.model=deit_tyni", r"data\.model='deit_tyni': must be the name of a timm model"),
    ("data=timm data.root={files} data.label_column=x", r"data\.label_column='x': with data=timm, works only for data\.name=hfds/NAME"),
    ("model.name=vit_tinny_patch16_224", r"model\.name='vit_tinny_patch16_224': timm has no such model; closest: .*vit_tiny_patch16_224"),
    ("model.name=resnet18", r"model\.name='resnet18' with .*unexpected keyword argument 'img_size'"),
    ("model.args.num_heads=5", r"model\.name='vit_tiny_patch16_224' with .*'num_heads': 5.*divisible by num_heads"),
    ("model.imports=[nope.nope]", r"model\.imports='nope\.nope': No module named 'nope'"),
    *((f"model.imports=['{name}']", rf"model\.imports='{name}': ") for name in ("", ".x")),
    # losses, callbacks, loggers
    ("loss.kure=-1", r"loss\.kure=-1: must be a number of at least 0"),
    ("loss.features_blocks=first", r"loss\.features_blocks='first': must be one of all, last"),
    ("memory=less", r"memory='less': must be one of save, recompute"),
    ("kernels=fast", r"kernels='fast': must be one of auto, triton, off"),
    ("loss=kd", r"no teacher; set teacher\.ckpt=FILE"),
    ("loss.terms.ce._target_=qat.losses.Nope", r"loss\.terms\.ce\._target_='qat\.losses\.Nope'"),
    ("+callbacks.x._target_=nowhere.Nope", r"callbacks\.x\._target_='nowhere\.Nope'"),
    *(
        (f"+callbacks.x._target_=lightning.pytorch.callbacks.{name}", rf"callbacks\.x: a run cannot have {name.split()[0]}; .*{instead}")
        for name, instead in UNFIT.items()
    ),
    ("+callbacks.x._target_=torch.nn.Identity", r"callbacks\.x: must be a subclass of lightning\.pytorch\.Callback, not Identity"),
    ("callbacks=[default,freeze] callbacks.freeze.threshold=3", rf"callbacks\.freeze\.threshold=3: {NUMBERS} above 0 to below 1"),
    ("callbacks=[default,oscillation] callbacks.oscillation.threshold=1", rf"oscillation\.threshold=1: {NUMBERS} 0 to below 1"),
    ("callbacks.best.monitor=val/nope", r"callbacks\.best\.monitor='val/nope': must be a validation metric: .*val/top1, val/top5, val/loss"),
    ("checkpoint.every_n_steps=0", rf"checkpoint\.every_n_steps=0: {WHOLE} 1"),
    ("+logger.x._target_=nowhere.Nope", r"logger\.x\._target_='nowhere\.Nope'"),
    ("+logger.x._target_=torch.nn.Identity", r"logger: must be a subclass of lightning\.pytorch\.loggers\.Logger, not Identity"),
    ("quant=fp quant.bits=4", r"quant\.bits=4: quant=fp leaves the model in float"),
    ("quant.weight_quantizer=foo", r"quant\.weight_quantizer=.foo.: must be one of statsq, .*, seq, minmax, mxfp, nvfp4, fp8, float"),
    ("data.augment=bad", r"data\.augment='bad': must be one of none, light, timm"),
    ("+data.colour=3", "unexpected keyword argument 'colour'"),
    ("data=cifar10", r"data\.root=None: must be the folder that contains "),
    ("data._target_=torch.nn.Identity", r"data\._target_='torch\.nn\.Identity': must be a subclass of qat\.data\.ImageData"),
    ("model.init=new", r"model\.init='new': must be one of full, reference"),
    ("lsq_grad_batch=all", r"lsq_grad_batch='all': must be one of global, process"),
    ("loss.label_smoothing=2", r"loss\.label_smoothing=2: must be a number from 0 to below 1"),
    ("loss.terms.ce._target_=torch.nn.Identity ~loss.terms.ce.label_smoothing", r"loss\.terms\.ce: must be a subclass of qat\.losses\.LossTerm, not Identity"),
    ("callbacks.best.monitor=val/loss", r"callbacks\.best\.mode='max': the best val/loss is the lowest; must be min"),
    ("callbacks.best.mode=min", r"callbacks\.best\.mode='min': the best val/top1 is the highest; must be max"),
    ("+callbacks.best.save_top_k=-1", r"callbacks\.best\.save_top_k=-1: must be 1, as all files are best\.ckpt; .*best_k"),
    *((f"trainer.{name}=null", rf"trainer\.{name}=null: must be a number") for name in ("max_steps", "limit_train_batches")),
    ("loss.kure=1 +loss.terms.kure._target_=qat.losses.CrossEntropy", r"loss\.terms\.kure: must have another name than loss\.regularizers\.kure"),
    ("+callbacks.best.save_last=true", r"both write last\.ckpt"),
    ("callbacks.best.filename=last", r"callbacks\.(best and callbacks\.last|last and callbacks\.best): both write last\.ckpt"),
    ("callbacks=[default,best_k] callbacks.best_k.filename=best callbacks.best_k.save_top_k=1", r"callbacks\.\w+ and callbacks\.\w+: both write best\.ckpt"),
    ("callbacks.best.filename=last +callbacks.best.dirpath=${run_dir}/x/../checkpoints", r"both write last\.ckpt"),
    ("+callbacks.last.dirpath=elsewhere", r"callbacks\.last\.dirpath='.*': must be null; a run resumes from"),
    ("callbacks=[default,early_stop] callbacks.early_stop.patience=-1", rf"callbacks\.early_stop\.patience=-1: {WHOLE} 0"),
    ("callbacks=[default,early_stop] callbacks.early_stop.min_delta=nan", rf"callbacks\.early_stop\.min_delta=nan: {NUMBERS} 0"),
    ("callbacks=[default,early_stop] trainer.limit_val_batches=0", r"trainer\.limit_val_batches=0: callbacks\.early_stop needs val/top1; must be above 0"),
    ("optimizer=sgd optimizer.momentum=nan", r"optimizer\.momentum=nan: must be a finite number"),
    *((f"model.args.drop_path_rate={v}", rf"model\.args\.drop_path_rate={v}: {NUMBERS} 0 to below 1") for v in ("nan", "-0.5", "1")),
    ("callbacks=ema", r"callbacks: no callback saves the averaged weights; set callbacks=\[default,ema\]"),
    ("callbacks=[default,ema] +callbacks.best.save_weights_only=true", "callbacks: save_weights_only=true .* must be false"),
    ("loss=kd teacher.model=deit_tiny_patch16_224 teacher.pretrained=true", r"^error: teacher\.pretrained=true: .* 1000 classes, .*; use teacher\.ckpt=FILE$"),
    ("loss=kd teacher.model=deit_tiny_patch16_224", r"teacher\.model='deit_tiny_patch16_224': set its weights with teacher\.ckpt=FILE"),
    # the rest
    *((f"seed={v}", rf"seed={s}: {WHOLE} 0") for v, s in shown("-1 99999999999")),
    *((f"seed={v}", rf"^seed: Value '{v}' .* could not be converted to Integer$") for v in ("x", "1.5")),
    *((f"{name}=maybe", rf"^{name}: Value 'maybe' is not a valid bool \(type str\)$") for name in FLAGS),
    ("compile=maybe", r"compile='maybe': must be one of true, false, auto, graphs$"),
    ("compile=graphs trainer.accelerator=cpu", r"compile=graphs: CUDA graphs need CUDA, .*; must be one of true, false, auto$"),
    ("+colour=3", "colour: unknown; must be one of allow_changed_data"),
    ("+model.pretrainde=true", r"model\.pretrainde: unknown; closest: pretrained"),
    ("resume=yes", r"resume='yes': must be one of false, true, auto"),
    ("resume=true", r"resume=true: run_dir='.*' has no checkpoints/last\.ckpt; use resume=auto to start"),
    ("ckpt=/nowhere.ckpt", r"ckpt='/nowhere\.ckpt': no such file"),
    ("ckpt=3", "ckpt=3: must be a path"),
    ("ckpt=a.ckpt model.weights=b.pt", "ckpt and model.weights are set: a model starts from one of them"),
    (
        "ckpt={run}",
        r"ckpt='.*': must be a file, not a folder; this one contains checkpoints/best\.ckpt",
    ),
    ("ckpt={run}/config.yaml", r"ckpt='.*config\.yaml': not a checkpoint .*must be a file of torch\.save or safetensors"),
    ("ckpt={files}/cut.ckpt", r"ckpt='.*cut\.ckpt': not a checkpoint .*damaged"),
    ("ckpt={files}/nan.ckpt", r"ckpt='.*nan\.ckpt': weight blocks\.0\.mlp\.fc1\.weight is NaN or infinite"),
    *((f"{setting}={{files}}/cut.safetensors", rf"{setting}='.*cut\.safetensors'") for setting in ("ckpt", "model.weights")),
    ("loss=kd teacher.ckpt={best} teacher.model=deit_tiny_patch16_224", r"teacher\.ckpt='.*' contains vit_tiny_patch16_224"),
    ("run_dir={run}", r"run_dir='.*' contains best\.ckpt already; choose another run_dir or set overwrite=true"),
    ("run_dir={run} resume=true", r"resume: .*last\.ckpt has another recipe \(quant: act_bits, .*use ckpt=PATH"),
]  # fmt: skip

EVAL = [
    ("", r"ckpt is not set: must be a checkpoint; or set model="),
    ("ckpt={files}/resnet.pt", r"ckpt='.*resnet\.pt' does not name its model; set model=NAME"),
    ("ckpt={files}/resnet.pt model=vit_tiny_demo", r"ckpt='.*resnet\.pt': the weights do not fit vit_tiny_patch16_224"),
    ("ckpt={best} ckpt_bits=5", r"ckpt_bits=5: works only with files of OFQ's own code"),
    ("ckpt={best} model=deit_t", r"model\.name='deit_tiny_patch16_224': ckpt='.*' contains vit_tiny_patch16_224"),
    ("ckpt={best} model=vit_tiny_demo model.pretrained=true", "ckpt and model.pretrained are set: a model starts from one of them"),
    ("ckpt={best} data.root=x", r"data\.root='x': data=digits ignores data\.root; data=imagefolder uses it"),
    ("ckpt={best} data=digits data.on_error=skip", r"data\.on_error='skip': data=digits ignores data\.on_error; "),
    ("ckpt={best} data=digits data.num_classes=12", r"data\.num_classes=12: the model has 10 classes; must be 10, or choose another model"),
]  # fmt: skip


@pytest.fixture(scope="module")
def places(tmp_path_factory, float_run):
    """A finished run, and files that are no checkpoints."""
    files = tmp_path_factory.mktemp("files")
    best = float_run / "checkpoints" / "best.ckpt"
    (files / "cut.ckpt").write_bytes(best.read_bytes()[: best.stat().st_size // 2])
    torch.save(timm.create_model("resnet18").state_dict(), files / "resnet.pt")
    content = torch.load(best, weights_only=True)
    save_file(content["state_dict"], files / "cut.safetensors")
    os.truncate(files / "cut.safetensors", 1000)
    content["state_dict"]["net.blocks.0.mlp.fc1.weight"][0, 0] = torch.nan
    torch.save(content, files / "nan.ckpt")
    return {"run": str(float_run), "best": str(best), "files": str(files)}


@pytest.fixture
def no_step(monkeypatch):
    """Fails a test that begins to train or test."""
    for loop in ("fit", "test"):
        monkeypatch.setattr(Trainer, loop, lambda *args, **kwargs: pytest.fail("a step was taken"))


def overrides(typed, places):
    """What is typed, with the places filled in; other braces are Hydra's."""
    for name, path in places.items():
        typed = typed.replace(f"{{{name}}}", path)
    return typed.split()


@pytest.mark.sample(40)
@pytest.mark.parametrize(("typed", "line"), TRAIN, ids=[typed for typed, _ in TRAIN])
def test_train(tmp_path, refused, no_step, float_run, places, typed, line):
    before = contents(float_run)
    try:
        cfg = tiny(tmp_path / "run", *overrides(typed, places))
    except HydraException as error:
        message = mistakes.error_line(error)
    else:
        message = refused(cfg)
    assert re.search(line, message), message
    assert not list(tmp_path.rglob("*.ckpt"))
    assert contents(float_run) == before


def test_a_validation_that_no_epoch_reaches(tmp_path, refused):
    line = refused(tiny(tmp_path / "run", "+trainer.val_check_interval=99"))
    assert "trainer.val_check_interval=99: must be at most the 2 batches of an epoch; " in line


@pytest.mark.parametrize(("typed", "line"), EVAL, ids=[typed for typed, _ in EVAL])
def test_evaluate(tmp_path, refused, no_step, places, typed, line):
    message = refused(compose("eval", f"run_dir={tmp_path}/run", *overrides(typed, places)))
    assert re.search(line, message), message


@pytest.mark.parametrize("setting", ["ckpt", "model.weights", "loss=kd teacher.ckpt"])
@pytest.mark.parametrize(
    "write",
    [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))],
    ids=["torch", "pickle"],
)
def test_code_in_a_file_is_never_run(tmp_path, refused, no_step, write, setting):
    write(
        {"state_dict": {"a": torch.zeros(1)}, "more": Payload(tmp_path / "made")},
        tmp_path / "a.ckpt",
    )
    message = refused(tiny(tmp_path / "run", *f"{setting}={tmp_path}/a.ckpt".split()))
    assert "a.ckpt': not a checkpoint that can be read safely" in message
    assert not (tmp_path / "made").exists()


def test_a_host_that_takes_calls_and_says_nothing_costs_less_than_five_seconds(
    tmp_path, refused, no_step, monkeypatch
):
    assert pretrained.TIMEOUT_S < 5
    monkeypatch.setattr(pretrained, "TIMEOUT_S", 0.2)
    monkeypatch.setenv("no_proxy", "*")
    cfg = tiny(tmp_path / "run", "model=deit_t", "data.image_size=32", "model.pretrained=true")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        began = time.monotonic()
        message = refused(cfg)
    assert "model.pretrained=true: the weights of 'deit_tiny_patch16_224' are not in the" in message
    assert "timed out" in message
    assert time.monotonic() - began < 5
