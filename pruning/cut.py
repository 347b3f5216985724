"""The tensors of one block cut to the units that stay.

Letters: N head width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pruning.blocks import Parts


@dataclass(frozen=True)
class Kept:
    """The units of a block that stay, in their old order; a key/value head with ``each`` of its query heads."""

    ffn: Sequence[int]
    heads: Sequence[int]
    kv_heads: Sequence[int]


def cut(tensors: dict[str, Tensor], parts: Parts, kept: Kept, head_width: int) -> dict[str, Tensor]:
    """The weights of a block with the units that stay alone.

    Args:
        tensors: the weights by their names inside the block.
        parts: what the architecture calls them.
        kept: what stays.
        head_width: N.
    """
    queries, keys = _columns(kept.heads, head_width), _columns(kept.kv_heads, head_width)
    ffn = torch.tensor(kept.ffn)
    rows = {parts.queries: queries} | dict.fromkeys(parts.keys_values, keys) | dict.fromkeys(parts.ffn_in, ffn)
    columns = {parts.attention_out: queries, parts.ffn_out: ffn}
    small = {}
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        if module in rows:
            tensor = tensor.index_select(0, rows[module])
        elif module in columns and kind == "weight":
            tensor = tensor.index_select(1, columns[module])
        small[name] = tensor
    return small


def _columns(heads: Sequence[int], head_width: int) -> Tensor:
    """The units of some heads."""
    return (torch.tensor(heads)[:, None] * head_width + torch.arange(head_width)).flatten()


def cut_rows(matrix: Tensor, kept: Sequence[int]) -> Tensor:
    """The rows of an embedding (V, D), a head (V, D) or its bias (V,) that stay: (W, D) or (W,)."""
    return matrix.index_select(0, torch.tensor(kept, dtype=torch.long))
