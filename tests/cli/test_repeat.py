"""A run repeated from its `config.yaml`. Oracle: the first run's files, bit for bit."""

import pytest
import torch
from omegaconf import OmegaConf

from qat.cli.repeat import follow, recorded
from qat.model.checkpoint import read_checkpoint
from tests.cli.test_entry import command
from tests.commands import typed
from tests.conftest import TINY, compose, results

MEASURED = ("model", "quant", "recipe", "data", "seed", "split", "top1", "top5", "loss", "val_top1", "n_params", "size_bytes", "bitops")


def state(run):
    return read_checkpoint(run / "checkpoints" / "last.ckpt").state


def same_weights(a, b):
    left, right = state(a), state(b)
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def same_results(a, b):
    return [results(a)[key] for key in MEASURED] == [results(b)[key] for key in MEASURED]


def bare(run):
    """What a run's config says beside where it is."""
    cfg = OmegaConf.to_container(OmegaConf.load(run / "config.yaml"))
    cfg["logger"]["csv"].pop("save_dir")
    return {key: value for key, value in cfg.items() if key != "run_dir"}


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A 2-bit run by the command, with a few settings that are not the defaults."""
    folder = tmp_path_factory.mktemp("repeat")
    asked = (*TINY, "seed=3", "data.augment=none", "optimizer.lr=2e-3", "quant.overrides={blocks.0.*:{bits:4}}", "run_dir=first")
    code, out = typed("train.py", *asked, cwd=folder)
    assert code == 0, out
    return folder / "first"


@pytest.mark.parametrize("form", [["--config-dir", "first"], pytest.param(["--config-path", "{run}"], marks=pytest.mark.long)])
def test_a_training_run_gives_the_same_again(first, form):
    before = {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}
    new = first.parent / form[0].strip("-")
    code, out = typed("train.py", form[0], form[1].format(run=first), "--config-name", "config", f"run_dir={new}", cwd=first.parent)
    assert code == 0, out
    assert same_weights(first, new)
    assert same_results(first, new)
    assert (new / "metrics.csv").is_file()
    assert (new / "train.log").is_file()
    assert bare(new) == bare(first)
    assert {path: path.read_bytes() for path in first.rglob("*") if path.is_file()} == before
    assert "Warning" not in out


@pytest.mark.long
def test_what_follows_a_setting_follows_it_again(first):
    again = ("--config-dir", "first", "--config-name", "config")
    changed = ("seed=4", "quant.bits=3", "+data=digits", "data.hflip=0.25")
    code, out = typed("train.py", *again, *changed, "run_dir=changed", cwd=first.parent)
    assert code == 0, out
    cfg = OmegaConf.load(first.parent / "changed" / "config.yaml")
    assert (cfg.data.seed, cfg.quant.bits, cfg.data.augment, cfg.data.hflip) == (4, 3, "light", 0.25)
    assert cfg.optimizer.lr == 2e-3
    assert cfg.logger.csv.save_dir == cfg.run_dir == str(first.parent / "changed")


def test_the_directory_has_to_be_another(first):
    results_before = (first / "results.json").read_bytes()
    code, out = typed("train.py", "--config-dir", "first", "--config-name", "config", cwd=first.parent)
    assert code == 1
    assert out.strip().endswith(
        "run_dir is not set: the run that is repeated has its outputs there; choose another directory with run_dir=PATH"
    )
    code, out = typed("train.py", "--config-dir", "first", "--config-name", "config", "run_dir=first", cwd=first.parent)
    assert code == 1
    assert "holds best.ckpt already; choose another run_dir or set overwrite=true" in out
    assert (first / "results.json").read_bytes() == results_before


def test_an_evaluation_gives_the_same_again(first):
    code, out = typed("eval.py", "ckpt=first/checkpoints/best.ckpt", "data.batch_size=50", "run_dir=eval", cwd=first.parent)
    assert code == 0, out
    run = first.parent / "eval"
    again = ("--config-path", str(run), "--config-name", "config")
    code, out = typed("eval.py", *again, "run_dir=eval2", cwd=first.parent)
    assert code == 0, out
    new = first.parent / "eval2"
    assert same_results(run, new)
    assert results(new)["weights"] == "first/checkpoints/best.ckpt"
    assert OmegaConf.load(new / "config.yaml").data.batch_size == 50
    assert (new / "eval.log").is_file()


@pytest.mark.long
@pytest.mark.slow
def test_a_sweep_over_a_repeated_run(first):
    again = ("-m", "--config-dir", "first", "--config-name", "config")
    code, out = typed("train.py", *again, "seed=3,5", "run_dir=sweep", cwd=first.parent)
    assert code == 0, out
    sweep = first.parent / "sweep"
    assert same_weights(first, sweep / "0")
    assert not same_weights(first, sweep / "1")
    assert OmegaConf.load(sweep / "1" / "config.yaml").data.seed == 5
    assert "sweep_dir" not in OmegaConf.load(sweep / "1" / "config.yaml")


@pytest.mark.long
def test_another_process_gives_the_same_again(first):
    again = ("--config-path", str(first), "--config-name", "config")
    code, out, err = command("train.py", *again, "run_dir=process", cwd=first.parent)
    assert code == 0, out + err
    assert same_weights(first, first.parent / "process")
    assert same_results(first, first.parent / "process")
    assert "Warning" not in out + err


def test_the_file_has_values_and_says_what_followed_what():
    cfg = compose("train", "run_dir=/a", "resume=auto", "overwrite=true", "logger=[csv,mlflow]")
    found = OmegaConf.create(recorded(cfg))
    assert (found.data.seed, found.quant.act_bits, found.logger.csv.save_dir) == (0, None, "/a")
    assert (found.resume, found.overwrite, found.run_dir) == (False, False, "/a")
    assert found.follows["data.seed"] == "@{seed}"
    assert found.follows["logger.mlflow.store"] == "@{oc.select:sweep_dir,@{run_dir}}"
    assert "${" not in recorded(cfg)


def read_back(*overrides, **changes):
    """A config that was written and read again, with changes of the command line put in."""
    cfg = OmegaConf.create(recorded(compose("train", "run_dir=/a", "logger=[csv,mlflow]", *overrides)))
    for key, value in changes.items():
        OmegaConf.update(cfg, key.replace("__", "."), value)
    return cfg


def test_references_are_put_back_except_where_something_was_set():
    cfg = read_back(run_dir="/b", seed=7, quant__bits=3, data__seed=1, data__image_size=16)
    follow(cfg, ["run_dir=/b", "seed=7", "quant.bits=3", "data.seed=1", "data.image_size=16"])
    assert (cfg.data.seed, cfg.quant.bits, cfg.model.args.img_size) == (1, 3, 16)
    assert (cfg.logger.csv.save_dir, cfg.logger.mlflow.store) == ("/b", "/b")
    assert "follows" not in cfg


def test_a_whole_node_that_was_set_stays():
    cfg = read_back(run_dir="/b", quant={"bits": 3, "act_bits": 8})
    follow(cfg, ["run_dir=/b", "quant={bits:3,act_bits:8}"])
    assert cfg.quant.act_bits == 8


def test_what_was_taken_out_stays_out():
    cfg = read_back(run_dir="/b", logger=None)
    follow(cfg, ["run_dir=/b", "~logger"])
    assert cfg.logger is None


def test_other_configs_are_left_alone():
    cfg = compose("train", "run_dir=/a")
    before = OmegaConf.to_container(cfg)
    follow(cfg, [])
    assert OmegaConf.to_container(cfg) == before


def test_settings_that_are_gone_are_left_out_of_older_files():
    cfg = read_back(run_dir="/b")
    cfg.callbacks.finite.update({"policy": "skip", "max_rollbacks": 3})
    follow(cfg, ["run_dir=/b"])
    assert set(cfg.callbacks.finite) == set(compose("train").callbacks.finite)
