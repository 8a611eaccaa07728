"""Where tests run: on the device, in Triton's interpreter or on the CPU; and a last line that says what ran where."""

import collections
import importlib.util

import pytest
import torch

WHERE = pytest.StashKey[str]()
COMMAND = "python -m tests.gpu"


def _interprets():
    if importlib.util.find_spec("triton") is None:
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


@pytest.fixture
def device():
    """A CUDA device; skipped without one."""
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    return torch.device("cuda")


def _rounds(monkeypatch):
    """Have the interpreter round to bfloat16 as compiled kernels do (`test_machine_code`); by itself it cuts digits off."""
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(x, source, target, mode):
        if (str(source), str(target)) != ("fp32", "bf16"):
            return convert(x, source, target, mode)
        return torch.from_numpy(x.copy()).bfloat16().view(torch.int16).numpy().view("uint16")

    monkeypatch.setattr(interpreter, "_convert_float", rounded)


def _multiplies(monkeypatch):
    """Have the interpreter multiply bfloat16, which it keeps as the integers that its bits are."""
    from triton.language import float32
    from triton.runtime import interpreter

    multiply = interpreter.InterpreterBuilder.create_dot

    def of_numbers(self, a, b, *rest):
        wide = (
            self.create_fp_ext(x, float32) if str(x.dtype.scalar) == "bf16" else x for x in (a, b)
        )
        return multiply(self, *wide, *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", of_numbers)


def _contracts(monkeypatch):
    """Have the interpreter round `fma` once, as a device does."""
    from triton.runtime import interpreter

    def once(self, a, b, c):
        total = a.data.astype("float64") * b.data + c.data
        return interpreter.TensorHandle(total.astype(a.data.dtype), a.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fma", once)


@pytest.fixture
def kernels_on(monkeypatch):
    """Type of the device that Triton's kernels run on: `cuda`, or `cpu` in its interpreter."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    if _interprets():
        _rounds(monkeypatch)
        _multiplies(monkeypatch)
        _contracts(monkeypatch)
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip(f"there is no CUDA device; {COMMAND} has Triton's interpreter run the kernels")
    return "cuda"


@pytest.fixture
def anywhere():
    """The CUDA device, or the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def recorded(monkeypatch):
    """A list that grows by one with each CUDA graph that torch records."""
    from torch._inductor.cudagraph_trees import CUDAGraphTreeManager

    record, graphs = CUDAGraphTreeManager.record_function, []

    def seen(self, *args):
        graphs.append(self)
        return record(self, *args)

    monkeypatch.setattr(CUDAGraphTreeManager, "record_function", seen)
    return graphs


def pytest_configure(config):
    config.addinivalue_line("markers", "golden: compares with cases made by the papers' own code")
    config.addinivalue_line("markers", "long: more than the tests of every change have time for")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item):
    report = (yield).get_result()
    used = item.funcargs if hasattr(item, "funcargs") else {}
    report.where = (
        "Triton's interpreter"
        if used.get("kernels_on") == "cpu"
        else "CPU"
        if not torch.cuda.is_available()
        else "device"
    )


def pytest_terminal_summary(terminalreporter):
    """One line: how many tests ran where, and why others did not."""
    stats = terminalreporter.stats
    of_here = [
        report
        for kind in ("passed", "failed")
        for report in stats.get(kind, ())
        if "tests/gpu/" in report.nodeid
    ]
    ran = collections.Counter(report.where for report in of_here if hasattr(report, "where"))
    skipped = [report for report in stats.get("skipped", ()) if "tests/gpu/" in report.nodeid]
    why = collections.Counter(
        str(report.longrepr[2]).removeprefix("Skipped: ") for report in skipped
    )
    if ran or why:
        done = ", ".join(
            f"{count} {'in' if 'interpreter' in place else 'on the'} {place}"
            for place, count in ran.items()
        )
        left = "; ".join(f"{count}: {reason}" for reason, count in why.items())
        terminalreporter.write_line(f"tests/gpu: ran {done or 'none'}; not run {left or 'none'}")
