"""Muon: what it makes of a gradient, on one process and shared among several."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from train.muon import RMS, Muon, orthogonal, scaled_orthogonal

SHAPES = [(6, 10), (6, 10), (6, 10), (9, 4), (1, 5)]
"""Three alike for two ranks, rows that do not divide, and fewer rows than ranks."""


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 8, 40), (2, 40, 8)])
def test_singular_values_come_near_one(shape) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonal(matrices))
    assert values.max() < 1.3
    assert values.median() > 0.65
    # The directions stay: the polar factor U·Vᵀ of the matrix is near.
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    cosine = torch.nn.functional.cosine_similarity((u @ v).flatten(1), orthogonal(matrices).flatten(1))
    assert cosine.min() > 0.9


def test_an_update_has_the_root_mean_square_of_adamw_whatever_its_shape() -> None:
    for shape in [(1, 32, 32), (1, 16, 128), (1, 128, 16)]:
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        update = scaled_orthogonal(matrix, shape[1:2])
        assert update.square().mean().sqrt().item() == pytest.approx(RMS, rel=0.2)


def test_fused_matrices_are_orthogonalised_one_by_one() -> None:
    matrix = torch.randn(1, 12, 8, generator=torch.Generator().manual_seed(2))
    whole = scaled_orthogonal(matrix, (4, 8))
    assert torch.equal(whole[:, :4], scaled_orthogonal(matrix[:, :4], (4,)))
    assert torch.equal(whole[:, 4:], scaled_orthogonal(matrix[:, 4:], (8,)))


def test_nothing_in_nothing_out() -> None:
    assert torch.equal(orthogonal(torch.zeros(1, 4, 4)), torch.zeros(1, 4, 4))


def steps(parameters: list[nn.Parameter], gradients: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    """Parameters after a step for each list of gradients."""
    named = [(str(number), parameter) for number, parameter in enumerate(parameters)]
    rows = {"3": (4, 5)}
    optimizer = Muon(named, rows, lr=0.1, momentum=0.9, weight_decay=0.1, dtype=torch.float32)
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


def values(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def test_weights_move_along_nesterovs_momentum_and_decay() -> None:
    start, (first, second) = values(0), (values(1), values(2))
    after = steps([nn.Parameter(value.clone()) for value in start], [first, second])
    weight, mean = start[0], torch.zeros_like(start[0])
    for gradient in (first[0], second[0]):
        mean = 0.9 * mean + 0.1 * gradient
        direction = 0.1 * gradient + 0.9 * mean
        weight = weight * (1 - 0.1 * 0.1) - 0.1 * scaled_orthogonal(direction[None], (6,))[0]
    assert torch.allclose(after[0], weight, atol=1e-5)


def _rank(rank: int, world: int, near: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_WORLD_SIZE"] = str(near)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    gradients = [values(1), values(2)]
    whole = steps([nn.Parameter(value) for value in values(0)], gradients)
    mesh = init_device_mesh("cpu", (world,))

    def cut(tensor: torch.Tensor) -> torch.Tensor:
        return distribute_tensor(tensor, mesh, [Shard(0)])

    parts = steps([nn.Parameter(cut(value)) for value in values(0)], [[cut(g) for g in step] for step in gradients])
    sharded = [part.full_tensor() for part in parts]
    torch.save({"whole": whole, "sharded": sharded}, f"{folder}/after-{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize(("world", "near"), [(2, 2), (3, 3), (4, 2)], ids=["2", "3", "2-nodes-of-2"])
def test_ranks_share_the_work_and_agree_with_one(world: int, near: int, tmp_path: Path) -> None:
    alone = steps([nn.Parameter(value) for value in values(0)], [values(1), values(2)])
    mp.start_processes(_rank, (world, near, str(tmp_path)), nprocs=world, start_method="fork")  # no imports again
    found = [torch.load(tmp_path / f"after-{rank}.pt") for rank in range(world)]
    for name in ("whole", "sharded"):
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found[0][name], alone, strict=True)), name
        for other in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0][name], other[name], strict=True)), name
