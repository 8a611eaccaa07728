"""Processes that train together, forked from a server that has imported all modules.

Autograd refuses to work in the fork of a process that ran compiled steps.
"""

import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as mp
from lightning.fabric.utilities.rank_zero import rank_zero_only as fabric_rank_zero_only
from lightning.pytorch.utilities.rank_zero import rank_zero_only


def in_processes(
    count: int, function: Callable[..., Any], *args: Any, timeout: float = 120
) -> list[str]:
    """Call a function in processes as torchrun would; return the error of each, "" if there is none."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["tests.conftest", "qat.tasks.train"])
    errors = context.SimpleQueue()
    processes = [
        context.Process(target=_run, args=(number, count, port, errors, function, args))
        for number in range(count)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout)
        if process.is_alive():
            process.kill()
    found = dict.fromkeys(range(count), "no answer")
    while not errors.empty():
        number, message = errors.get()
        found[number] = message
    return [found[number] for number in range(count)]


def _run(number, count, port, errors, function, args):
    place = {
        "LOCAL_RANK": number,
        "RANK": number,
        "WORLD_SIZE": count,
        "NODE_RANK": 0,
        "MASTER_PORT": port,
    }
    os.environ.update({
        "MASTER_ADDR": "127.0.0.1",
        **{name: str(value) for name, value in place.items()},
    })
    rank_zero_only.rank = fabric_rank_zero_only.rank = number
    torch.set_num_threads(1)
    try:
        function(*args)
        errors.put((number, ""))
    except BaseException as error:
        errors.put((number, f"{type(error).__name__}: {error}"))
        traceback.print_exc()
