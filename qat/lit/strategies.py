"""Lightning strategies (data-parallel or FSDP2), and plugins for batch norms and checkpoint files.

`local_part` and `gather_tensor` convert `DTensor`s, and return other tensors unchanged.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.layer_sync import TorchSyncBatchNorm
from lightning.pytorch.strategies import DDPStrategy
from lightning_utilities.core.apply_func import apply_to_collection
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from qat.errors import UsageError
from qat.model.sites import find_blocks
from qat.utils.files import read_torch, write_torch

PREVIOUS_NAMES = {"last.ckpt": "last.prev.ckpt"}
SHARDED = "fsdp"
FIND_UNUSED = "ddp_find_unused_parameters_true"


def choose_strategy(name: Any, processes: int) -> Any:
    """The name or object of Lightning's strategy for the setting `trainer.strategy`.

    Args:
        name: the setting, a name or an object. With one process, `fsdp` becomes `auto`. With more,
            `auto`, `fsdp`, `ddp` and `ddp_find_*` become objects. All else is unchanged.
        processes: number of processes of the run.
    """
    if processes == 1:
        return "auto" if name == SHARDED else name
    if name in ("auto", "ddp", "ddp_find_unused_parameters_false"):
        return data_parallel()
    if name == FIND_UNUSED:
        return data_parallel(find_unused_parameters=True)
    if name == SHARDED:
        return ShardedStrategy()
    return name


def data_parallel(*, find_unused_parameters: bool = False) -> DDPStrategy:
    """Lightning's DDP, but forward passes send no buffers to other processes.

    Buffers of quantizers do not change during training, and the statistics of batch norms are
    averaged before use (`QATModule`). By default, DDP sends all buffers before every forward pass.
    A validation would then wait for ever if one process has more batches than another, which is
    possible because no image is repeated to make the numbers equal.

    Args:
        find_unused_parameters: True for nets with parameters that a step does not use, for example
            a head that the loss leaves out.
    """
    arguments = inspect.signature(DistributedDataParallel.__init__).parameters
    sync_buffers = "broadcast_buffers"
    if "forward_sync_buffers" in arguments:  # its name from torch 2.14 on
        sync_buffers = "forward_sync_buffers"
    options: dict[str, Any] = {
        sync_buffers: False,
        "gradient_as_bucket_view": True,
        "find_unused_parameters": find_unused_parameters,
    }
    return DDPStrategy(**options)


def sharded_modules(net: nn.Module) -> list[FSDPModule]:
    """Modules that gather and shard their weights; empty for a net that is not sharded."""
    return [module for module in net.modules() if isinstance(module, FSDPModule)]


class ShardedStrategy(DDPStrategy):
    """Lightning's DDP, but with sharded weights instead of DDP's wrapper.

    Validations gather all weights, and tests use unsharded nets. Lightning's own sharding
    strategies refuse CPUs (`fsdp`), or bypass the trainer's `CheckpointIO`
    (`ModelParallelStrategy`). With this strategy, checkpoints equal those of a single process: full
    tensors are gathered one by one, and the first process keeps them on the CPU.
    """

    def configure_ddp(self) -> None:
        """Shard the net after making it equal in all processes; do nothing in a second fit.

        Each process keeps its part of every parameter, split along the first dimension. Parameters
        of a block (`find_blocks`) are gathered while the block is computed; all other parameters,
        while the whole net is computed.
        """
        net = self._net
        if sharded_modules(net):
            return
        for tensor in (*net.parameters(), *net.buffers()):
            dist.broadcast(tensor.detach(), 0)
        mesh = init_device_mesh(self.root_device.type, (dist.get_world_size(),))
        for module in (*find_blocks(net).values(), net):  # inner modules first
            fully_shard(module, mesh=mesh, reshard_after_forward=True)

    def setup_optimizers(self, trainer: Trainer) -> None:
        """Shard the initial state of optimizers."""
        super().setup_optimizers(trainer)
        self._shard_optimizer_states()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The full state in the first process, empty in the others.

        All processes must call this method.
        """
        return self._gather_state(super().lightning_module_state_dict())

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """The optimizer's full state in the first process, empty in the others.

        All processes must call this method.
        """
        return self._gather_state(super().optimizer_state(optimizer))

    def load_model_state_dict(
        self,
        checkpoint: Mapping[str, Any],
        strict: bool = True,  # noqa: FBT001, FBT002  (Lightning's signature)
    ) -> None:
        """Load the state of a checkpoint; the net may already be sharded."""
        module = cast(LightningModule, self.lightning_module)
        current_state = module.state_dict()
        state = {}
        for name, value in checkpoint["state_dict"].items():
            state[name] = shard_like(value, current_state.get(name, value))
        module.load_state_dict(state, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load full optimizer states, and shard them."""
        super().load_optimizer_state_dict(checkpoint)
        self._shard_optimizer_states()

    def on_validation_start(self) -> None:
        """Gather all weights, as processes may have different numbers of batches to validate."""
        for module in sharded_modules(self._net):
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()

    def on_validation_end(self) -> None:
        """Shard all weights again."""
        for module in sharded_modules(self._net):
            module.set_reshard_after_forward(True, recurse=False)
            module.reshard()

    def teardown(self) -> None:
        """Tear down like Lightning, but keep a sharded net on its device, to gather it there."""
        if self.lightning_module is None or not sharded_modules(self._net):
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

    def _shard_optimizer_states(self) -> None:
        for optimizer in self.optimizers:
            for parameter, state in optimizer.state.items():
                for key, value in state.items():
                    if isinstance(value, Tensor):
                        state[key] = shard_like(value, parameter)

    def _gather_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """The state with `DTensor`s gathered on the CPU in the first process, empty in others."""

        def gather(tensor: DTensor) -> Tensor | None:
            full_tensor = gather_tensor(tensor)
            return full_tensor.cpu() if self.is_global_zero else None

        state = apply_to_collection(state, DTensor, gather)
        return state if self.is_global_zero else {}


def local_part(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process stores, which may be empty."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gather_tensor(tensor: Tensor) -> Tensor:
    """The full tensor in each process; all processes must call this function in the same order."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, other: Tensor) -> Tensor:
    """Shard a tensor like `other`; every process must have the full tensor, as nothing is sent.

    Returns:
        A `DTensor` on the device of `other`; `tensor` itself if `other` is not sharded or has
        another shape, or if `tensor` is already sharded.
    """
    if not isinstance(other, DTensor) or isinstance(tensor, DTensor) or tensor.shape != other.shape:
        return tensor
    return distribute_tensor(
        tensor.to(other.device), other.device_mesh, other.placements, src_data_rank=None
    )


class SyncBatchNorms(TorchSyncBatchNorm):
    """Synchronizes batch norms by timm's conversion, which keeps their activation functions."""

    def __init__(self) -> None:
        self._originals: dict[nn.Module, nn.Module] = {}

    def apply(self, model: nn.Module) -> nn.Module:
        """Synchronize the batch norms of a model; all tensors are shared with the old norms."""
        originals = dict(model.named_modules(remove_duplicate=False))
        model = convert_sync_batchnorm(model)
        for name, module in model.named_modules(remove_duplicate=False):
            if module is not originals[name]:
                self._originals[module] = originals[name]
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        """Restore the original batch norms, with the current parameters and statistics."""
        for name, module in list(model.named_modules(remove_duplicate=False)):
            original = self._originals.get(module)
            if original is not None:
                original.__dict__.update(
                    _parameters=module._parameters,
                    _buffers=module._buffers,
                    training=module.training,
                )
                model.set_submodule(name, original)
        return model


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints atomically, and reads only plain data and tensors of intact files."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint; a `last.ckpt` that it replaces is kept as `last.prev.ckpt`.

        Raises:
            UsageError: the file cannot be written.
        """
        try:
            write_torch(path, checkpoint, previous=PREVIOUS_NAMES.get(Path(path).name))
        except (OSError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UsageError(
                f"{path} cannot be written ({reason}); the previous checkpoint is intact"
            ) from error

    def load_checkpoint(  # Lightning's signature
        self,
        path: Any,
        map_location: Any | None = None,
        weights_only: bool | None = None,  # noqa: FBT001
    ) -> dict[str, Any]:
        """Read a checkpoint by `read_torch`; `weights_only` is not used."""
        checkpoint: dict[str, Any] = read_torch(path, map_location=map_location)
        return checkpoint
