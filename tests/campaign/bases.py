"""Configs of all commands, valid as they are, and the settings of each that are changed."""

from dataclasses import dataclass
from typing import Any

from tests.conftest import compose, tiny

# Outputs of every command go to a folder of the case; a default_* group only stands in for `data`.
LEFT_OUT = ("run_dir", "default_data", "default_photos")
SMALL = ("data.calibration_images=8", "data.batch_size=4")
FLOAT, QUANTIZED = "{float}", "{quantized}"


@dataclass(frozen=True)
class Base:
    """A command, its config, and the groups whose settings are changed; () = all."""

    name: str
    task: str
    cfg: Any
    groups: tuple[str, ...]


def _train(name, groups, *overrides):
    return name, "train", groups, overrides


def _of(command, task):
    return lambda name, groups, *overrides: (name, task, groups, (command, *overrides))


_evaluate, _ptq, _analyze, _export = _of("eval", "evaluate"), _of("ptq", "ptq"), _of("analyze", "analyze"), _of("export", "export")
_SMALL_PTQ = ("data.calibration_images=8", "ptq.batch=4")
_TINY_MODEL = ("model=vit_tiny_demo", "++model.args.depth=1", "++model.args.embed_dim=24")

# What is changed; the rest of a config is as in the first of its command.
TABLE = (
    _train("train", ()),
    _train("train cga", ("callbacks.cga", "callbacks.oscillation"), "callbacks=[default,cga,oscillation]", "callbacks.cga.epochs=1"),
    _train("train freeze", ("callbacks.freeze", "callbacks.ema"), "callbacks=[default,freeze,ema]"),
    _train(
        "train kd", ("loss", "teacher"), "loss=kd_dampening", f"teacher.ckpt={FLOAT}", "quant=lsq_4bit", "loss.kure=1", "loss.grad_l1=1"
    ),
    _train("train sgd", ("optimizer",), "optimizer=sgd"),
    _train("train fp", ("quant",), "quant=fp"),
    _train("train tensorboard", ("logger",), "logger=tensorboard"),
    _train("train wandb", ("logger",), "logger=wandb"),
    _train("train mlflow", ("logger",), "logger=mlflow"),
    _evaluate("eval", (), f"ckpt={QUANTIZED}"),
    _evaluate("eval digits", ("data",), f"ckpt={QUANTIZED}", "data=digits"),
    _evaluate("eval model", ("model",), *_TINY_MODEL, "data=digits"),
    _ptq("ptq", (), f"ckpt={FLOAT}", *_SMALL_PTQ),
    _ptq("ptq evolution", ("search",), f"ckpt={FLOAT}", *_SMALL_PTQ, "search=evolution"),
    _ptq(
        "ptq keep",
        ("ptq", "teacher", "search"),
        f"ckpt={QUANTIZED}",
        *_SMALL_PTQ,
        "ptq=keep",
        "search=evolution",
        "search.targets=[attn.input]",
        f"teacher.ckpt={FLOAT}",
    ),
    *(_analyze(f"analyze {name}", ("analysis",), f"ckpt={QUANTIZED}", "images=8", f"analysis={name}") for name in ("cost", "landscape")),
    *(
        _analyze(f"analyze {name}", ("analysis",), f"ckpt={QUANTIZED}", "images=8", f"analysis={name}")
        for name in ("sensitivity", "weights")
    ),
    _analyze("analyze oscillation", ("analysis",), f"ckpt={QUANTIZED}", "analysis=oscillation"),
    _analyze("analyze", (), f"ckpt={QUANTIZED}", "images=8", "analysis=robustness"),
    _export("export", (), f"ckpt={QUANTIZED}", "images=8"),
    _export("export packed", ("format", "file"), f"ckpt={QUANTIZED}", "images=8", "format=packed"),
)


def bases(float_ckpt, quantized_ckpt):
    """All of them.

    Args:
        float_ckpt: a checkpoint of a float run.
        quantized_ckpt: one of a quantized run, with `callbacks=[default,oscillation]`.
    """
    for name, task, groups, overrides in TABLE:
        filled = [one.replace(FLOAT, str(float_ckpt)).replace(QUANTIZED, str(quantized_ckpt)) for one in overrides]
        cfg = tiny("run", *SMALL, *filled) if task == "train" else compose(filled[0], "run_dir=run", *filled[1:])
        yield Base(name, task, cfg, groups or tuple(key for key in cfg if key not in LEFT_OUT))
