"""Compilation. Oracle: eager execution.

A value on a rounding threshold may fall to either side in another kernel, and a flipped code moves all logits of its image. So
images are counted, not logits compared; a net with one bit more shows that the count notices a wrong quantizer.
"""

import copy
import functools
import types

import pytest
import torch
import torch._dynamo as dynamo
from lightning.pytorch import Callback, Trainer
from torch._functorch import config as functorch
from torch._inductor import config as inductor
from torch._inductor.graph import GraphLowering
from torch._inductor.utils import fresh_cache
from torch.compiler import config as compiler
from torch.testing import assert_close

import qat.lit.compiled
from qat import kernels
from qat.functional.log2 import fake_quantize_log2
from qat.lit import QATModule, Teacher, build_optimizer
from qat.lit.compiled import CompiledCall, compile_in_place, register_decompositions, source_hash
from qat.losses import CompositeLoss, Distillation
from qat.quantizers import StatsQ
from qat.spec import QuantSpec
from tests.callbacks.fitting import QUIET, batches
from tests.nets import ATTENTIONS
from tests.tiny import DISTILLED, images, kept_bytes, logits, quantized, vit


@pytest.fixture(autouse=True)
def fresh_compiler():
    dynamo.reset()
    dynamo.utils.counters.clear()
    yield
    dynamo.reset()


def step(net, x):
    """Logits and gradients of one training step."""
    net.zero_grad()
    out = net(x)
    out.square().mean().backward()
    return out.detach(), torch.cat([p.grad.flatten() for p in net.parameters()])


def share_of_changed_images(a, b):
    return ((a - b).abs().amax(1) > 1e-4).float().mean()


def of_family(name, bits):
    """Without paths that drop out by chance, and as shallow as it can be with a shifted window."""
    family = ATTENTIONS[name]
    depth = {"depths": (2, 1)} if name.startswith("swin") else {"depth": 1}
    net = family.build(drop_path_rate=0.0, **depth)
    qat.convert(
        net, qat.recipe("ofq", bits=bits, attention=family.attention), input_size=family.input_size
    )
    return qat.initialize_scales(net, [family.images(8, seed=1)]), family.images(64)


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "backend"),
    [
        *(
            (name, "aot_eager")
            for name in ("ofq", "ofq_noqkr", "swin", "eva02", "swinv2", "dinov3", "beit", "siglip")
        ),
        *(
            (name, "inductor") for name in ("ofq", "ofq_noqkr")
        ),  # a minute for each of the others, whose graphs are traced above
    ],
)
def test_compiled_forward_and_backward(name, backend):
    (net, x), (other, _) = (
        of_family(name, b) if name in ATTENTIONS else (quantized(name, bits=b), images(64))
        for b in (2, 3)
    )
    register_decompositions()
    out, gradient = step(net.train(), x)
    compiled_out, compiled_gradient = step(torch.compile(net, fullgraph=True, backend=backend), x)
    assert dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not dynamo.utils.counters["graph_break"]
    assert share_of_changed_images(out, compiled_out) <= (0.1 if name in ATTENTIONS else 0.05)
    assert share_of_changed_images(out, logits(other, x)) == 1
    assert torch.cosine_similarity(gradient, compiled_gradient, dim=0) > (
        0.99 if name in ATTENTIONS else 0.999
    )
    assert torch.cosine_similarity(gradient, step(other.train(), x)[1], dim=0) < 0.99


class Quantizers(torch.nn.Module):
    """All quantizers of a net's first block and what each saw, some of it moved halfway between codes; weights see themselves."""

    def __init__(self, preset):
        super().__init__()
        net, seen = quantized(preset, bits=2), {}
        first = [site for site in qat.iter_quantizers(net) if site.name.startswith("blocks.0.")]
        for site in first:
            site.quantizer.register_forward_pre_hook(
                lambda _, given, name=site.name: seen.setdefault(name, given[0].detach().clone())
            )
        net(images(4))
        self.all = torch.nn.ModuleList(site.quantizer for site in first)
        self.given = [seen[site.name] for site in first]
        for quantizer, x in zip(self.all, self.given, strict=True):
            quantizer._forward_pre_hooks.clear()
            codes = quantizer(x)
            halfway = (codes + codes.flatten().roll(1).view(x.shape)) / 2
            x[..., ::2] = halfway[..., ::2]

    def forward(self, given):
        return [quantizer(x) for quantizer, x in zip(self.all, given, strict=True)]


@pytest.mark.long
@pytest.mark.parametrize("preset", ["ofq", "seq"])
def test_a_compiled_quantizer_gives_the_bits_of_an_eager_one(preset):
    made = Quantizers(preset)
    register_decompositions()
    with inductor.patch(qat.lit.compiled.compile_options()), torch.no_grad():
        expected, found = made(made.given), torch.compile(made, fullgraph=True)(made.given)
    assert len(found) > 6
    for quantizer, ours, theirs in zip(made.all, found, expected, strict=True):
        if isinstance(
            quantizer, StatsQ
        ):  # its scale is a mean, whose sum may be taken in another order; the codes are the same
            assert_close(ours, theirs, rtol=1e-6, atol=0)
        else:
            assert torch.equal(ours, theirs), quantizer


def test_a_hash_is_that_of_all_files_of_a_package(tmp_path):
    package, found = types.ModuleType("package"), set()
    package.__path__ = [str(tmp_path)]
    (tmp_path / "inner").mkdir()
    for path, text in (("a.py", "x = 1"), ("a.py", "x = 2"), ("inner/b.py", "x = 3")):
        (tmp_path / path).write_text(text)
        found.add(source_hash(package))
    assert len(found) == 3
    register_decompositions()
    assert compiler.cache_key_tag.endswith(source_hash(qat.functional, kernels))


@pytest.mark.long
def test_a_graph_of_other_formulas_is_not_taken_from_a_cache():
    net, x, found = (
        StatsQ(QuantSpec("weight", "statsq", 2, signed=True, axis=0)),
        torch.ones(2, 3),
        [],
    )
    with fresh_cache():
        for tag in ("one", "one", "other"):
            dynamo.reset()
            dynamo.utils.counters.clear()
            with compiler.patch(cache_key_tag=tag), torch.no_grad():
                CompiledCall(net, net)(x)
            counts = dynamo.utils.counters
            found.append(
                counts["aot_autograd"]["autograd_cache_hit"]
                + counts["inductor"]["fxgraph_cache_hit"]
            )
    assert [hits > 0 for hits in found] == [False, True, False]


@pytest.mark.slow
def test_forward_and_backward_round_as_eager_code_does_and_lose_no_gradient(monkeypatch):
    # Before torch 2.15 a mix-order reduction may not write a gradient.
    mixes_orders = torch.__version__ >= "2.15"
    made, begin = [], GraphLowering.__init__

    def seen(self, *args, **kwargs):
        options = (inductor.emulate_precision_casts, inductor.triton.mix_order_reduction)
        made.append((kwargs["is_backward"], *options))
        begin(self, *args, **kwargs)

    monkeypatch.setattr(GraphLowering, "__init__", seen)
    net = torch.nn.Linear(3, 3)
    with inductor.patch(fx_graph_cache=False):
        CompiledCall(net, net)(torch.ones(2, 3)).sum().backward()
    assert made == [(False, True, mixes_orders), (True, True, mixes_orders)]
    assert inductor.triton.mix_order_reduction  # for the user's own graphs


def test_gradients_pass_a_compiled_quantizer():
    # In torch 2.11 none does behind a conversion to the dtype that is there already.
    compiled = torch.compile(fake_quantize_log2, fullgraph=True, backend="aot_eager")
    grads = []
    for quantize in (fake_quantize_log2, compiled):
        x = torch.linspace(0.01, 1, 9, requires_grad=True)
        quantize(x, 4).square().sum().backward()
        grads.append(x.grad)
    assert grads[0].any()
    assert_close(*grads)


@pytest.fixture
def backend(monkeypatch):
    """Choose what `torch.compile` hands graphs to; inductor takes too long."""
    real = torch.compile
    return lambda name: monkeypatch.setattr(torch, "compile", functools.partial(real, backend=name))


def graphs():
    return dynamo.utils.counters["stats"]["unique_graphs"], sum(
        dynamo.utils.counters["graph_break"].values()
    )


class NoMoreGraphs(Callback):
    """From the second epoch on, compiling is an error."""

    def on_train_epoch_start(self, trainer, pl_module):
        dynamo.config.error_on_recompile = trainer.current_epoch > 0

    def teardown(self, trainer, pl_module, stage):
        dynamo.config.error_on_recompile = False


class Sizes(Callback):
    def __init__(self):
        self.train, self.val = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.train.append(len(batch[0]))

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, *_):
        self.val.append(len(batch[0]))


@pytest.mark.long
def test_a_short_batch_and_a_validation_compile_nothing_again(backend):
    """Two epochs with a validation each; both data sets end with a short batch."""
    backend("aot_eager")
    net, teacher = quantized(name=DISTILLED), Teacher(vit(DISTILLED))
    learner = QATModule(
        net,
        CompositeLoss({"kd": Distillation()}),
        num_classes=10,
        optimizer=lambda n: build_optimizer(n, lr=0.01, weight_decay=0.1),
        teacher=teacher,
    )
    names = list(learner.state_dict())
    compile_in_place(net.train())
    teacher.compile()
    sizes = Sizes()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=2,
        callbacks=[sizes, NoMoreGraphs()],
        num_sanity_val_steps=0,
        **QUIET,
    )
    trainer.fit(learner, batches(6, 16), batches(6, 14))
    assert list(learner.state_dict()) == names
    assert (sizes.train, sizes.val) == ([6, 6, 4] * 2, [6, 6, 2] * 2)
    assert trainer.callback_metrics["train/loss"].isfinite()
    assert graphs() == (3, 0)  # the student in training, the student in evaluation, the teacher


def test_the_largest_batch_has_the_graph(backend):
    backend("eager")
    net = vit(depth=1)
    expected = {n: logits(net, images(n)) for n in (3, 8, 5, 9)}
    compile_in_place(net)
    found, seen = {}, []
    for n in expected:
        found[n] = logits(net, images(n))
        seen.append(graphs()[0])
    assert seen == [1, 2, 2, 3]
    for n, value in expected.items():
        assert_close(found[n], value)
    with torch.compiler.set_stance("force_eager"):
        net(
            images(64)
        )  # somebody looks at the net eagerly: no reason to run smaller batches so from now on
    dynamo.config.error_on_recompile = True
    try:
        logits(net, images(9))
        assert copy.deepcopy(net)._compiled_call_impl is None
    finally:
        dynamo.config.error_on_recompile = False


@pytest.mark.sample(1)
@pytest.mark.parametrize("head", ["cls", "mean"])
def test_a_compiled_teacher_says_the_same(backend, head):
    backend("eager")
    teacher = Teacher(vit(DISTILLED, depth=1), head)
    expected, few, names = teacher(images()), teacher(images(3)), list(teacher.net.state_dict())
    teacher.compile()
    assert_close(teacher(images()), expected)
    assert_close(teacher(images(3)), few)
    assert graphs() == (1, 0)
    assert list(teacher.net.state_dict()) == names


@pytest.mark.long
def test_recomputation_keeps_less(backend):
    found = {}
    for recompute in (False, True):
        dynamo.reset()
        backend("aot_eager_decomp_partition")
        net = vit(depth=1).train()
        compile_in_place(net, recompute=recompute)
        net(images())
        found[recompute], _ = kept_bytes(lambda net=net: net(images()), net.parameters())
    assert found[True] < 0.7 * found[False]
    assert not functorch.aggressive_recomputation
