"""How likely a model finds texts: what multiple choice and perplexity are scored by.

The conventions are lm-evaluation-harness's: where a context ends and its continuation begins in tokens, what an empty
context is, how long texts are cut.

Shapes: B batch, T sequence, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from common.console import Console
from scoring.batches import pad_left
from scoring.cached import last_logits
from scoring.generation import beginning, context_of, evaluating
from scoring.progress import Progress

BATCH_TOKENS = {"cpu": 2_048, "cuda": 16_384}
"""Tokens in a forward pass, padding included; a longer row goes alone."""

LOGIT_TOKENS = {"cpu": 1_024, "cuda": 4_096}
"""Tokens of it whose logits exist, each one of V in fp32."""

TEXTS = "likelihoods"
"""What progress is shown of."""

Pair = tuple[list[int], list[int]]
"""Tokens of a context, at least one, and those of its continuation."""


Rows = dict[tuple[int, ...], list[tuple[int, list[int]]]]
"""What the model is shown, each with the places of the pairs that it is for and their continuations."""


class Likelihoods:
    """Log-likelihoods by transformers' model.

    Args:
        model: transformers' own.
        tokenizer: the model's.
        max_length: tokens that the model is shown. Default: its context.
        console: where progress is shown; None shows none.
    """

    def __init__(
        self, model: Any, tokenizer: Any, max_length: int | None = None, console: Console | None = None
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.max_length = max_length or context_of(model)
        self._console = console or Console(rank=1)

    def of_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """ln p(continuation | context) of each (context, continuation), and whether each token is the likeliest."""
        return self.of_tokens([self._encode_pair(context, continuation) for context, continuation in pairs])

    def of_texts(self, texts: Sequence[str]) -> list[float]:
        """ln p of each whole text, every token predicted once; long texts in windows of the longest length."""
        windows = [(index, pair) for index, text in enumerate(texts) for pair in self._windows(text)]
        totals = [0.0] * len(texts)
        found = self.of_tokens([pair for _, pair in windows])
        for (index, _), (value, _) in zip(windows, found, strict=True):
            totals[index] += value
        return totals

    def of_tokens(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """As :meth:`of_pairs`, of tokens; what is too long is cut from the left.

        Continuations of one token that share their context, such as the letters of a multiple choice, share a row.
        """
        rows: Rows = {}
        for index, (context, continuation) in enumerate(pairs):
            if not continuation:  # certain
                continue
            ids = tuple((context + continuation)[-(self.max_length + 1) : -1])
            rows.setdefault(ids, []).append((index, continuation[-len(ids) :]))
        found: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
        texts = [TEXTS] * sum(map(len, rows.values()))
        with Progress(self._console, texts) as progress, evaluating(self.model):
            for batch in self._batches(rows):
                logits_BTV = self._last_logits(batch, max(len(own) for ids in batch for _, own in rows[ids]))
                for logits_TV, ids in zip(logits_BTV, batch, strict=True):
                    for index, continuation in rows[ids]:
                        found[index] = likelihood(logits_TV, continuation)
                    progress.add(TEXTS, len(rows[ids]))
        return found

    def _batches(self, rows: Rows) -> Iterator[list[tuple[int, ...]]]:
        """The rows by length, the longest first, as many at a time as fit."""
        device = self.model.device.type
        tokens, logits = BATCH_TOKENS.get(device, 2_048), LOGIT_TOKENS.get(device, 1_024)
        batch: list[tuple[int, ...]] = []
        kept = 0
        for ids in sorted(rows, key=lambda ids: (-len(ids), ids)):
            own = max(len(continuation) for _, continuation in rows[ids])
            size = len(batch) + 1
            if batch and (size * len(batch[0]) > tokens or size * max(kept, own) > logits):
                yield batch
                batch, kept = [], 0
            batch.append(ids)
            kept = max(kept, own)
        if batch:
            yield batch

    def _last_logits(self, batch: Sequence[Sequence[int]], kept: int) -> Tensor:
        ids_BT, mask_BT = pad_left(batch, self.tokenizer.pad_token_id or 0, self.model.device)
        return last_logits(self.model, ids_BT, mask_BT, None, kept)

    def _encode_pair(self, context: str, continuation: str) -> Pair:
        if not context:
            ids, first = self._encode(continuation, special=False), beginning(self.tokenizer)
            return (ids[:1], ids[1:]) if ids[:1] == [first] else ([first], ids)
        # A token mostly begins with its space, so spaces at the end of the context belong to what follows.
        bare = context.rstrip()
        continuation, context = context[len(bare) :] + continuation, bare
        before = self._encode(context)
        return before or [beginning(self.tokenizer)], self._encode(context + continuation)[len(before) :]

    def _windows(self, text: str) -> Iterator[Pair]:
        ids, first = self._encode(text), beginning(self.tokenizer)
        yield from map(make_disjoint_window, get_rolling_token_windows(ids, first, self.max_length, context_len=1))

    def _encode(self, text: str, *, special: bool = True) -> list[int]:
        opened = text.startswith(self.tokenizer.decode([beginning(self.tokenizer)]))
        ids: list[int] = self.tokenizer(text, add_special_tokens=special and not opened)["input_ids"]
        return ids


def likelihood(logits_TV: Tensor, continuation: Sequence[int]) -> tuple[float, bool]:
    """Of the last tokens: the sum of their log-probabilities in nats, and whether each is the likeliest of all.

    Args:
        logits_TV: fp32; those before each token of the continuation are the last.
        continuation: at least one.
    """
    logits_TV = logits_TV[-len(continuation) :]
    chosen_T1 = logits_TV.new_tensor(continuation).long()[:, None]
    nats = logits_TV.gather(1, chosen_T1)[:, 0] - logits_TV.logsumexp(1)
    return float(nats.sum()), bool((logits_TV.argmax(1) == chosen_T1[:, 0]).all())
