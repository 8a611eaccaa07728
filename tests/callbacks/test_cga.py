"""Annealing in real trainers. Oracles: `near_threshold` on the weights before a step, runs without annealing, gradients by hand."""

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch.testing import assert_close

import qat
from qat import functional as F
from qat.callbacks import CGA, IterativeFreezing
from qat.callbacks.cga import BandGate
from qat.lit import cosine_schedule
from tests.callbacks.fitting import Steps, batches, differing, fit, module, moved, net, weights
from tests.conftest import contents, tiny, train
from tests.errors import usage_error
from tests.processes import in_processes
from tests.tasks.test_resume import assert_same_run, killed_at, last, metrics, run
from tests.tiny import sites

MASKED = ("attn.proj", "mlp.fc1", "mlp.fc2")
RANGE = 0.05


def annealing(**settings):
    """From the first epoch on, with a wide band, in steps that leave it filled."""
    return CGA(**{"boundary_range": RANGE, "start_epoch": 0, "lr": 1e-3, **settings})


def masked(preset):
    own = "attn.v" if preset == "ofq" else "attn.qkv"
    return [f"blocks.{i}.{layer}.weight" for i in (0, 1) for layer in (*MASKED, own)]


def near(weight):
    return F.near_threshold(weight, 2, RANGE)


of_both_attentions = pytest.mark.parametrize("preset", ["ofq", "ofq_noqkr"])


@pytest.mark.sample(1)
@of_both_attentions
def test_only_what_is_near_a_threshold_moves(preset):
    steps = Steps()
    fit(module(net(preset)), annealing(), steps)
    assert len(steps.after) == 8
    shares = []
    for t in range(8):
        for name in masked(preset):
            allowed = near(steps.before[t][name])
            changed = moved(steps, t, name)
            assert not (changed & ~allowed).any()
            assert not steps.gradients[t][name][~allowed].any()
            shares.append((changed.sum() / allowed.sum()).item())
    assert sum(shares) / len(shares) > 0.9
    masks = [near(steps.before[t]["blocks.0.mlp.fc1.weight"]) for t in range(8)]
    assert not torch.equal(masks[0], masks[-1]), "the band is looked at anew in every step"


@pytest.mark.sample(1)
@of_both_attentions
def test_everything_else_trains_as_before(preset):
    # Until the first frozen weight matters, after one step, a run without annealing is the oracle.
    plain, annealed = Steps(), Steps()
    start = net(preset)
    fit(module(start), plain, max_epochs=1, limit_train_batches=1)
    fit(module(start), annealing(lr=0.01), annealed, max_epochs=1, limit_train_batches=1)
    for name, expected in plain.after[0].items():
        found = annealed.after[0][name]
        if name in masked(preset):
            allowed = near(plain.before[0][name])
            expected = torch.where(allowed, expected, plain.before[0][name])
        assert torch.equal(found, expected), name
    heads = (
        "head.weight",
        "patch_embed.proj.weight",
        "head.bias",
        "blocks.0.mlp.fc1.bias",
        "blocks.0.norm1.weight",
        "pos_embed",
    )
    assert all(moved(annealed, 0, name).any() for name in heads)


def test_reference_leaves_queries_and_keys_free():
    steps = Steps()
    fit(module(net()), annealing(qk="reference"), steps)
    for name in ("blocks.0.attn.q_weight", "blocks.1.attn.k_weight"):
        # A frozen entry stays and has no gradient; one that is free may stay where its momentum passes through zero.
        assert all(
            (moved(steps, t, name) | (steps.gradients[t][name] != 0)).all() for t in range(8)
        )


def test_freeze_holds_queries_and_keys():
    steps = Steps()
    fit(module(net()), annealing(qk="freeze"), steps)
    for name in (f"blocks.{i}.attn.{w}_weight" for i in (0, 1) for w in "qk"):
        assert torch.equal(steps.after[-1][name], steps.before[0][name])
        assert not steps.gradients[0][name].any()


def test_deviates_from_reference_queries_and_keys_can_anneal():
    # There the gate of queries and keys gates nothing.
    # dWq_h = Wk_h G_h^T and dWk_h = Wq_h G_h (spec section 4) with G masked by the band of M; G from a run that gates nothing.
    start = net()
    attention = sites(start)["blocks.0.attn.qk_quantizer"].owner
    wq, wk, heads = attention.q_weight.detach(), attention.k_weight.detach(), attention.num_heads
    matrix = F.fold_qk(wq, wk, heads)
    caught = []
    learner = module(start)

    class Catch(Callback):
        def on_fit_start(self, trainer, pl_module):
            site = sites(pl_module.net)["blocks.0.attn.qk_quantizer"]
            site.quantizer.register_full_backward_hook(
                lambda m, grad_in, grad_out: caught.append(grad_out[0])
            )

    fit(learner, Catch(), max_epochs=1, limit_train_batches=1)
    gated, steps = module(start), Steps()
    fit(gated, annealing(qk="product"), steps, max_epochs=1, limit_train_batches=1)
    g = torch.where(near(matrix), caught[0], 0.0).unflatten(0, (heads, -1))
    q, k = wq.unflatten(0, (heads, -1)), wk.unflatten(0, (heads, -1))
    assert_close(
        steps.gradients[0]["blocks.0.attn.q_weight"],
        (k @ g.transpose(1, 2)).flatten(0, 1),
        rtol=1e-4,
        atol=1e-7,
    )
    assert_close(
        steps.gradients[0]["blocks.0.attn.k_weight"], (q @ g).flatten(0, 1), rtol=1e-4, atol=1e-7
    )
    assert moved(steps, 0, "blocks.0.attn.q_weight").all()


def test_the_gate_closes_in_a_compiled_net_too():
    # A graph compiled before annealing knows of the gate: it is compiled anew when the gate closes.
    quantizer = sites(net())["blocks.0.attn.qk_quantizer"].quantizer
    gate = BandGate(RANGE)
    quantizer.register_forward_pre_hook(gate)
    matrix = torch.randn(40, 20, generator=torch.Generator().manual_seed(0), requires_grad=True)
    compiled = torch.compile(quantizer, fullgraph=True, backend="eager")
    for gate.active in (False, True, False):
        matrix.grad = None
        out = compiled(matrix)
        out.sum().backward()
        expected = near(matrix).float() if gate.active else torch.ones_like(matrix)
        assert torch.equal(matrix.grad, expected)
        assert torch.equal(out, F.statsq(matrix, 2))


@pytest.mark.sample(1)
@pytest.mark.parametrize(("interval", "first", "epochs"), [("step", 1, None), ("epoch", 1, 2)])
def test_the_rate_is_its_own(interval, first, epochs):
    def schedule(optimizer, epochs, steps):
        return cosine_schedule(
            optimizer, periods=epochs if interval == "epoch" else epochs * steps, interval=interval
        ), interval

    def optimizer(net):
        return qat.lit.build_optimizer(net, lr=0.01, weight_decay=0.0, scale_lr_factor=0.5)

    plain, annealed = Steps(), Steps()
    fit(module(net(), optimizer=optimizer, scheduler=schedule), plain, max_epochs=4)
    fit(
        module(net(), optimizer=optimizer, scheduler=schedule),
        CGA(start_epoch=first, epochs=epochs, lr=3e-5),
        annealed,
        max_epochs=4,
    )
    stop = 4 if epochs is None else first + epochs
    for t, (found, expected) in enumerate(zip(annealed.rates, plain.rates, strict=True)):
        inside = first <= t // 4 < stop
        assert found == pytest.approx([3e-5, 3e-5, 1.5e-5] if inside else expected), t


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("settings", "epochs"),
    [
        ({}, [9]),
        ({"epochs": 3}, [7, 8, 9]),
        ({"start_epoch": 2, "epochs": 2}, [2, 3]),
        ({"start_epoch": 8, "epochs": 30}, [8, 9]),
        ({"start_epoch": 0}, list(range(10))),
    ],
)
def test_which_epochs(settings, epochs):
    steps = Steps()
    fit(
        module(net()),
        annealing(**{"start_epoch": None, **settings}),
        steps,
        data=batches(16),
        max_epochs=10,
    )
    frozen = [
        t for t in range(10) if moved(steps, t, "blocks.0.mlp.fc1.weight").float().mean() < 0.5
    ]
    assert frozen == epochs


@pytest.mark.parametrize(
    ("start", "callbacks", "message"),
    [
        (
            "ofq",
            [CGA(start_epoch=2)],
            r"callbacks\.cga\.start_epoch=2: must be an integer from 0 to 1, because trainer\.max_epochs=2",
        ),
        (
            "ofq",
            [CGA(epochs=3)],
            r"callbacks\.cga\.epochs=3: must be an integer from 1 to trainer\.max_epochs=2",
        ),
        ("lsq", [CGA()], r"callbacks\.cga: this model has no weights on a half-step grid"),
        (
            "ofq",
            [IterativeFreezing(), CGA()],
            r"callbacks\.cga: callbacks\.freeze freezes the same weights",
        ),
    ],
)
def test_deviates_from_reference_annealing_says_when_there_is_nothing_to_do(
    start, callbacks, message
):
    # There a net without such weights is trained without masks.
    learner = module(net(start))
    with usage_error(message):
        fit(learner, *callbacks)


def test_refuses_a_run_whose_steps_end_before_annealing(tmp_path, refused):
    run_dir = train(tmp_path / "run", "quant=ofq_2bit")
    before = contents(run_dir)
    given = ("quant=ofq_2bit", "callbacks=[default,cga]", "trainer.max_epochs=3", "overwrite=true")
    line = refused(tiny(run_dir, *given, "trainer.max_steps=4"))
    assert "trainer.max_steps=4: must be above 4, the first step of annealing" in line
    assert contents(run_dir) == before
    train(run_dir, *given, "trainer.max_steps=5")


def hooks(trainer, learner):
    gates = sum(len(s.quantizer._forward_pre_hooks) for s in sites(learner.net).values())
    return len(trainer.optimizers[0]._optimizer_step_post_hooks), gates


def test_hooks_are_gone_afterwards():
    seen = []

    class Look(Callback):
        def on_train_batch_start(self, trainer, pl_module, *_):
            seen.append(hooks(trainer, pl_module))

    learner = module(net())
    trainer = fit(learner, CGA(qk="product", start_epoch=0), Look(), max_epochs=1)
    assert hooks(trainer, learner) == (0, 0)
    assert seen[0] == (1, 2)


def test_hooks_are_gone_after_an_exception():
    class Fail(Callback):
        def on_train_batch_end(self, *_):
            raise ValueError

    learner = module(net())
    with pytest.raises(ValueError, match="^$"):
        fit(learner, CGA(qk="product", start_epoch=0), Fail())
    assert sum(len(s.quantizer._forward_pre_hooks) for s in sites(learner.net).values()) == 0


SETTINGS = (
    "callbacks=[default,ema,cga,oscillation]",
    "callbacks.cga.start_epoch=1",
    "callbacks.cga.boundary_range=0.1",
    "callbacks.cga.qk=product",
    "trainer.log_every_n_steps=1",
)


@pytest.fixture(scope="module")
def annealed(tmp_path_factory):
    """A run that anneals in the second of its two epochs."""
    return run(tmp_path_factory.mktemp("annealed") / "run", *SETTINGS)


# Before annealing, so that the resumed run begins it; in the middle of an epoch of it.
@pytest.mark.long
@pytest.mark.parametrize("step", [7, 14])
def test_resumed_equals_uninterrupted(step, tmp_path, annealed):
    run_dir = killed_at(step, tmp_path / "run", *SETTINGS)
    run(run_dir, "resume=true", *SETTINGS)
    assert_same_run(run_dir, annealed)
    assert metrics(run_dir) == metrics(annealed)
    assert any("cga/trainable" in row for row in metrics(annealed))
    tracked, expected = (last(folder)["callbacks"]["Oscillation"] for folder in (run_dir, annealed))
    for name, state in expected["weights"].items():
        assert differing(tracked["weights"][name], state) == []
    tables = [(folder / "oscillation.csv").read_text() for folder in (run_dir, annealed)]
    assert tables[0] == tables[1]


def test_averages_see_held_weights():
    # With decay 0 the average is the weights at the moment of its update.
    steps, average = Steps(), EMAWeightAveraging(decay=0.0, use_buffers=False)
    copies = []

    class Copy(Callback):
        def on_train_batch_end(self, *_):
            copies.append(weights(average._average_model.module.net))

    fit(module(net()), average, annealing(), steps, Copy())
    for t in range(8):
        assert differing(copies[t], steps.after[t]) == []
        for name in masked("ofq"):
            frozen = ~near(steps.before[t][name])
            assert torch.equal(copies[t][name][frozen], steps.before[t][name][frozen])


def anneal_in_a_process(folder):
    learner = module(net())
    settings = {"strategy": "ddp", "devices": 2, "max_epochs": 1, "limit_train_batches": 1}
    fit(learner, annealing(qk="product"), **settings)
    torch.save(learner.net.state_dict(), folder / f"{dist.get_rank()}.pt")


@pytest.mark.long
def test_two_processes_agree(tmp_path):
    start = net().state_dict()
    assert in_processes(2, anneal_in_a_process, tmp_path) == ["", ""]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert differing(first, second) == []
    for name in masked("ofq"):
        changed = first[name] != start[name]
        assert changed.any()
        assert not (changed & ~near(start[name])).any()
