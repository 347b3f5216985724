"""A model on its devices, ready to train: one device, DDP or FSDP2 (full or hybrid shards).

DeepSpeed's ZeRO is in train/deepspeed.py. The loop, the checkpoints and the evaluation use either through
the few methods of :class:`Engine` and do not ask which it is.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from common.distributed import Job
from common.errors import UserError
from train.fabric import DeepSpeedStrategy, Fabric, ModelParallelStrategy
from train.health import Guard

Values = Callable[[str, torch.Size], Tensor]
"""The value of a parameter, by its name and whole shape."""

MakeOptimizers = Callable[[nn.Module], list[Optimizer]]


class Engine:
    """A model under one device, DDP or FSDP2.

    Args:
        fabric: launched.
        job: the ranks.
        build: makes the model; under FSDP2 on the meta device, so that no rank ever holds all of it.
        values: the weights to start from.
        make_optimizers: called with the model once it is on its devices (and sharded): an optimiser made
            earlier would go on with parameters that are no longer the model's.
        spike: see :class:`train.health.Guard`.
    """

    asynchronous = True
    """Whether :meth:`tensors_to_save` may be copied and written while training goes on."""

    def __init__(
        self,
        fabric: Fabric,
        job: Job,
        build: Callable[[], nn.Module],
        values: Values,
        make_optimizers: MakeOptimizers,
        spike: float,
    ) -> None:
        self.fabric, self.job, self.device = fabric, job, fabric.device
        self.guard = Guard(spike, fabric.device)
        self.raw, self.model, self.optimizers = self._set_up(build, values, make_optimizers)

    def _set_up(
        self, build: Callable[[], nn.Module], values: Values, make_optimizers: MakeOptimizers
    ) -> tuple[nn.Module, Any, list[Optimizer]]:
        sharded = isinstance(self.fabric.strategy, ModelParallelStrategy)
        with torch.device("meta"):
            raw = build()
        if not sharded:
            materialise(raw, self.device)
            fill(raw, values)
        model = self.fabric.setup_module(raw)
        if sharded:
            fill(raw, values)
        return raw, model, make_optimizers(raw)

    def micro_step(self, *, last: bool) -> AbstractContextManager[None]:
        """A block for forward and backward of a micro-batch; gradients are exchanged in the last one.

        Under FSDP2 they are cut up after every one: whole gradients would not fit where weights have to be
        sharded. Only the sum over replicas (HSDP) waits for the last.
        """
        if isinstance(self.raw, FSDPModule):
            self.raw.set_requires_all_reduce(last)
            return nullcontext()
        return self.fabric.no_backward_sync(self.model, enabled=not last)

    def backward(self, loss: Tensor) -> None:
        """Gradients of a loss, added to those that are there."""
        self.fabric.backward(loss)

    def update(self, rate: float, clip: float, nll: Tensor) -> tuple[Tensor, Tensor]:
        """Clip, decide, and move the weights.

        Args:
            rate: learning rate.
            clip: largest global gradient norm; 0 does not clip.
            nll: of the step, over all ranks.

        Returns:
            The norm before clipping, and 1.0 where the step was skipped; on the device.
        """
        norm = nn.utils.clip_grad_norm_(self.raw.parameters(), clip if clip > 0 else float("inf"))
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        skip = self.guard.check(nll, norm)
        for optimizer in self.optimizers:
            optimizer.found_inf = skip  # type: ignore[attr-defined]
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return norm, skip

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that training depends on, by name: ``model.NAME``, ``optimizer.NAME.KEY``, ``guard.KEY``."""
        moments = {
            f"optimizer.{name}.{key}": value
            for name, parameter in self._named()
            for optimizer in self.optimizers
            for key, value in optimizer.state.get(parameter, {}).items()
        }
        return self.weights() | moments | self.guard.tensors()

    def tensors_to_save(self) -> dict[str, Tensor]:
        """This rank's share of :meth:`tensors`: its shards, and in turn with the others what all have whole."""
        rank, world = self.job.rank, self.job.world_size
        return {
            name: tensor
            for number, (name, tensor) in enumerate(self.tensors().items())
            if isinstance(tensor, DTensor) or number % world == rank
        }

    def weights(self) -> dict[str, Tensor]:
        """The weights that are trained, as ``model.NAME``."""
        return {f"model.{name}": parameter.detach() for name, parameter in self._named()}

    def _named(self) -> list[tuple[str, nn.Parameter]]:
        """The parameters that the optimisers know.

        After a forward pass without a backward pass, an evaluation, FSDP2's outermost unit stays gathered: its
        parameters are then other tensors, in bf16 where that is computed in.
        """
        for module in self.raw.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        return [(name, parameter) for name, parameter in self.raw.named_parameters() if parameter.requires_grad]

    def tensors_to_load(self, stored: dict[str, torch.Size]) -> dict[str, Tensor]:
        """The tensors that a checkpoint with ``stored`` names and shapes is read into.

        The optimiser's state does not exist before its first step: it is made here, like the parameter
        where it has the parameter's shape, else whole on every rank.

        Raises:
            UserError: the optimiser's state is there for some parameters only.
        """
        named = {name for name, _ in self._named()}
        with_state = {name.removeprefix("optimizer.").rpartition(".")[0] for name in stored if "optimizer." in name}
        if with_state and named - with_state:
            raise UserError(f"the checkpoint is not whole: it has no optimiser state of {min(named - with_state)}")
        for name, parameter in self._named():
            owner = next(o for o in self.optimizers if any(parameter is p for g in o.param_groups for p in g["params"]))
            prefix = f"optimizer.{name}."
            for full in (known for known in stored if known.startswith(prefix)):
                like = stored[full] == parameter.shape
                # A step count is on the parameter's device, where fused AdamW keeps it.
                value = torch.zeros_like(parameter) if like else torch.zeros(stored[full], device=self.device)
                owner.state[parameter][full.removeprefix(prefix)] = value.detach()
        # DeepSpeed's checkpoints have no guard; everything else must be there.
        missing = [name for name in self.guard.tensors() if name not in stored]
        return {name: tensor for name, tensor in self.tensors().items() if name not in missing}

    def weights_to_load(self) -> dict[str, Tensor]:
        """The tensors that the weights alone are read into."""
        return self.weights()

    def loaded(self) -> None:
        """Called when the tensors of a checkpoint have been read."""


def engine_for(fabric: Fabric) -> type[Engine]:
    """The kind of engine that a strategy of Fabric's needs."""
    if isinstance(fabric.strategy, DeepSpeedStrategy):
        from train.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine
    return Engine


def materialise(model: nn.Module, device: torch.device) -> None:
    """Memory on ``device`` for a model on the meta device.

    A tied weight stays one, which ``to_empty`` makes two; tables that are no weights keep their values.
    """
    tables = {name: buffer for name, buffer in model.named_buffers() if not buffer.is_meta}
    places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            places.setdefault(parameter, []).append((module, name))
    model.to_empty(device=device)
    for (first, its_name), *others in places.values():
        for module, name in others:
            setattr(module, name, getattr(first, its_name))
    for name, buffer in tables.items():
        model.get_buffer(name).copy_(buffer)


@torch.no_grad()
def fill(model: nn.Module, values: Values) -> None:
    """Give every parameter its value; of a sharded one each rank keeps its part, and nothing is sent."""
    for name, parameter in model.named_parameters():
        value = values(name, parameter.shape)
        if isinstance(parameter, DTensor):
            mesh, placements = parameter.device_mesh, parameter.placements
            parameter.copy_(distribute_tensor(value, mesh, placements, src_data_rank=None))
        else:
            parameter.copy_(value)


def shard(precision: str, *, hybrid: bool) -> Callable[[Any, DeviceMesh], Any]:
    """What :class:`ModelParallelStrategy` calls to shard a model that is on the meta device.

    Each block is a unit that is gathered before and freed after its use; embedding, last norm and head
    are one more, which stays gathered from forward to backward. Under bf16 the gathered weights are bf16 and
    gradients are summed in fp32 (FSDP2's mixed precision), which halves what is sent.

    Args:
        precision: ``32`` or ``bf16``.
        hybrid: shard over the devices of a node and replicate over nodes (HSDP), rather than over all.
    """
    bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    policy = bf16 if precision == "bf16" else MixedPrecisionPolicy()

    def parallelize(module: Any, mesh: DeviceMesh) -> Any:
        over = mesh if hybrid else mesh["data_parallel"]
        for block in module.blocks:
            fully_shard(block, mesh=over, mp_policy=policy)
        fully_shard(module, mesh=over, mp_policy=policy)
        here = torch.device("cpu") if mesh.device_type == "cpu" else torch.device("cuda", torch.cuda.current_device())
        materialise(module, here)
        return module

    return parallelize
