"""Steps that are left out, and step sizes that died. Oracle for a step left out: the same run on data without that step's batches."""

import copy
import logging

import pytest
import timm
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader

import qat
from qat.callbacks import CGA, FaultGuard, IterativeFreezing, Oscillation, finite
from qat.callbacks.fault_cause import UNKNOWN
from qat.losses import LossTerm
from tests.callbacks.fitting import differing, fit, module, net
from tests.tiny import images, sites, vit

STEPS = 6


def data(bad=()):
    """Six batches of four; a NaN in one image of each bad one."""
    found = [(images(4, seed), torch.arange(4)) for seed in range(STEPS)]
    for number in bad:
        found[number][0][1, 0, 2, 3] = torch.nan
    return found


def without(batches, bad):
    return [batch for number, batch in enumerate(batches) if number not in bad]


def run(learner, *callbacks, batches, **settings):
    """One epoch; the last of the callbacks sees what a checkpoint would hold."""
    return fit(learner, *callbacks, data=DataLoader(batches, batch_size=None), max_epochs=1, **settings)


def held(trainer, learner):
    """Everything a step may change: weights and buffers, moments and counts, means of the epoch, states of trackers."""
    (optimizer,) = trainer.optimizers
    found = {f"net.{name}": value for name, value in learner.state_dict().items()}
    for i, state in optimizer.state_dict()["state"].items():
        found |= {f"optimizer.{i}.{key}": value for key, value in state.items()}
    for i, group in enumerate(optimizer.param_groups):
        found |= {f"group.{i}.{key}": torch.as_tensor(value) for key, value in group.items() if key == "step"}
    for name, mean in learner.train_means.items():
        found |= {f"mean.{name}.{key}": value for key, value in mean.metric_state.items()}
    for callback in trainer.callbacks:
        if getattr(callback, "state_follows_steps", False):
            found |= flat(f"{type(callback).__name__}.", callback.state_dict())
    return found


def flat(prefix, state):
    if not isinstance(state, dict):
        return {prefix: state}
    return {name: value for key, one in state.items() for name, value in flat(f"{prefix}{key}.", one).items()}


@pytest.fixture(params=["host", "device"])
def place(request, monkeypatch):
    """Where it is decided: at once on the host, or as on an accelerator, with the optimizer's counts of steps on the host."""
    if request.param == "device":
        monkeypatch.setattr(finite, "_is_free", lambda tensor: False)
    return request.param


class Observer(Callback):
    """Keeps what is there at the end of training, in front of the callbacks' own ends."""

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.is_last_batch:
            trainer.callbacks[0].state_dict()  # as a checkpoint would: settles what is open
            self.found = {name: value.clone() for name, value in held(trainer, pl_module).items()}


def cnn():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))


def trackers():
    return [Oscillation(), IterativeFreezing(threshold=0.1, final_threshold=0.1, momentum=0.2)]


def gating():
    return [CGA(start_epoch=0, boundary_range=0.1, lr=1e-3)]


def pairs(start, bad, *, callbacks=list, optimizer=None, accumulate=1):
    """What is held behind a run with bad batches under `skip`, and behind one without them; the messages of the first."""
    options = {} if optimizer is None else {"optimizer": lambda net: timm.optim.create_optimizer_v2(net, opt=optimizer, lr=1e-3)}
    ends = []
    windows = {number - number % accumulate + k for number in bad for k in range(accumulate)}
    for batches, guards in ((data(bad), [FaultGuard("skip")]), (without(data(), windows), [])):
        learner, observer = module(start, **options), Observer()
        run(learner, *guards, *callbacks(), observer, batches=batches, accumulate_grad_batches=accumulate)
        ends.append(observer.found)
    return ends


@pytest.mark.parametrize(
    ("where", "start", "bad", "options"),
    [
        ("host", net, (2,), {}),
        ("device", net, (2,), {}),
        ("host", net, (0, 3, 4), {"callbacks": trackers}),
        ("device", net, (0, 3, 4), {"callbacks": trackers}),
        ("device", net, (3,), {"callbacks": gating}),
        ("device", net, (3,), {"optimizer": "lamb"}),  # counts steps in its groups
        ("device", net, (3,), {"accumulate": 2}),
        ("host", cnn, (2,), {"optimizer": "momentum"}),  # running statistics
        ("device", cnn, (2,), {"optimizer": "momentum"}),
    ],
)
def test_a_step_left_out_changes_nothing(where, start, bad, options, monkeypatch):
    if where == "device":
        monkeypatch.setattr(finite, "_is_free", lambda tensor: False)
    ours, theirs = pairs(start(), bad, **options)
    assert theirs.keys() == ours.keys()
    assert any(name.startswith(("optimizer.", "group.")) for name in theirs)
    assert differing(ours, theirs) == []


def test_counts_of_steps_on_the_host_are_put_right_in_front_of_the_next_step(monkeypatch):
    # Adam's counts, as if they alone were not on the device: nothing is chosen for them there.
    from qat.callbacks.fault_undo import StepUndo

    monkeypatch.setattr(finite, "_is_free", lambda tensor: False)
    choose, counts = StepUndo.revert_if, []

    def elsewhere(undo, bad):
        there = [(t, before) for t, before in undo._tensors if t.ndim == 0]
        undo._tensors = [(t, before) for t, before in undo._tensors if t.ndim]
        choose(undo, bad)
        undo._tensors += there
        counts.append(int(undo._optimizers[0].state_dict()["state"][0]["step"]))

    monkeypatch.setattr(StepUndo, "revert_if", elsewhere)
    ours, theirs = pairs(net(), (2,))
    assert counts == [2, 3, 3, 4, 5]
    assert differing(ours, theirs) == []


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_healthy_run_is_left_as_it_is(policy, monkeypatch):
    monkeypatch.setattr(finite, "_is_free", lambda tensor: False)
    ends = []
    start = net()
    for guards in ([FaultGuard(policy)], []):
        learner, observer = module(start), Observer()
        run(learner, *guards, *trackers(), observer, batches=data())
        ends.append(observer.found)
    assert differing(*ends) == []


def test_what_is_left_out_is_named_counted_and_logged(place, caplog):
    logged = []

    class Look(Callback):
        def on_train_batch_end(self, trainer, *_):
            logged.append(trainer.logged_metrics.get("faults/skipped"))

    run(module(net()), FaultGuard("skip"), Look(), batches=data((1, 4)))
    said = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert said == [f"step {n} left out: the loss of step {n} is nan; first not finite: the images of the batch" for n in (1, 4)]
    assert int(logged[-1]) == 2


def test_too_many_in_a_row_stop_the_run(place):
    with pytest.raises(qat.UsageError) as error:
        run(module(net()), FaultGuard("skip", max_in_a_row=2), batches=data((0, 2, 3)))
    assert "\n" not in str(error.value)
    assert str(error.value) == (
        "training stopped: the loss of step 3 is nan; first not finite: the images of the batch; "
        "2 steps in a row were left out (callbacks.finite.max_in_a_row); "
        "checkpoints are from before; a lower optimizer.lr or trainer.gradient_clip_val=1 may help"
    )


def test_gradients_alone_are_enough(caplog):
    class Spoil(Callback):
        def on_after_backward(self, trainer, pl_module):
            if trainer.global_step == 2:
                pl_module.net.head.weight.grad[0, 0] = torch.inf

    ends = []
    for batches, callbacks in ((data(), [FaultGuard("skip"), Spoil()]), (without(data(), (2,)), [])):
        learner = module(net())
        run(learner, *callbacks, batches=batches)
        ends.append(learner.net.state_dict())
    assert differing(*ends) == []
    assert "step 2 left out: gradients of step 2 hold NaN or infinity" in caplog.text
    assert UNKNOWN in caplog.text


class SickProcess(LossTerm):
    """A constant that is NaN in one process, in its second step: gradients are fine everywhere."""

    def __init__(self):
        super().__init__()
        self.steps = 0

    def forward(self, step):
        self.steps += 1
        return torch.tensor(torch.nan if dist.get_rank() == 1 and self.steps == 2 else 0.0)


class Report(Callback):
    """Writes the weights of every process behind each step, and what the process was told."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_start(self, trainer, pl_module):
        logging.getLogger("qat.callbacks").addHandler(logging.FileHandler(self.folder / f"{trainer.global_rank}.log"))

    def on_train_batch_end(self, trainer, pl_module, *_):
        torch.save(pl_module.net.state_dict(), self.folder / f"{trainer.global_rank}-{trainer.global_step}.pt")


def test_processes_leave_the_same_steps_out(tmp_path, monkeypatch):
    monkeypatch.setattr(finite, "_is_free", lambda tensor: False)
    learner = module(net(), terms={"sick": SickProcess()})
    fit(learner, FaultGuard("skip"), Report(tmp_path), strategy="ddp_fork", devices=2, max_epochs=2, limit_train_batches=2)
    after = {(r, s): torch.load(tmp_path / f"{r}-{s}.pt", weights_only=True) for r in (0, 1) for s in (1, 2, 3)}
    for step in (1, 2, 3):
        assert differing(after[0, step], after[1, step]) == []
    assert differing(after[0, 1], after[0, 2]) == []
    assert differing(after[0, 2], after[0, 3]) != []
    said = [(tmp_path / f"{rank}.log").read_text() for rank in (0, 1)]
    assert said[0] == f"step 1 left out: the loss of step 1 is not finite in another process; first not finite: {UNKNOWN}\n"
    assert said[1] == f"step 1 left out: the loss of step 1 is nan; first not finite: {UNKNOWN}\n"


# --- step sizes


SITE = "blocks.1.mlp.fc2.input_quantizer"


def step_size(net, name=SITE):
    return next(p for n, p in sites(net)[name].quantizer.named_parameters() if n.endswith("scale"))


class Set(Callback):
    """Puts a value into step sizes once, behind the update that makes the step count 3."""

    def __init__(self, value, entry=slice(None)):
        self.value, self.entry = value, entry

    def on_train_batch_start(self, trainer, pl_module, *_):
        if trainer.global_step == 2:
            self.handle = trainer.optimizers[0].register_step_post_hook(lambda *_: self.change(pl_module))

    def change(self, pl_module):
        self.handle.remove()
        with torch.no_grad():
            step_size(pl_module.net)[self.entry] = self.value


@pytest.mark.parametrize(
    ("value", "step", "settings"),
    [
        *((value, 2, {}) for value in (1e9, -1e9, torch.nan, torch.inf)),
        *((value, 3, {"dead_steps": 1, "dead_scales": "fault"}) for value in (-1e-3, -1.0)),
    ],
)
def test_step_sizes_that_are_none_are_named(value, step, settings):
    start = net("lsq")
    with pytest.raises(qat.UsageError) as error:
        run(module(start, lr=1e-9), FaultGuard(**settings), Set(value), batches=data())
    began = step_size(start)
    where = f"behind step {step} the step size of {SITE} is {value:g} (entry 0 of {len(began)}), it began at {began[0].item():g}"
    assert str(error.value).startswith(f"training stopped: {where}; checkpoints are from before")


@pytest.mark.parametrize("value", [-1e-3, -1.0])
def test_of_dead_step_sizes_a_run_warns_once(value, caplog):
    run(module(net("lsq"), lr=1e-9), FaultGuard(dead_steps=1), Set(value), batches=data())
    lines = [record.message for record in caplog.records if "step size" in record.message]
    assert len(lines) == 1
    assert lines[0].startswith(f"behind step 3 the step size of {SITE} is {value:g} (entry 0 of ")
    assert "no longer a step for 1 steps; a lower optimizer.lr, or a start from trained weights, may help" in lines[0]


def test_elsewhere_they_are_seen_at_the_next_look(monkeypatch):
    monkeypatch.setattr(finite, "_is_free", lambda tensor: False)
    with pytest.raises(qat.UsageError, match=rf"behind step 4 the step size of {SITE} is 1.*e\+09 \(entry 0"):
        run(module(net("lsq"), lr=1e-4), FaultGuard(every_n_steps=4), Set(1e9), batches=data())


def test_a_step_that_kills_a_step_size_is_left_out(place, caplog):
    ends = []
    for batches, callbacks in ((data(), [FaultGuard("skip"), Set(-1e9)]), (without(data(), (2,)), [])):
        learner = module(net("lsq"))
        run(learner, *callbacks, batches=batches)
        ends.append(learner.net.state_dict())
    assert differing(*ends) == []
    assert f"step 2 left out: behind step 2 the step size of {SITE} is -1e+09 (entry 0 of" in caplog.text


def test_one_of_many_may_be_at_zero_for_a_while():
    # An optimizer brings it back; from `dead_steps` on it is taken for lost.
    run(module(net("lsq"), lr=1e-9), FaultGuard(), Set(0.0, entry=3), batches=data())
    with pytest.raises(qat.UsageError, match=rf"behind step 4 the step size of {SITE} is 0 \(entry 3 of"):
        run(module(net("lsq"), lr=1e-9), FaultGuard(dead_steps=2, dead_scales="fault"), Set(0.0, entry=3), batches=data())


def test_one_that_begins_at_zero_is_let_be():
    start = net("lsq")
    with torch.no_grad():
        step_size(start)[3] = 0.0
    run(module(start, lr=1e-9), FaultGuard(dead_steps=1), batches=data())
    with pytest.raises(qat.UsageError, match=rf"the step size of {SITE} is 1e\+09 \(entry 3 of .*, it began at 0;"):
        run(module(start, lr=1e-9), FaultGuard(), Set(1e9, entry=3), batches=data())


# --- half precision


def overflowing(name, bfloat16=True):
    """A net with a layer whose output leaves the range of bfloat16 (that of float32), or of float16."""
    start = net("lsq") if name == "quantized" else vit()
    with torch.no_grad():
        start.blocks[0].mlp.fc1.bias.fill_(3.4e38 if bfloat16 else 1e6)
        start.blocks[0].mlp.fc1.weight.mul_(1e38 if bfloat16 else 1.0)
    return start


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_an_overflow_in_bfloat16_is_named(precision):
    with pytest.raises(qat.UsageError) as error:
        run(module(overflowing("float")), FaultGuard(), batches=data(), precision=precision)
    assert "step 0" in str(error.value)
    assert "first not finite: the output of blocks.0.mlp.fc1 (Linear); no step was taken" in str(error.value)


def test_an_overflow_that_a_quantizer_hides_is_named():
    learner = module(net("lsq"), lr=1e-9)
    act = learner.net.blocks[0].mlp.act
    act.register_forward_hook(lambda module, args, output: torch.where(output > output.mean(), torch.inf, output.detach()).detach())
    run(copy.deepcopy(learner), FaultGuard(every_n_steps=2), batches=data())  # neither loss nor gradients show it
    with pytest.raises(qat.UsageError, match=r"step 0 overflows; first not finite: the output of blocks\.0\.mlp\.act \(GELU\)"):
        run(learner, FaultGuard(every_n_steps=2), batches=data(), precision="bf16-mixed")


def test_what_a_gradient_scaler_skips_is_counted_and_no_fault(place):
    logged = []

    class Look(Callback):
        def on_train_batch_end(self, trainer, *_):
            logged.append(trainer.logged_metrics.get("faults/skipped_by_scaler"))

    def scaled(scale, *callbacks, **settings):
        scaler = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))
        run(module(vit()), FaultGuard(**settings), *callbacks, batches=data(), plugins=[scaler])

    scaled(2.0**20, Look(), policy="skip")
    assert int(logged[-1]) in range(1, 6)
    line = r"gradients of step 3 overflow in precision 16-mixed, whatever their scale; 4 steps in a row were skipped by the gradient scaler"
    with pytest.raises(qat.UsageError, match=line):
        scaled(2.0**60, policy="skip", max_in_a_row=4)


# --- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"policy": "go on"}, r"policy='go on': allowed are stop, skip, rollback"),
        ({"max_in_a_row": 0}, r"max_in_a_row=0: allowed are whole numbers from 1"),
        ({"max_rollbacks": 1.5}, r"max_rollbacks=1\.5: allowed are whole numbers from 1"),
        ({"max_scale_change": 1}, r"max_scale_change=1: allowed are numbers above 1"),
        ({"dead_steps": 0}, r"dead_steps=0: allowed are whole numbers from 1"),
        ({"dead_scales": "stop"}, r"dead_scales='stop': allowed are warn, fault"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(qat.UsageError, match=rf"^callbacks\.finite\.{message}$"):
        FaultGuard(**settings)


def test_a_rollback_needs_a_checkpoint_to_go_back_to():
    with pytest.raises(qat.UsageError, match=r"policy='rollback': nothing to go back to without callbacks\.last; allowed are stop, skip"):
        run(module(net()), FaultGuard("rollback"), batches=data())
    with pytest.raises(qat.UsageError, match=r"policy='rollback': processes of this trainer\.strategy end with a fault; allowed is ddp"):
        finite._writer(Trainer(accelerator="cpu", devices=2, strategy="ddp_fork", logger=False, enable_checkpointing=False))
