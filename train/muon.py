"""Muon: momentum whose update is orthogonalised, for the matrices inside the blocks.

Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024); the scale of the update follows
Liu et al., arXiv:2502.16982: its root mean square is that of AdamW, so both share a learning rate and decay.

Orthogonalising costs many matrix products a step. Each rank does it for its share of the matrices, and the
results are exchanged, so that the cost falls with the number of ranks: under DDP every rank has whole
gradients and sends its results to the others of its node; under FSDP2 the ranks first bring the shards of each
matrix together on its owner, and then send the parts of the results back. Nodes do the same work beside each
other under DDP and HSDP: what they would send each other takes longer, and the same devices come to the same
bits from the same gradients.

Shapes: n matrices of a rows and b columns; W ranks that share the work.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic, chosen by Jordan et al. for a steep rise of small singular values; after five steps all lie
between about 0.7 and 1.2."""

STEPS = 5

RMS = 0.2
"""Root mean square of an update at learning rate 1, about that of AdamW's (arXiv:2502.16982, section 2.2)."""


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay.

    Args:
        named: names and parameters, all matrices; sharded ones (DTensor) along their rows.
        rows: names of fused matrices, each with the rows of the matrices in it, which are orthogonalised one
            by one.
        lr: learning rate.
        momentum: decay of the mean of gradients.
        weight_decay: relative to the learning rate.
        dtype: in which to orthogonalise and to send: bf16 is enough, fp32 to compare runs exactly.
    """

    found_inf: Tensor | None = None
    """Where this is 1.0 nothing changes, as for torch's own optimisers."""

    def __init__(
        self,
        named: Sequence[tuple[str, nn.Parameter]],
        rows: dict[str, tuple[int, ...]],
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
        dtype: torch.dtype,
    ) -> None:
        alike: dict[Any, list[nn.Parameter]] = {}
        for name, parameter in named:
            parts = rows.get(name, (parameter.shape[0],))
            alike.setdefault((tuple(parameter.shape), parts), []).append(parameter)
        groups = [{"params": params, "rows": parts} for (_, parts), params in alike.items()]
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "rows": ()}
        super().__init__(groups, defaults)
        self._dtype = dtype
        self._sharers = _sharers(named[0][1])

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Move the weights by the gradients that are there."""
        taken = None if self.found_inf is None else 1 - self.found_inf
        for group in self.param_groups:
            momentum, lr = group["momentum"], group["lr"]
            directions = [self._direction(parameter, momentum, taken) for parameter in group["params"]]
            updates = self._orthogonalised(group, directions)
            decay = 1 - lr * group["weight_decay"] * (1.0 if taken is None else taken)
            for parameter, update in zip(group["params"], updates, strict=True):
                weight = _local(parameter)
                weight.mul_(decay).add_(update.to(weight.dtype), alpha=-lr)

    def _direction(self, parameter: nn.Parameter, momentum: float, taken: Tensor | None) -> Tensor:
        """Nesterov's momentum of this rank's part; zero, and nothing remembered, when the step is skipped."""
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        assert parameter.grad is not None
        mean, gradient = _local(state["momentum"]), _local(parameter.grad)
        new = mean.lerp(gradient, 1 - momentum)
        direction = gradient.lerp(new, momentum)
        if taken is None:
            mean.copy_(new)
            return direction
        mean.copy_(torch.where(taken > 0, new, mean))
        return torch.where(taken > 0, direction, 0.0)

    def _orthogonalised(self, group: dict[str, Any], directions: list[Tensor]) -> list[Tensor]:
        """The update of every matrix of a group, this rank's part of it."""
        first = group["params"][0]

        def work(whole: Tensor) -> Tensor:
            return scaled_orthogonal(whole, group["rows"])

        directions = [direction.to(self._dtype) for direction in directions]
        if self._sharers is None:
            return list(work(torch.stack(directions)))
        if isinstance(first, DTensor):
            return _by_owners_of_shards(directions, first.shape[0], self._sharers, work)
        return _by_owners(directions, self._sharers, work)


_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
"""torch 2.13 gave it a new name and warns of the old one."""


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor; a view of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _sharers(parameter: Tensor) -> dist.ProcessGroup | None:
    """The ranks that share the work: those that a parameter is cut up among, or those of a node; None alone."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return None
    if isinstance(parameter, DTensor):
        return parameter.device_mesh.get_group(parameter.device_mesh.ndim - 1)
    world = dist.get_world_size()
    near = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    if near in (1, world):
        return dist.group.WORLD
    return init_device_mesh(parameter.device.type, (world // near, near)).get_group(1)


def _by_owners(matrices: list[Tensor], group: Any, work: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """``work`` on matrices that every rank has: rank r does numbers r, r + W, …, and all get all results."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    mine = matrices[rank::world]
    share = -(-len(matrices) // world)
    results = matrices[0].new_zeros((share, *matrices[0].shape))
    if mine:
        results[: len(mine)] = work(torch.stack(mine))
    everyones = matrices[0].new_empty((world * share, *matrices[0].shape))
    _all_gather(everyones, results, group=group)
    return [everyones[(number % world) * share + number // world] for number in range(len(matrices))]


def _by_owners_of_shards(shards: list[Tensor], rows: int, group: Any, work: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """``work`` on matrices that are sharded by rows; each rank gets its rows of the results.

    Rank r works on numbers r, r + W, …: all send it their rows of those, and it sends back theirs of the
    results.
    """
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    columns = shards[0].shape[1]
    chunk = -(-rows // world)  # as torch.chunk, and FSDP2, divide rows
    rows_of = [max(0, min(chunk, rows - chunk * r)) for r in range(world)]
    owned_by = [len(range(r, len(shards), world)) for r in range(world)]
    there = [count * rows_of[rank] * columns for count in owned_by]
    back = [owned_by[rank] * rows_of[r] * columns for r in range(world)]

    sent = torch.cat([shard.reshape(-1) for r in range(world) for shard in shards[r::world]])
    received = sent.new_empty(sum(back))
    dist.all_to_all_single(received, sent, back, there, group=group)
    if owned_by[rank]:
        parts = received.split(back)
        pieces = [part.view(owned_by[rank], rows_of[r], columns) for r, part in enumerate(parts)]
        whole = work(torch.cat(pieces, dim=1))
        received = torch.cat([piece.reshape(-1) for piece in whole.split(rows_of, dim=1)])
    returned = torch.empty_like(sent)
    dist.all_to_all_single(returned, received, there, back, group=group)
    by_owner = [list(part.view(owned_by[r], rows_of[rank], columns)) for r, part in enumerate(returned.split(there))]
    return [by_owner[number % world][number // world] for number in range(len(shards))]


def scaled_orthogonal(matrices: Tensor, rows: Sequence[int]) -> Tensor:
    """Updates for stacked fused matrices (n, a, b): each part made orthogonal, with AdamW's root mean square.

    An orthogonal a × b matrix has a root mean square of 1 / sqrt(max(a, b)).
    """
    parts = matrices.split(list(rows), dim=1)
    return torch.cat([orthogonal(part) * (RMS * max(part.shape[1:]) ** 0.5) for part in parts], dim=1)


def orthogonal(matrices: Tensor) -> Tensor:
    """Matrices (n, a, b) with their singular values moved near 1, by Newton–Schulz iteration."""
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.mT  # the Gram matrix of the shorter side
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.mT
