"""Calibration that several processes share. Oracle: one process with all the batches."""

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import qat
from qat.model.ptq_spec import PtqRecipe
from qat.ptq import calibrate
from qat.ptq.distributed import Ranks
from tests.tiny import SIZE, images, vit

KNOBS = {"bits": 4, "placement": "fqvit"}
BATCHES = 3  # the second process has one of them


def calibrated(knobs, ranks):
    net = qat.convert(vit(), PtqRecipe(**knobs), input_size=SIZE)
    done = calibrate(net, [images(seed=i) for i in ranks.own(BATCHES)], ranks=ranks)
    return net.state_dict(), done


def _process(rank, folder, port):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    made = [calibrated(KNOBS | more, Ranks(dist.group.WORLD)) for more in ({}, {"act_observer": "omse", "residual_observer": "ptf"})]
    torch.save([state for state, _ in made], folder / f"{rank}.pt")
    torch.save([done.images for _, done in made], folder / f"{rank}.images.pt")
    dist.destroy_process_group()


@pytest.mark.long
def test_deviates_from_reference_two_processes_find_the_scales_of_one(tmp_path):
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    mp.spawn(_process, args=(tmp_path, port), nprocs=2)
    (plain, searched), (plain_too, searched_too) = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    alone, _ = calibrated(KNOBS, Ranks())
    assert all(torch.equal(alone[name], plain[name]) and torch.equal(alone[name], plain_too[name]) for name in alone)
    # Candidates are tried on the last batch of the first process: here that is the last of all.
    alone, _ = calibrated(KNOBS | {"act_observer": "omse", "residual_observer": "ptf"}, Ranks())
    assert all(torch.equal(alone[name], searched[name]) and torch.equal(alone[name], searched_too[name]) for name in alone)
    assert [torch.load(tmp_path / f"{rank}.images.pt", weights_only=True) for rank in (0, 1)] == [[16, 16], [8, 8]]
