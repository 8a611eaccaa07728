"""The search over bits as a whole. Oracle: all assignments of a small net, evaluated by plain forwards; the run that was not killed."""

import csv
import itertools
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import qat
from qat.errors import UsageError
from qat.functional.allocation import average_bits
from qat.model.cost import size_bytes
from qat.model.scales import initialize_scales
from qat.ptq.bits_settings import BitsSettings
from qat.ptq.fitness import Evaluator, plain_fitness
from qat.ptq.search import search
from qat.ptq.search_settings import SearchSettings
from qat.ptq.state import SearchFiles
from qat.ptq.widths import set_bits
from tests import tiny
from tests.ptq.bit_nets import LAYERS, bits_of, calibrated, same, searched, settings, with_overrides
from tests.ptq.searching import batches, quantized, state

FEW = ("blocks.0.attn.qkv", "blocks.0.mlp.fc2", "blocks.1.attn.proj", "blocks.1.mlp.fc1")


def small(**knobs):
    """Few layers and widths, where their number does not matter."""
    return settings(**({"targets": FEW, "choices": (2, 3, 6)} | knobs))


class Killed(BaseException):
    pass


def lines(folder):
    with (folder / "search.csv").open() as file:
        return [{k: v for k, v in line.items() if k != "seconds"} for line in csv.DictReader(file)]


def points(folder):
    """Size and fitness of every line."""
    return [(int(line["size_bytes"]), float(line["fitness"])) for line in lines(folder)]


@pytest.mark.parametrize("budget", [{"average_bits": 2.5}, {"average_bits": 3}, {"budget_mb": 0.0215}])
def test_the_best_within_the_budget_and_a_true_front(budget, tmp_path):
    net, targets = calibrated()
    found = searched(net, targets, settings(**budget), run_dir=tmp_path)
    known = points(tmp_path)
    within = [fitness for size, fitness in known if size <= found.budget_bytes]
    assert (found.best.fitness, found.best.size_bytes) == (min(within), size_bytes(net))
    assert found.best.size_bytes <= found.budget_bytes
    if "budget_mb" in budget:
        assert found.budget_bytes == 21500
    else:
        assert average_bits(found.numels, found.best.bits) <= budget["average_bits"]
    better = [
        [size <= p.size_bytes and fitness <= p.fitness and (size, fitness) != (p.size_bytes, p.fitness) for size, fitness in known]
        for p in found.front
    ]
    assert not any(itertools.chain.from_iterable(better))
    assert all(any(p.size_bytes <= size and p.fitness <= fitness for p in found.front) for size, fitness in known)
    assert len(found.front) > 3
    assert found.best in found.front


def test_no_assignment_is_evaluated_twice(tmp_path, monkeypatch):
    net, targets = calibrated()
    calls, original = [], Evaluator.fitness
    monkeypatch.setattr(Evaluator, "fitness", lambda *args, **kwargs: (calls.append(1), original(*args, **kwargs))[1])
    found = searched(net, targets, small(generations=4), run_dir=tmp_path)
    bits = [line["bits"] for line in lines(tmp_path)]
    assert len(bits) == len(set(bits)) == len(calls) == found.evaluations == len(found.points)
    assert {line["generation"] for line in lines(tmp_path)} == {"uniform", "sensitivity", "greedy", *map(str, range(4))}


def test_a_front_line_says_so(tmp_path):
    net, targets = calibrated()
    searched(net, targets, small(), run_dir=tmp_path)
    seen = []
    for line, point in zip(lines(tmp_path), points(tmp_path), strict=True):
        beaten = any(size <= point[0] and fitness <= point[1] for size, fitness in seen)
        assert line["accepted"] == str(int(not beaten))
        seen.append(point)


def test_the_net_afterwards_is_one_calibrated_with_these_bits(tmp_path):
    net, targets = calibrated(weight_observer="omse", bias_correction=True)
    modes = [m.training for m in net.modules()]
    found = searched(net, targets, settings(average_bits=3.5, fitness="mse"))
    assert bits_of(net) == found.to_dict()["bits"] == dict(zip(found.layers, found.best.bits, strict=True))
    assert len(set(found.best.bits)) > 1
    recipe = net.qat_conversion.recipe
    twin = with_overrides(recipe.overrides, weight_observer="omse", bias_correction=True)
    assert same(state(net), twin.state_dict())
    assert plain_fitness(net, batches(), targets, settings(fitness="mse").engine()) == found.best.fitness
    qat.save(net, tmp_path / "net.ckpt")
    again = qat.load(tmp_path / "net.ckpt")
    assert tiny.logits(again).equal(tiny.logits(net))
    assert (bits_of(again), size_bytes(again)) == (bits_of(net), found.best.size_bytes)
    assert [m.training for m in net.modules()] == modes
    assert not any("forward" in module.__dict__ for module in net.modules())


@pytest.mark.parametrize(
    ("fitness", "average"),
    [("infonce", 3), ("mse", 3.5), *(pytest.param(*case, marks=pytest.mark.long) for case in (("kl", 2.5), ("cosine", 3)))],
)
def test_it_finds_the_optimum_of_all_assignments(fitness, average):
    """4 layers and 3 widths: 81 assignments. The search looks at fewer."""
    chosen = settings(targets=FEW, choices=(2, 3, 6), average_bits=average, fitness=fitness, generations=16)
    net, targets = calibrated()
    found = searched(net, targets, chosen)
    (twin, _), every = calibrated(), {}
    for bits in itertools.product(chosen.choices, repeat=4):
        set_bits(twin, dict(zip(FEW, bits, strict=True)))
        if (size := size_bytes(twin)) <= found.budget_bytes:
            every[bits] = (plain_fitness(twin, batches(), targets, chosen.engine()), size)
    assert (found.best.fitness, found.best.size_bytes) == min(every.values())
    assert every[found.best.bits] == min(every.values())
    assert found.evaluations < 70


def test_a_sensitive_layer_gets_more_bits_than_the_others():
    """Each row of one weight has an outlier, so that a code of few bits is zero for all else; its neighbours have none."""
    net = tiny.vit()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.startswith("blocks.") and parameter.ndim == 2:
                # Two values a row, which two bits hold exactly.
                parameter.copy_(parameter.sign() * 0.1)
        net.blocks[1].mlp.fc1.weight.copy_(
            0.1 * torch.randn(net.blocks[1].mlp.fc1.weight.shape, generator=torch.Generator().manual_seed(0))
        )
        net.blocks[1].mlp.fc1.weight[:, 0] = 3.0
        # The outlier's input is next to nothing: only the small weights matter.
        net.blocks[1].norm2.weight[0] = 1e-4
        net.blocks[1].norm2.bias[0] = 0.0
        targets = [net(images) for images in batches()]
    qat.convert(net, qat.PtqRecipe(bits=4), input_size=tiny.SIZE)
    qat.ptq.calibrate(net, batches())
    chosen = settings(targets=["blocks.*"], average_bits=4, choices=(2, 4, 8), generations=0, fitness="mse")
    found = searched(net, targets, chosen).to_dict()["bits"]
    assert found["blocks.1.mlp.fc1"] == 8
    assert sum(bits < 8 for bits in found.values()) >= 4


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A search that nothing stopped: its net, what it found, its folder."""
    folder, (net, targets) = tmp_path_factory.mktemp("whole"), calibrated()
    return net, searched(net, targets, small(), run_dir=folder), folder


@pytest.mark.parametrize(("writes", "before_state"), [(1, True), (1, False), (3, False), (4, True), (7, False)])
def test_same_bits_after_a_kill(writes, before_state, tmp_path, monkeypatch, whole):
    finished, expected, folder = whole
    original, done = SearchFiles.write, []

    def write(self, content):
        done.append(1)
        if len(done) == writes and before_state:
            raise Killed
        original(self, content)
        if len(done) == writes:
            raise Killed

    monkeypatch.setattr(SearchFiles, "write", write)
    net, targets = calibrated()
    before = state(net)
    with pytest.raises(Killed):
        searched(net, targets, small(), run_dir=tmp_path)
    assert same(state(net), before)
    monkeypatch.undo()
    fresh, _ = calibrated()
    found = searched(fresh, targets, small(), run_dir=tmp_path, resume=True)
    assert same(state(fresh), state(finished))
    assert (found.best, found.front, found.points) == (expected.best, expected.front, expected.points)
    assert lines(tmp_path) == lines(folder)


def test_a_finished_search_evaluates_nothing_again(monkeypatch, whole):
    finished, expected, folder = whole
    monkeypatch.setattr(Evaluator, "fitness", lambda *_: pytest.fail("evaluated"))
    net, targets = calibrated()
    assert searched(net, targets, small(), run_dir=folder, resume=True) == expected
    assert same(state(net), state(finished))


def test_resume_demands_the_same_search(tmp_path):
    net, targets = calibrated()
    searched(net, targets, small(generations=0), run_dir=tmp_path)
    with pytest.raises(UsageError, match=r"search\.seed=1: the search to resume has 0 \(.*search\.ckpt\)"):
        searched(calibrated()[0], targets, small(generations=0, seed=1), run_dir=tmp_path, resume=True)
    with pytest.raises(UsageError, match="of a net, or of calibration images, with other values"):
        searched(calibrated(act_bits=6)[0], targets, small(generations=0), run_dir=tmp_path, resume=True)
    net, targets = quantized()
    search(net, batches(), targets, SearchSettings(passes=0, micro_batch=3), run_dir=tmp_path)
    with pytest.raises(UsageError, match=r"search\.method='bits': the search to resume has 'evolution'"):
        searched(calibrated()[0], targets, small(), run_dir=tmp_path, resume=True)


def test_draws_depend_on_the_seed_alone():
    found = []
    for seed in (0, 0, 1):
        net, targets = calibrated()
        torch.manual_seed(len(found))
        found.append(searched(net, targets, small(seed=seed)).points)
    assert found[0] == found[1] != found[2]


def test_a_small_cache_changes_the_cost_alone():
    one, two = (searched(*calibrated(), small(cache_gib=size)).points for size in (4.0, 0.0))
    assert one == two


def test_bits_that_the_net_came_with_are_a_seed():
    net, targets = calibrated(head_bits=8)
    assert (*[4] * 9, 8) in {point.bits for point in searched(net, targets, settings(generations=0)).points}


def test_layers_that_are_not_searched_keep_their_bits():
    net, targets = calibrated(head_bits=8)
    found = searched(net, targets, settings(targets=["blocks.0.*"], average_bits=2.5))
    assert set(found.layers) == {name for name in LAYERS if name.startswith("blocks.0.")}
    assert {name: bits for name, bits in bits_of(net).items() if name not in found.layers} == {
        name: 8 if name == "head" else 4 for name in LAYERS if name not in found.layers
    }


def test_a_fitness_that_is_no_number_names_candidate_and_generation():
    net, targets = calibrated()
    before = state(net)
    net.head.register_forward_hook(lambda module, _, output: output * (float("nan") if module.weight_quantizer.spec.bits == 3 else 1))
    with pytest.raises(UsageError, match=r"the fitness of candidate \d of generation uniform \(bits 3 3 .*\) is nan; its logits"):
        searched(net, targets, settings())
    assert same(state(net), before)
    assert set(bits_of(net).values()) == {4}


def test_what_cannot_be_searched():
    net, targets = calibrated()
    low, high = (size_bytes(with_overrides({"*": {"bits": bits}})) / 1e6 for bits in (2, 8))
    allowed = f"the net takes {low} MB with 2 bits everywhere and {high} MB with 8; must be a number of at least"
    with pytest.raises(UsageError) as error:
        searched(net, targets, settings(budget_mb=0.01))
    assert str(error.value) == f"search.budget_mb=0.01: {allowed} {low}"
    with pytest.raises(UsageError, match=r"^search\.average_bits=1\.9: must be a number of at least 2$"):
        settings(average_bits=1.9)
    assert searched(net, targets, settings(budget_mb=low, generations=1)).best.bits == (2,) * 10
    net, _ = calibrated()
    with pytest.raises(UsageError, match=r"search.targets=\['nope'\]: no such module has a weight"):
        searched(net, targets, settings(targets=["nope"]))
    with pytest.raises(UsageError, match="3 batches of images and 2 of logits"):
        searched(net, targets[:2], settings())
    with pytest.raises(UsageError, match="'infonce': a batch of one image has no others"):
        searched(net, [t[:1] for t in targets], settings(), images=[b[:1] for b in batches()])
    lsq, _ = quantized(preset="lsq", weight_quantizer="lsq")
    with pytest.raises(UsageError, match="no such module has a weight whose bits can change; those are nothing"):
        searched(lsq, targets, settings())
    flat = initialize_scales(
        qat.convert(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), qat.recipe("lsq"), input_size=tiny.SIZE), batches()
    )
    with pytest.raises(UsageError, match="has blocks, in modules called 'blocks'"):
        searched(flat, targets, settings())


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"choices": [2, 9]}, r"search\.choices=9: must be an integer from 2 to 8"),
        ({"choices": [1, 4]}, r"search\.choices=1: must be"),
        ({"choices": [4]}, r"search\.choices=\[4\]: must be a list of at least two widths"),
        ({"choices": 4}, r"search\.choices=4: must be a list"),
        ({"targets": []}, r"search\.targets=\[\]: must be a list of globs"),
        ({"children": 0}, r"search\.children=0: must be an integer of at least 1"),
        ({"generations": -1}, r"search\.generations=-1: must be an integer of at least 0"),
        ({"front_points": 1.5}, r"search\.front_points=1\.5: must be an integer of at least 0"),
        ({"fitness": "accuracy"}, r"search\.fitness='accuracy': must be one of infonce, mse, kl, cosine"),
        ({"average_bits": 0}, r"search\.average_bits=0: must be a number above 0"),
        ({"average_bits": None}, r"search\.budget_mb=None, search\.average_bits=None: one of them is needed"),
        ({"budget_mb": 1}, r"search\.budget_mb=1, search\.average_bits=3: one of them is needed, and only one"),
    ],
)
def test_settings_that_cannot_work(knobs, message):
    with pytest.raises(UsageError, match=message):
        BitsSettings(**({"average_bits": 3} | knobs))


def test_settings_are_plain_data():
    chosen = settings(choices=[8, 2, 2, 4], targets="head")
    assert (chosen.choices, chosen.targets) == ((2, 4, 8), ("head",))
    assert BitsSettings(**chosen.to_dict()) == chosen


def _process(rank, folder, port):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    net, targets = calibrated()
    found = searched(net, targets, small(), run_dir=folder, group=dist.group.WORLD)
    torch.save((state(net), [(p.bits, p.fitness) for p in found.points]), folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.long
def test_two_processes_search_as_one(tmp_path):
    """Three batches over two processes; the mean is of the same numbers in the same order."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_process, args=(tmp_path, port), nprocs=2)
    net, targets = calibrated()
    expected = searched(net, targets, small(), run_dir=tmp_path / "alone")
    for rank in range(2):
        found, known = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert same(found, state(net))
        assert known == [(p.bits, p.fitness) for p in expected.points]
    assert lines(tmp_path) == lines(tmp_path / "alone")
