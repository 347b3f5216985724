"""The keys and values of a batch's tokens, in memory that is taken once.

transformers' own cache copies all of it for every token that is added, and again for every row that leaves. Here a
token is written where there is room for it, and a row that leaves is overwritten by the last one.

Shapes: B batch, K key/value heads, T new tokens, S tokens so far, N head width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from common.errors import UserError

Prefix = list[tuple[Tensor, Tensor]]
"""Keys and values (1, K, S, N) of each layer for tokens that many prompts begin with."""


class BatchCache(Cache):
    """Room for some rows of some tokens in every layer.

    Args:
        layers: of the model.
        rows: at the beginning.
        capacity: tokens of a row.
        prefix: what every row begins with.
    """

    def __init__(self, layers: int, rows: int, capacity: int, prefix: Prefix | None = None) -> None:
        self._own = [_Layer(capacity) for _ in range(layers)]
        super().__init__(layers=list(self._own))
        for layer, (keys, values) in zip(self._own, prefix or [], strict=bool(prefix)):
            layer.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1))

    def keep_rows(self, kept: Sequence[int]) -> None:
        """Row i is what row ``kept[i]`` was; the others are gone."""
        for layer in self._own:
            layer.keep_rows(kept)

    def as_prefix(self) -> Prefix:
        """What is held for the first row."""
        return [layer.first_row() for layer in self._own]


class _Layer(CacheLayerMixin):
    """One layer's keys and values: buffers (B, K, capacity, N) of which the first rows and tokens count.

    It holds every token also for a layer that attends in a sliding window, which the mask sees to.
    """

    is_sliding = False

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity, self.rows, self.length = capacity, 0, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take the memory, of the dtype and on the device of the first tokens."""
        self.rows = key_states.shape[0]
        self._keys, self._values = self._room(key_states), self._room(value_states)
        self.is_initialized = True

    def _room(self, states_BKTN: Tensor) -> Tensor:
        B, K, _, N = states_BKTN.shape
        return states_BKTN.new_empty(B, K, self.capacity, N)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add the tokens of (B, K, T, N) and return views (B, K, S, N) of all so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before, self.length = self.length, self.length + key_states.shape[2]
        self._keys[: self.rows, :, before : self.length] = key_states
        self._values[: self.rows, :, before : self.length] = value_states
        return self._keys[: self.rows, :, : self.length], self._values[: self.rows, :, : self.length]

    def first_row(self) -> tuple[Tensor, Tensor]:
        """Its keys and values (1, K, S, N)."""
        return self._keys[:1, :, : self.length], self._values[:1, :, : self.length]

    def keep_rows(self, kept: Sequence[int]) -> None:
        """See :meth:`BatchCache.keep_rows`."""
        moved = [(new, old) for new, old in enumerate(kept) if new != old]
        for buffer in (self._keys, self._values):
            for new, old in moved:
                buffer[new, :, : self.length] = buffer[old, :, : self.length]
        self.rows = len(kept)

    def get_seq_length(self) -> int:
        """Tokens so far."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many tokens the mask of the next ones covers, and from which on."""
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        """The most tokens."""
        return self.capacity


def attention_layers(model: Any) -> tuple[int, bool]:
    """How many layers a model keeps keys and values for, and whether some of them attend in a sliding window.

    Raises:
        UserError: it keeps anything else.
    """
    kinds = [type(layer) for layer in DynamicCache(config=model.config).layers]
    if not kinds or not set(kinds) <= {DynamicLayer, DynamicSlidingWindowLayer}:
        raise UserError(
            f"{type(model).__name__} has layers that are no plain attention, which the transformers engine does not "
            "batch; score it with --engine vllm"
        )
    return len(kinds), DynamicSlidingWindowLayer in kinds


def last_logits(model: Any, ids_BT: Tensor, mask_BS: Tensor, cache: BatchCache | None, kept: int = 1) -> Tensor:
    """Logits (B, kept, V) in fp32 of the last tokens; the tokens themselves go into the cache.

    Args:
        model: transformers' own.
        ids_BT: new tokens, padded on the left.
        mask_BS: 1 for every token so far, the new ones included, and 0 for padding.
        cache: of the tokens before; None: there are none, and none come later.
        kept: how many tokens' logits.
    """
    positions_BS = (mask_BS.cumsum(1) - 1).clamp(min=0)
    out = model(
        input_ids=ids_BT,
        attention_mask=mask_BS,
        position_ids=positions_BS[:, -ids_BT.shape[1] :],
        past_key_values=cache,
        use_cache=cache is not None,
        logits_to_keep=kept,
    )
    logits: Tensor = out.logits[:, -kept:].to(torch.float32)
    return logits
