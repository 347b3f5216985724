"""Attention within documents against softmax with a mask, written out."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from models import attention
from models.attention import attend, documents_of

POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 0, 1], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]])


def queries_keys_values(length: int, device: str = "cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, length, heads, 16) for heads in (4, 2, 2)]  # heads beside each other, as projections leave them
    drawn = [torch.randn(shape, generator=generator).transpose(1, 2) for shape in shapes]
    return [x.to(device).requires_grad_() for x in drawn]


def visible(positions: Tensor) -> Tensor:
    documents = (positions == 0).cumsum(1)
    same = documents[:, None, :, None] == documents[:, None, None, :]
    return same & torch.ones_like(same[0, 0]).tril()


def by_formula(q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~visible(positions), -math.inf)
    return scores.softmax(-1) @ v


@pytest.mark.parametrize(
    "positions",
    [
        POSITIONS,
        torch.arange(300).remainder(128).repeat(2, 1),
        torch.stack([torch.arange(70), torch.arange(1, 71)]),  # which goes on with a document of the row before
        torch.zeros(2, 5, dtype=torch.int64),
    ],
    ids=["several", "long", "one", "single tokens"],
)
def test_documents_are_attended_to_as_by_a_mask(positions: Tensor) -> None:
    ours, reference = (queries_keys_values(positions.shape[1]) for _ in range(2))
    found, expected = attend(*ours, documents_of(positions)), by_formula(*reference, positions)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    slopes = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    found.backward(slopes)
    expected.backward(slopes)
    for x, y in zip(ours, reference, strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scores", [2**20, 4 * 128 * 300], ids=["both rows", "row by row"])
@pytest.mark.parametrize(
    "positions",
    [
        None,
        torch.arange(300).remainder(170).repeat(2, 1),
        torch.stack([torch.arange(300).remainder(7), torch.arange(5, 305)]),
        torch.zeros(2, 300, dtype=torch.int64),
    ],
    ids=["whole rows", "long", "short and one", "single tokens"],
)
def test_bf16_is_the_formula_but_for_rounding(
    positions: Tensor | None, scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "BLOCK_SCORES", scores)
    ours = [x.detach().bfloat16().requires_grad_() for x in queries_keys_values(300)]
    reference = [x.detach().float().requires_grad_() for x in ours]
    places = torch.arange(300).repeat(2, 1) if positions is None else positions
    found, expected = attend(*ours, positions), by_formula(*reference, places)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.03)
    slopes = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    found.backward(slopes)
    expected.backward(slopes.float())
    for x, y in zip(ours, reference, strict=True):
        assert x.grad is not None
        assert y.grad is not None
        assert (x.grad.float() - y.grad).norm() <= 0.01 * y.grad.norm() + 1e-6


def test_without_documents_a_row_is_one() -> None:
    qkv = queries_keys_values(40)
    whole = torch.arange(40).repeat(2, 1)
    torch.testing.assert_close(attend(*qkv, None), by_formula(*qkv, whole), rtol=0, atol=1e-6)


def test_flex_attention_is_masked_attention() -> None:
    """The mask of the GPU path, for tensors on the CPU, where flex attention has no backward pass."""
    qkv = [x.detach() for x in queries_keys_values(POSITIONS.shape[1])]
    documents = (POSITIONS == 0).cumsum(1)
    mask = create_block_mask(
        lambda b, h, query, key: (query >= key) & (documents[b, query] == documents[b, key]),
        2,
        None,
        10,
        10,
        device="cpu",
    )
    torch.testing.assert_close(attend(*qkv, mask), by_formula(*qkv, POSITIONS), rtol=0, atol=1e-6)
