"""`ptq=compensate_*` and `ptq=reconstruct_*` as commands. Oracle: the file, read by the other commands."""

import pytest
import torch

import qat
from qat.tasks.export import FILE_NAMES, export
from qat.tasks.ptq import ptq
from qat.tasks.ptq_start import _settings_to_resume
from qat.utils.files import write_torch
from tests.conftest import compose, evaluate, results
from tests.errors import usage_error
from tests.tasks.test_evaluate import last

SMALL = ("data.calibration_images=64", "ptq.batch=32")
STEPS = ("ptq.reconstruct.steps=3", "ptq.reconstruct.batch=16")


def quantize(run_dir, float_run, *overrides):
    ptq(compose("ptq", f"run_dir={run_dir}", f"ckpt={last(float_run)}", *SMALL, *overrides))
    return results(run_dir)


@pytest.mark.long
def test_compensation_survives_evaluation_packing_and_export(tmp_path, float_run, refused):
    found = quantize(tmp_path / "q", float_run, "ptq=compensate_w4a4")
    assert found["compensation"]["layers"] == 6  # of one block
    file = tmp_path / "q/quantized.ckpt"
    assert evaluate(tmp_path / "e", f"ckpt={file}")["top1"] == found["top1"]
    for name in ("packed", "onnx"):
        export(compose("export", f"ckpt={file}", f"format={name}", f"run_dir={tmp_path / name}"))
        assert results(tmp_path / name).get("error") is None
    packed = tmp_path / "packed" / FILE_NAMES["packed"]
    assert evaluate(tmp_path / "p", f"ckpt={packed}")["top1"] == found["top1"]
    line = refused(
        compose(
            "ptq",
            f"run_dir={tmp_path / 'k'}",
            f"ckpt={file}",
            "ptq=keep",
            "search=evolution",
            *SMALL,
        ),
    )
    assert (
        "contains a quantized model whose weights were fitted (compensate), so it has no float logits as targets; set teacher.ckpt=FILE"
        in line
    )


@pytest.mark.long
def test_reconstruction_goes_on_and_a_search_follows_the_float_net(tmp_path, float_run, caplog):
    overrides = (
        "ptq=reconstruct_w3a3",
        *STEPS,
        "search=evolution",
        "search.passes=1",
        "search.cycles=1",
    )
    found = quantize(tmp_path / "q", float_run, *overrides)
    assert found["reconstruction"]["units"] == 3
    assert found["search"]["evaluations"] == 1
    assert {"reconstruct.ckpt", "reconstruct.csv", "search.csv", "quantized.ckpt"} <= {
        p.name for p in (tmp_path / "q").iterdir()
    }
    before = qat.load(tmp_path / "q/quantized.ckpt").state_dict()
    state = torch.load(tmp_path / "q/reconstruct.ckpt", weights_only=True)
    assert found["wall_seconds"] > state["state"]["seconds"] > 0
    state["state"]["seconds"] = 3600.0
    torch.save(state, tmp_path / "q/reconstruct.ckpt")
    again = quantize(tmp_path / "q", float_run, *overrides, "resume=true")
    assert again["top1"] == found["top1"]
    assert 3600 < again["wall_seconds"] < 4200
    after = qat.load(tmp_path / "q/quantized.ckpt").state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [m for m in caplog.messages if m.startswith("resume: ")] == []
    # The states hold the settings: nothing depends on this file.
    (tmp_path / "q/config.yaml").write_text("ptq: [")
    quantize(tmp_path / "q", float_run, *overrides, "resume=true", "trainer.precision=bf16-mixed")
    assert "resume: trainer.precision was '32-true', is 'bf16-mixed'" in caplog.messages
    with usage_error(
        r"ptq\.method='compensate' \(the run had 'reconstruct'\): a resumed run keeps its method",
    ):
        quantize(tmp_path / "q", float_run, *overrides, "resume=true", "ptq.method=compensate")
    files = [path for path in (tmp_path / "q").iterdir() if path.suffix in {".ckpt", ".csv"}]
    before = [path.read_bytes() for path in files]
    quantize(tmp_path / "q", float_run, *overrides, "overwrite=true", "trainer.fast_dev_run=true")
    with usage_error(r"trainer\.fast_dev_run: resume='auto' would change .*; a dry run "):
        quantize(tmp_path / "q", float_run, *overrides, "resume=auto", "trainer.fast_dev_run=true")
    assert [path.read_bytes() for path in files] == before, "a dry run keeps them"


@pytest.mark.parametrize("text", ["ptq: [", "- 1", "\0", "a: ${b}", "a: {", None])
def test_a_state_without_settings_beside_a_damaged_config(tmp_path, text):
    write_torch(tmp_path / "search.ckpt", {"settings": {}, "inputs": "", "rows": [], "state": {}})
    if text is not None:
        (tmp_path / "config.yaml").write_text(text)
    with usage_error(r"^resume: .*config\.yaml cannot be read; [^\n]+$"):
        _settings_to_resume(tmp_path)
    (tmp_path / "config.yaml").write_text("ptq: {method: calibrate}")
    assert _settings_to_resume(tmp_path) == {"ptq": {"method": "calibrate"}}


def test_compensation_runs_on_one_device(tmp_path, float_run):
    with usage_error(r"trainer\.devices=2: must be 1 with a search or ptq\.method=comp"):
        quantize(tmp_path, float_run, "ptq=compensate_w4a4", "trainer.devices=2")
