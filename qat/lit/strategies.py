"""Strategies of Lightning as quantized nets want them, data-parallel and with weights shared out (FSDP2); how they write checkpoints."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.layer_sync import TorchSyncBatchNorm
from lightning.pytorch.strategies import DDPStrategy, Strategy
from lightning_utilities.core.apply_func import apply_to_collection
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from qat.errors import UsageError
from qat.utils.files import read_torch, write_torch

PREVIOUS = {"last.ckpt": "last.prev.ckpt"}
SHARDED, SEARCHING = "fsdp", "ddp_find_unused_parameters_true"


def strategy_of(name: Any, processes: int) -> Any:
    """The strategy that a name stands for where there are so many processes; what has no meaning of its own here is Lightning's."""
    if processes == 1:
        return "auto" if name == SHARDED else name
    searching = partial(data_parallel, find_unused_parameters=True)
    ours: dict[Any, Callable[[], Strategy]] = {
        "auto": data_parallel,
        "ddp": data_parallel,
        SEARCHING: searching,
        SHARDED: ShardedStrategy,
    }
    return ours[name]() if isinstance(name, str) and name in ours else name


def data_parallel(*, find_unused_parameters: bool = False) -> DDPStrategy:
    """Lightning's DDP for nets whose buffers are the same in all processes.

    Quantizers' buffers are, since they follow from the parameters; the statistics of batch norms are averaged where they are used
    (`QATModule`). DDP's own way would send all buffers before every forward pass, and would wait for ever in a validation in which one
    process has a batch more than another, as it has where no image is counted twice.

    Args:
        find_unused_parameters: for nets with parameters that a step does not use, as a head that the loss leaves out.
    """
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    # torch 2.14 has another name for it.
    sync_buffers = (
        "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    )
    options: dict[str, Any] = {
        sync_buffers: False,
        "gradient_as_bucket_view": True,
        "find_unused_parameters": find_unused_parameters,
    }
    return DDPStrategy(**options)


BLOCKS = "blocks"  # what timm calls the list of a net's, or of a stage's, blocks


def shared_modules(net: nn.Module) -> list[FSDPModule]:
    """The modules of a net that gather and share out weights; none in a net that is whole."""
    return [module for module in net.modules() if isinstance(module, FSDPModule)]


class ShardedStrategy(DDPStrategy):
    """Lightning's DDP with the net's weights shared out in place of DDP's wrapper; evaluation alone has the whole net in each process.

    Lightning's own strategies of the kind refuse CPUs (`fsdp`), or write and read checkpoints past the trainer's `CheckpointIO`
    (`ModelParallelStrategy`). Here the file is the one that a single process writes: the first process has all tensors gathered, whole and
    on the CPU, one after the other.
    """

    def configure_ddp(self) -> None:
        """Share out the net, which is first made the same in all processes; once, also where a run goes back and fits again.

        Each process keeps its part of every parameter, cut along its first dimension; a block's are whole while the block is computed.
        What is in no block is a group of its own, whole during forward and backward pass.
        """
        net = self._net
        if shared_modules(net):
            return
        for tensor in (*net.parameters(), *net.buffers()):
            dist.broadcast(tensor.detach(), 0)
        mesh = init_device_mesh(self.root_device.type, (dist.get_world_size(),))
        blocks = [
            module for name, module in net.named_modules() if name.split(".")[-2:-1] == [BLOCKS]
        ]
        for module in (*reversed(blocks), net):  # inner ones first
            fully_shard(module, mesh=mesh, reshard_after_forward=True)

    def setup_optimizers(self, trainer: Trainer) -> None:
        """Share out a state that optimizers begin with."""
        super().setup_optimizers(trainer)
        self._share_out_states()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Whole, in the first process; nothing in the others, which take part."""
        return self._gathered(super().lightning_module_state_dict())

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Whole, in the first process; nothing in the others, which take part."""
        return self._gathered(super().optimizer_state(optimizer))

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:  # noqa: FBT001, FBT002  (Lightning's signature)
        """Read into a net that is whole, or that is shared out already."""
        module = cast(LightningModule, self.lightning_module)
        there = module.state_dict()
        state = {
            name: like(value, there.get(name, value))
            for name, value in checkpoint["state_dict"].items()
        }
        module.load_state_dict(state, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Read whole moments."""
        super().load_optimizer_state_dict(checkpoint)
        self._share_out_states()

    def on_validation_start(self) -> None:
        """Gather all weights: one process may have a batch more than another, which must not wait for it."""
        for module in shared_modules(self._net):
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()

    def on_validation_end(self) -> None:
        """Share them out again."""
        for module in shared_modules(self._net):
            module.set_reshard_after_forward(True, recurse=False)
            module.reshard()

    def teardown(self) -> None:
        """Weights that are shared out stay on their device, to which the processes' exchange is bound; what optimizers keep goes."""
        if self.lightning_module is None or not shared_modules(self._net):
            super().teardown()
            return
        self.optimizers = []
        for part in (self.cluster_environment, self.precision_plugin, self.accelerator):
            if part is not None:
                part.teardown()

    @property
    def _net(self) -> nn.Module:
        net: nn.Module = cast(Any, self.lightning_module).net
        return net

    def _share_out_states(self) -> None:
        for optimizer in self.optimizers:
            for parameter, state in optimizer.state.items():
                state.update({
                    key: like(value, parameter)
                    for key, value in state.items()
                    if isinstance(value, Tensor)
                })

    def _gathered(self, state: dict[str, Any]) -> dict[str, Any]:
        def gather(tensor: DTensor) -> Tensor | None:
            found = whole(tensor)
            return found.cpu() if self.is_global_zero else None

        state = apply_to_collection(state, DTensor, gather)
        return state if self.is_global_zero else {}


def own(tensor: Tensor) -> Tensor:
    """This process's part; it may be empty."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of it, in each process; all of them have to ask, and in the same order."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, other: Tensor) -> Tensor:
    """A tensor that every process has, shared out as `other` of the same shape is, and on its device; nothing is sent."""
    if not isinstance(other, DTensor) or isinstance(tensor, DTensor) or tensor.shape != other.shape:
        return tensor
    return distribute_tensor(
        tensor.to(other.device), other.device_mesh, other.placements, src_data_rank=None
    )


class SyncBatchNorms(TorchSyncBatchNorm):
    """Batch norms that are synchronized by timm's conversion, which keeps the activation that timm's own batch norms apply."""

    def __init__(self) -> None:
        self._originals: dict[nn.Module, nn.Module] = {}

    def apply(self, model: nn.Module) -> nn.Module:
        """The same model with synchronized batch norms, which share all tensors with the original ones."""
        originals = dict(model.named_modules(remove_duplicate=False))
        model = convert_sync_batchnorm(model)
        for name, module in model.named_modules(remove_duplicate=False):
            if module is not originals[name]:
                self._originals[module] = originals[name]
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        """The same model with its original batch norms, which take over parameters and statistics."""
        for name, module in list(model.named_modules(remove_duplicate=False)):
            if original := self._originals.get(module):
                original.__dict__.update(
                    _parameters=module._parameters,
                    _buffers=module._buffers,
                    training=module.training,
                )
                model.set_submodule(name, original)
        return model


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints written atomically, read without unpickling anything but plain data, and only if they are whole."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Write beside the path, flush to the disk, rename; the `last.ckpt` that is replaced stays as `last.prev.ckpt`."""
        try:
            write_torch(path, checkpoint, previous=PREVIOUS.get(Path(path).name))
        except (OSError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())
            raise UsageError(
                f"{path} cannot be written ({reason}); the previous checkpoint is intact"
            ) from error

    def load_checkpoint(  # Lightning's signature
        self,
        path: Any,
        map_location: Any | None = None,
        weights_only: bool | None = None,  # noqa: FBT001
    ) -> dict[str, Any]:
        """Read plain data and tensors of a file whose checksums fit; `weights_only` is always on."""
        checkpoint: dict[str, Any] = read_torch(path, map_location=map_location)
        return checkpoint
