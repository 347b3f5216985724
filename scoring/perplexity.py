"""Perplexity on the validation part of C4, by two protocols, and bits per byte.

Packed: whole documents, [begin] text [end], laid end to end in rows; attention stays inside each document. It is what
training reports as its validation loss. GaLore's (arXiv:2403.03507): one document a row, cut after 256 tokens. Its
published tables are of one tokenizer, T5's of 32,000 tokens, and perplexities of different tokenizers cannot be
compared. Bits per byte can.

Shapes: B rows, T tokens in a row, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import UserError
from data.packing import IGNORE, Array, Batch, make_batch, one_a_row, pack
from data.prepared import PreparedSource
from data.sources import TextSource, open_source
from data.validation import held_out_texts
from models.foreign import visible

GALORE_LENGTH = 256
"""Tokens that are kept of a document."""

GALORE_TOKENS = 10_000_000
"""Tokens of C4's validation part that GaLore's script reads."""

PACKED_LENGTH = 1_024
"""The longest row of packed documents, where the model's context allows it."""

LOGITS = 2**28
"""Logits that exist at one time: 1 GiB in fp32."""

Progress = Callable[[int, int], None]
"""Takes how many tokens are done, and of how many."""


@dataclass(frozen=True)
class Perplexity:
    """The loss by one protocol."""

    loss: float
    """Mean negative log-likelihood of a predicted token, in nats."""
    tokens: int
    """Tokens that were predicted."""
    documents: int
    length: int
    """The longest row, in tokens."""

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where no float holds it."""
        return math.inf if self.loss > 700 else math.exp(self.loss)


@dataclass(frozen=True)
class C4Report:
    """What :func:`c4` found."""

    source: str
    """Where the text is from."""
    packed: Perplexity
    galore: Perplexity
    bits_per_byte: float
    """Bits that the packed documents cost, end tokens included, for each byte of their text in UTF-8."""
    text_bytes: int
    notes: tuple[str, ...]
    """Where this is not the protocol as published."""


@dataclass(frozen=True)
class _Documents:
    """Token ids of whole documents, [begin] text [end]."""

    ids: list[Array]
    text_bytes: int


@torch.inference_mode()
def c4(
    model: Any,
    tokenizer: Any,
    data: str | Path = "c4",
    *,
    tokens: int = GALORE_TOKENS,
    device: torch.device | None = None,
    progress: Progress | None = None,
) -> C4Report:
    """Perplexity and bits per byte of a model on held-out documents.

    GaLore's own script adds up the mean loss of each batch and divides by one more than the batches there were, which
    makes its figure slightly too good; that is not followed, nor the mean of means: here the loss of all tokens is
    divided by their number. As its tokenizer has no begin token, its first token of a text is never predicted; where a
    tokenizer has one, the first token counts here too. T5's tokenizer closes a cut text with its end token; here a cut
    text has none. The script shuffles by way of a buffer; here documents are read in the order of the source, which C4
    has shuffled already.

    Args:
        model: one of transformers' causal language models in evaluation mode.
        tokenizer: its tokenizer, with an end token.
        data: a source of text: c4 (on the hub), c4:LANGUAGE, sample, or a folder in C4's layout.
        tokens: read documents until they have so many, for each protocol.
        device: where the model is; by default what it says.
        progress: told after each forward pass.

    Raises:
        UserError: there is no such source, it holds tokens and no text, or no held-out document.
    """
    source = open_source(str(data))
    if isinstance(source, PreparedSource):
        raise UserError(
            f"{source.name} holds prepared tokens; perplexity is measured on text: give {source.origin} instead"
        )
    place = device or model.device
    context = getattr(model.config, "max_position_embeddings", None) or PACKED_LENGTH
    length, cut = min(PACKED_LENGTH, context), min(GALORE_LENGTH, context)
    whole = _read(source, tokenizer, tokens, None)
    short = _read(source, tokenizer, tokens, cut)
    packed = make_batch(pack(whole.ids, length, tokenizer.eos_token_id), tokenizer.eos_token_id)
    longest = max(1, *map(len, short.ids))
    rows = make_batch(one_a_row(short.ids, longest, tokenizer.eos_token_id), tokenizer.eos_token_id, "padded")
    counter = _Counter(packed.target_count + rows.target_count, progress)
    packed_nats = _nats(model, packed, place, counter, documents=True)
    galore_nats = _nats(model, rows, place, counter, documents=False)
    return C4Report(
        source=source.origin,
        packed=Perplexity(packed_nats / packed.target_count, packed.target_count, len(whole.ids), length),
        galore=Perplexity(galore_nats / rows.target_count, rows.target_count, len(short.ids), cut),
        bits_per_byte=packed_nats / math.log(2) / whole.text_bytes,
        text_bytes=whole.text_bytes,
        notes=tuple(_notes(source, sum(map(len, short.ids)), cut)),
    )


def _notes(source: TextSource, read: int, cut: int) -> Iterator[str]:
    """What differs from the protocol."""
    if source.name != "c4" and source.name != "c4:en":
        yield f"the text is {source.name}"
    if read < GALORE_TOKENS:
        yield f"GaLore's protocol reads {GALORE_TOKENS:,} tokens; {read:,} were read"
    if cut < GALORE_LENGTH:
        yield f"GaLore's protocol keeps {GALORE_LENGTH} tokens of a document; the model's context is {cut}"


def _read(source: TextSource, tokenizer: Any, tokens: int, cut: int | None) -> _Documents:
    """Held-out documents until they have ``tokens`` tokens, each cut after ``cut``."""
    texts = held_out_texts(source)
    ids: list[Array] = []
    count = text_bytes = 0
    while count < tokens and (some := list(islice(texts, 64))):
        for text, document in zip(some, _encode(tokenizer, some), strict=True):
            ids.append(document[:cut])
            count += len(ids[-1])
            text_bytes += len(text.encode())
            if count >= tokens:
                break
    if not ids:
        raise UserError(
            f"{source.name} holds no validation text: it has no shard with 'validation' in its name, and is too small "
            "for one document in 200 to be held out. Give c4, or a folder with such a shard"
        )
    return _Documents(ids, text_bytes)


def _encode(tokenizer: Any, texts: list[str]) -> Iterator[Array]:
    """Ids of documents as training has them: [begin] text [end], the begin token where the tokenizer has one."""
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    # Text that spells a special token stays text; and a document may be longer than the model's context.
    encoded = tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    for ids in encoded:
        yield np.array([*begin, *ids, tokenizer.eos_token_id], dtype=np.uint32)


def _nats(model: Any, batch: Batch, device: torch.device, counter: "_Counter", *, documents: bool) -> float:
    """The summed negative log-likelihood of all targets.

    Args:
        model: called as transformers' are.
        batch: all rows.
        device: where the model is.
        counter: told how many tokens are done.
        documents: whether a row holds several, which attention must not cross.
    """
    total = 0.0
    rows = max(1, min(64, LOGITS // (batch.inputs.shape[1] * model.config.vocab_size)))
    for start in range(0, len(batch.inputs), rows):
        inputs_BT, targets_BT, positions_BT = (
            torch.from_numpy(part[start : start + rows].copy()).to(device)
            for part in (batch.inputs, batch.targets, batch.positions)
        )
        mask = visible(positions_BT, model.dtype) if documents else None
        logits_BTV: Tensor = model(
            input_ids=inputs_BT, attention_mask=mask, position_ids=positions_BT, use_cache=False
        ).logits
        losses = F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten(), reduction="none")
        total += losses.double().sum().item()
        counter.add(int((targets_BT != IGNORE).sum()))
    return total


class _Counter:
    """Tells how many tokens are done."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._done, self._total, self._progress = 0, total, progress

    def add(self, tokens: int) -> None:
        """So many more are done."""
        self._done += tokens
        if self._progress is not None:
            self._progress(self._done, self._total)
