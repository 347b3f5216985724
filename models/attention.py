"""Causal attention that stays inside each document of a row, by what is fastest on each device.

Shapes: B batch, T sequence, H query heads, K key/value heads, N head width.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import groupby, pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

Documents = Tensor | BlockMask | None
"""How :func:`attend` is told of them; None: every row is one."""

_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_kernel_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def documents_of(positions_BT: Tensor) -> Documents:
    """The documents of a batch from each token's place in its own; a 0 starts one.

    On CUDA a block mask for flex attention, which skips the blocks between documents. Elsewhere, where flex attention
    has no backward pass, the positions.
    """
    if positions_BT.device.type != "cuda":
        return positions_BT
    documents_BT = (positions_BT == 0).cumsum(1)
    B, T = documents_BT.shape

    def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (documents_BT[b, query] == documents_BT[b, key])

    return _create_block_mask()(visible, B, None, T, T, device=positions_BT.device)


def attend(q_BHTN: Tensor, k_BKTN: Tensor, v_BKTN: Tensor, documents: Documents) -> Tensor:
    """Causal softmax attention, scaled by 1/sqrt(N)."""
    if isinstance(documents, BlockMask):
        # Uncompiled, flex attention builds the whole score matrix: on a GPU it is only used compiled.
        alone = q_BHTN.device.type == "cuda" and not torch.compiler.is_compiling()
        flex: Any = _compiled_flex_attention() if alone else flex_attention
        return cast(Tensor, flex(q_BHTN, k_BKTN, v_BKTN, block_mask=documents, enable_gqa=True))
    if q_BHTN.device.type == "cpu" and q_BHTN.dtype == torch.bfloat16:
        return _attend_in_blocks(q_BHTN, k_BKTN, v_BKTN, documents)
    if documents is not None:
        return _attend_in_documents(q_BHTN, k_BKTN, v_BKTN, documents)
    return F.scaled_dot_product_attention(q_BHTN, k_BKTN, v_BKTN, is_causal=True, enable_gqa=True)


@cache
def _compiled_flex_attention() -> Any:
    return torch.compile(flex_attention, dynamic=False)


@cache
def _create_block_mask() -> Any:
    return torch.compile(create_block_mask)


@torch.compiler.disable  # where documents end is data: it would be compiled anew for every batch
def _attend_in_documents(q_BHTN: Tensor, k_BKTN: Tensor, v_BKTN: Tensor, positions_BT: Tensor) -> Tensor:
    return cast(Tensor, _InDocuments.apply(q_BHTN, k_BKTN, v_BKTN, positions_BT))


class _InDocuments(torch.autograd.Function):
    """Attention on a CPU in fp32, one document after the other.

    A mask would make torch's kernel compute all T·T scores of a row, those before the diagonal and those between
    documents for nothing. The kernel is called by its own name, because what its backward pass reads is hidden behind
    ``scaled_dot_product_attention``, and slices of one output need no copy to be one tensor.
    """

    @staticmethod
    def forward(ctx: Any, q_BHTN: Tensor, k_BKTN: Tensor, v_BKTN: Tensor, positions_BT: Tensor) -> Tensor:
        B, H, T, N = q_BHTN.shape
        y_BHTN = q_BHTN.new_empty(B, T, H, N).transpose(1, 2)  # as the products around it have their heads
        ctx.places, sums = list(_each_document(positions_BT)), []
        for at in ctx.places:
            y_BHTN[at], log_sums = _kernel(q_BHTN[at], k_BKTN[at], v_BKTN[at], 0.0, True)
            sums.append(log_sums)
        ctx.save_for_backward(q_BHTN, k_BKTN, v_BKTN, y_BHTN, *sums)
        return y_BHTN

    @staticmethod
    def backward(ctx: Any, d_y_BHTN: Tensor) -> Any:
        q_BHTN, k_BKTN, v_BKTN, y_BHTN, *sums = ctx.saved_tensors
        slopes = d_q_BHTN, d_k_BKTN, d_v_BKTN = [torch.empty_like(x) for x in (q_BHTN, k_BKTN, v_BKTN)]
        shared = q_BHTN.shape[1] // k_BKTN.shape[1]
        for at, log_sums in zip(ctx.places, sums, strict=True):
            # The kernel's backward pass is shared out by key/value heads: one for each query head keeps all cores busy.
            k, v = (x[at].repeat_interleave(shared, 1) for x in (k_BKTN, v_BKTN))
            d_q_BHTN[at], d_k, d_v = _kernel_backward(d_y_BHTN[at], q_BHTN[at], k, v, y_BHTN[at], log_sums, 0.0, True)
            d_k_BKTN[at], d_v_BKTN[at] = (x.unflatten(1, (-1, shared)).sum(2) for x in (d_k, d_v))
        return *slopes, None


def _each_document(positions_BT: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """The place of every document in tensors (B, heads, T, N); neighbouring rows that are divided alike go together."""
    begins = [sorted({0, *row.nonzero().flatten().tolist()}) for row in positions_BT == 0]
    end = 0
    for places, rows in groupby(begins):
        first, end = end, end + len(list(rows))
        for begin, following in pairwise([*places, positions_BT.shape[1]]):
            yield slice(first, end), slice(None), slice(begin, following)


BLOCK = 128
"""Queries of a block: with fewer the products are small, with more they hold more of what no query may see."""

BLOCK_SCORES = 2**20
"""Scores of a block at most, unless one row has more: about what the caches of a core or two hold."""


@dataclass(frozen=True)
class _Block:
    """Some queries of some rows, and the keys that one of them may see."""

    rows: slice
    queries: slice
    keys: slice
    bias: Tensor
    """(rows or 1, 1, queries, the last of the keys): minus infinity where a query may not see a key, otherwise 0."""

    def of_queries(self, x_BHTN: Tensor) -> Tensor:
        return x_BHTN[self.rows, :, self.queries]

    def of_keys(self, x_BKTN: Tensor) -> Tensor:
        return x_BKTN[self.rows, :, self.keys]

    def matrices(self, q_BHTN: Tensor, k_BKTN: Tensor, v_BKTN: Tensor) -> Iterator[Tensor]:
        """Queries, keys and values, see :func:`_matrices`."""
        parts = self.of_queries(q_BHTN), self.of_keys(k_BKTN), self.of_keys(v_BKTN)
        return (_matrices(x, k_BKTN.shape[1]) for x in parts)


@torch.compiler.disable  # where documents end is data: it would be compiled anew for every batch
def _attend_in_blocks(q_BHTN: Tensor, k_BKTN: Tensor, v_BKTN: Tensor, positions_BT: Tensor | None) -> Tensor:
    return cast(Tensor, _InBlocks.apply(q_BHTN, k_BKTN, v_BKTN, positions_BT))


class _InBlocks(torch.autograd.Function):
    """Attention on a CPU in bf16, by products of a block of queries with the keys that it may see.

    Torch's kernel multiplies at a tenth of the rate of a large product in bf16, products of a hundred rows at half of
    it. They are of several rows and all heads at once; query heads that share their keys stand in one matrix. The
    backward pass computes the weights again.
    """

    @staticmethod
    def forward(ctx: Any, q_BHTN: Tensor, k_BKTN: Tensor, v_BKTN: Tensor, positions_BT: Tensor | None) -> Tensor:
        B, H, T, N = q_BHTN.shape
        y_BHTN = q_BHTN.new_empty(B, T, H, N).transpose(1, 2)  # as the products around it have their heads
        for block in _each_block(q_BHTN, positions_BT):
            q, k, v = block.matrices(q_BHTN, k_BKTN, v_BKTN)
            y = block.of_queries(y_BHTN)
            y.copy_((_weights(q, k, block) @ v).view(y.shape))
        ctx.save_for_backward(q_BHTN, k_BKTN, v_BKTN, positions_BT)
        return y_BHTN

    @staticmethod
    def backward(ctx: Any, d_y_BHTN: Tensor) -> Any:
        q_BHTN, k_BKTN, v_BKTN, positions_BT = ctx.saved_tensors
        d_q_BHTN = torch.empty_like(q_BHTN)
        d_k_BKTN, d_v_BKTN = (torch.zeros_like(x, dtype=torch.float32) for x in (k_BKTN, v_BKTN))
        scale = q_BHTN.shape[-1] ** -0.5
        for block in _each_block(q_BHTN, positions_BT):
            q, k, v = block.matrices(q_BHTN, k_BKTN, v_BKTN)
            d_y = _matrices(block.of_queries(d_y_BHTN), k_BKTN.shape[1])
            weights = _weights(q, k, block)
            d_scores = torch._softmax_backward_data(d_y @ v.mT, weights, -1, weights.dtype)
            d_q, d_k, d_v = block.of_queries(d_q_BHTN), block.of_keys(d_k_BKTN), block.of_keys(d_v_BKTN)
            d_q.copy_(_product(d_scores, k, scale).view(d_q.shape))
            d_k += _product(d_scores.mT, q, scale).view(d_k.shape)
            d_v += (weights.mT @ d_y).view(d_v.shape)
        return d_q_BHTN, d_k_BKTN.to(k_BKTN.dtype), d_v_BKTN.to(v_BKTN.dtype), None


def _each_block(q_BHTN: Tensor, positions_BT: Tensor | None) -> Iterator[_Block]:
    B, H, T, _ = q_BHTN.shape
    begins_BT = None if positions_BT is None else _begins(positions_BT)
    together = max(1, BLOCK_SCORES // (H * BLOCK * T))
    for row in range(0, B, together):
        rows = slice(row, min(row + together, B))
        for query in range(0, T, BLOCK):
            queries = slice(query, min(query + BLOCK, T))
            if begins_BT is None:
                yield _Block(rows, queries, slice(0, queries.stop), _causal(queries.stop - query, q_BHTN.dtype))
            else:
                yield _block_of_documents(rows, queries, begins_BT[rows, queries], q_BHTN.dtype)


def _begins(positions_BT: Tensor) -> Tensor:
    """The place in its row at which each token's document begins."""
    places = torch.arange(positions_BT.shape[1])
    return torch.where(positions_BT == 0, places, 0).cummax(1).values


@cache
def _causal(length: int, dtype: torch.dtype) -> Tensor:
    return torch.full((1, 1, length, length), -torch.inf, dtype=dtype).triu(1)


def _block_of_documents(rows: slice, queries: slice, begins: Tensor, dtype: torch.dtype) -> _Block:
    first = int(begins.min())
    keys = slice(first, queries.stop)
    if int(begins.max()) == first:  # one document: only the keys beside the queries need a mask
        return _Block(rows, queries, keys, _causal(queries.stop - queries.start, dtype))
    places = torch.arange(first, queries.stop)
    hidden = (places > places[queries.start - first :, None]) | (places < begins[..., None])
    return _Block(rows, queries, keys, torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)[:, None])


def _matrices(x: Tensor, groups: int) -> Tensor:
    """A matrix for each row and group of heads that share their keys, the heads of a group one below the other."""
    return x.reshape(len(x) * groups, -1, x.shape[-1])


def _weights(q: Tensor, k: Tensor, block: _Block) -> Tensor:
    """Of the keys for every query, in its dtype; torch computes the softmax in fp32."""
    scores = _product(q, k.mT, q.shape[-1] ** -0.5)
    rows, queries = block.rows.stop - block.rows.start, block.queries.stop - block.queries.start
    scores.view(rows, -1, queries, scores.shape[-1])[..., -block.bias.shape[-1] :] += block.bias
    return scores.softmax(-1)


def _product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale · a @ b in one pass."""
    return torch.baddbmm(a.new_empty(()), a, b, beta=0, alpha=scale)
