"""Causal attention that stays inside each document of a row, by the kernel that each device has for it.

Shapes: B batch, T sequence, H query heads, K key/value heads, N head width.
"""

from collections.abc import Iterator
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
    has no backward pass, the positions: each document is attended to by itself.
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
    """Attention on a CPU, one document after the other.

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
