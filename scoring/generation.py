"""Greedy answers to many prompts at once, as OpenCompass 0.3.1 gets them from transformers one batch at a time.

Prompts are cut from the left to the model's context, and no room is kept in it for the answer. What the prompts of a
task begin with, its demonstrations, is computed once and copied into every batch. A row whose answer has ended leaves
its batch at once, and the rest goes on the faster for it.

Shapes: B batch, T sequence, V vocabulary.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import RepetitionPenaltyLogitsProcessor

from common.errors import UserError
from scoring.batches import Batch, Plan, make_plan, pad_left
from scoring.cached import BatchCache, Prefix, attention_layers, last_logits
from scoring.requests import Keep, Key, Request

BATCH_SIZE = {"cpu": 16, "cuda": 64}
"""Default prompts in a batch."""

CHECK_EVERY = 8
"""Tokens between two looks at whether an answer decides its score already, for which it is decoded."""


@dataclass(frozen=True)
class GenerationSettings:
    """How answers are generated; all of it can decide what they are."""

    batch_size: int | None = None
    """Prompts in a batch. Default: 16 on a CPU, 64 on a GPU."""
    max_seq_len: int | None = None
    """Tokens that prompts are cut to. Default: the model's context."""
    chat: bool = False
    """The prompts are rendered chat templates: their special tokens stand in them, and the tokenizer's end token ends
    answers too."""
    early_stop: bool = True
    """Stop where the rest of an answer cannot change its score."""


class Generator:
    """transformers' model, answering in batches.

    Args:
        model: transformers' own; its generation configuration names end tokens and a repetition penalty, if any.
        tokenizer: the model's.
        settings: how.

    Raises:
        UserError: the model's layers are no plain attention.
    """

    def __init__(self, model: Any, tokenizer: Any, settings: GenerationSettings | None = None) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.settings = settings or GenerationSettings()
        self.batch_size = self.settings.batch_size or BATCH_SIZE.get(model.device.type, 16)
        self.limit = self.settings.max_seq_len or context_of(model)
        self._layers, slides = attention_layers(model)
        # Padding stands between a shared beginning and the rest, and a sliding window would count it.
        self._shares = not slides
        self._ends = end_tokens(model, tokenizer, chat=self.settings.chat)
        self._end_texts = sorted({tokenizer.decode([end]) for end in self._ends}) if self.settings.chat else []
        penalty = model.generation_config.repetition_penalty or 1.0
        self._penalty = RepetitionPenaltyLogitsProcessor(penalty) if penalty != 1.0 else None
        self._prefix: tuple[list[int], Prefix] = ([], [])

    @property
    def asked(self) -> dict[str, Any]:
        """What decides the answers besides the model's weights: kept with them, and compared when a run is resumed."""
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        where = {"device": self.model.device.type, "dtype": str(self.model.dtype).removeprefix("torch.")}
        sizes = {"batch_size": self.batch_size, "max_seq_len": self.limit}
        return {"engine": "transformers"} | asdict(self.settings) | sizes | where | versions

    def plan(self, requests: Sequence[Request]) -> Plan:
        """The batches of a run."""
        return make_plan(requests, self._encode(requests), self.batch_size, self.limit, self._shares)

    def generate(self, requests: Sequence[Request], keep: Keep) -> None:
        """Answer every request in planned batches, handing each answer to ``keep`` as its batch writes it."""
        self.follow(self.plan(requests), requests, keep)

    def follow(self, plan: Plan, requests: Sequence[Request], keep: Keep, done: Collection[Key] = ()) -> None:
        """Answer the requests of a plan.

        Args:
            plan: batches of the requests, all of them.
            requests: in any order.
            keep: gets the answers that are not yet there.
            done: keys of those that are. A batch with all its answers is left out; one with some is answered again
                whole, so that every row has the company it had.

        Raises:
            UserError: the GPU's memory cannot hold a batch.
        """
        ids, named = self._encode(requests), {request.key: request for request in requests}
        with evaluating(self.model):
            for batch in plan:
                if all(key in done for key in batch.keys):
                    continue
                for request, text in self._answers(batch, named, ids):
                    if request.key not in done:
                        keep(request, text)

    def _answers(
        self, batch: Batch, named: dict[Key, Request], ids: dict[Key, list[int]]
    ) -> Iterator[tuple[Request, str]]:
        rows = [_Row(named[key], ids[key]) for key in batch.keys]
        try:
            yield from self._write(rows, batch.prefix)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"a batch of {len(rows)} prompts of {len(rows[0].prompt):,} tokens does not fit the GPU's memory; "
                f"use a --batch-size below {self.batch_size} (another one begins the answers anew)"
            ) from error

    def _write(self, rows: list["_Row"], shared: int) -> Iterator[tuple[Request, str]]:
        """Add a token to every row until all have ended; yields answers as they end."""
        device = self.model.device
        prefix = self._prefix_of(rows[0].prompt[:shared]) if shared else None
        filling = self.tokenizer.pad_token_id or 0
        ids_BT, mask_BT = pad_left([row.prompt[shared:] for row in rows], filling, device)
        longest, most = shared + ids_BT.shape[1], max(row.request.max_new_tokens for row in rows)
        cache = BatchCache(self._layers, len(rows), longest + most, prefix)
        # One mask for the whole answer: what is not yet written is cut off where it is used.
        mask_BT = torch.cat([mask_BT.new_ones(len(rows), shared), mask_BT, mask_BT.new_ones(len(rows), most)], 1)
        for written in range(1, most + 1):
            logits_BV = last_logits(self.model, ids_BT, mask_BT[:, : longest + written - 1], cache)[:, -1]
            chosen_B = self._penalised(logits_BV, rows).argmax(-1)
            for row, token in zip(rows, chosen_B.tolist(), strict=True):
                row.written.append(token)
            over = [row.is_over(self._ends) or self._is_decided(row) for row in rows]
            if any(over):
                yield from ((row.request, self._text(row)) for row, ended in zip(rows, over, strict=True) if ended)
                kept = without(over)
                if not kept:
                    return
                rows = [rows[old] for old in kept]
                cache.keep_rows(kept)
                chosen_B, mask_BT = chosen_B[kept], mask_BT[kept]
            ids_BT = chosen_B[:, None]

    def _prefix_of(self, ids: list[int]) -> Prefix:
        """Keys and values of a beginning; those of the last one asked for are kept."""
        if self._prefix[0] != ids:
            self._prefix = ([], [])  # its memory first
            cache = BatchCache(self._layers, 1, len(ids))
            ids_BT, mask_BT = pad_left([ids], 0, self.model.device)
            last_logits(self.model, ids_BT, mask_BT, cache)
            self._prefix = (ids, cache.as_prefix())
        return self._prefix[1]

    def _penalised(self, logits_BV: Tensor, rows: Sequence["_Row"]) -> Tensor:
        if self._penalty is None:
            return logits_BV
        # A row at a time, for padding would be penalised as if it had been written.
        each = zip(rows, logits_BV, strict=True)
        ids = ((torch.tensor([row.prompt + row.written], device=logits_BV.device), logits) for row, logits in each)
        return torch.cat([self._penalty(ids_1T, logits_V[None]) for ids_1T, logits_V in ids])

    def _is_decided(self, row: "_Row") -> bool:
        if not self.settings.early_stop or len(row.written) % CHECK_EVERY:
            return False
        return row.request.finished(self._text(row).rstrip("\ufffd"))  # the bytes of a character still to come

    def _text(self, row: "_Row") -> str:
        """What was written as OpenCompass reads it: of a chat up to the text of an end token, else without specials."""
        text: str = self.tokenizer.decode(row.written, skip_special_tokens=not self.settings.chat)
        for end in self._end_texts:
            text = text.partition(end)[0]
        return text

    def _encode(self, requests: Sequence[Request]) -> dict[Key, list[int]]:
        """The tokens of each prompt, the last :attr:`limit` of them."""
        self.tokenizer.truncation_side = "left"
        found = self.tokenizer(
            [request.prompt for request in requests],
            add_special_tokens=not self.settings.chat,
            truncation=True,
            max_length=self.limit,
        )["input_ids"]
        highest, known = max(map(max, filter(None, found)), default=0), self.model.get_input_embeddings().num_embeddings
        if highest >= known:
            raise UserError(
                f"the tokenizer gives id {highest}, where the model knows {known:,}: they do not belong together"
            )
        opening = [beginning(self.tokenizer)]  # of an empty prompt
        return {request.key: ids or opening for request, ids in zip(requests, found, strict=True)}


@dataclass
class _Row:
    """A prompt and what was written after it."""

    request: Request
    prompt: list[int]
    written: list[int] = field(default_factory=list)

    def is_over(self, ends: Collection[int]) -> bool:
        return self.written[-1] in ends or len(self.written) == self.request.max_new_tokens


def without(over: Sequence[bool]) -> list[int]:
    """Which old row each new one is when some leave: the last ones fill the gaps, the others stay where they are."""
    stay = [row for row, ended in enumerate(over) if not ended]
    late = [row for row in stay if row >= len(stay)]
    return [row if not over[row] else late.pop() for row in range(len(stay))]


def end_tokens(model: Any, tokenizer: Any, *, chat: bool) -> set[int]:
    """Ids that end an answer: the generation configuration's, of a chat or where it has none also the tokenizer's."""
    named = model.generation_config.eos_token_id
    ends = {named} if isinstance(named, int) else set(named or [])
    return ends | {tokenizer.eos_token_id} if chat or not ends else ends


def beginning(tokenizer: Any) -> int:
    """The id that stands before a text that nothing else stands before."""
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return int(first)


def context_of(model: Any) -> int:
    """Tokens that a model can see; practically all, for one that names no limit."""
    named = (
        getattr(model.config, name, None) for name in ("max_position_embeddings", "seq_length", "model_max_length")
    )
    return next((int(limit) for limit in named if limit), 2**30)


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """A model in eval mode and without gradients; afterwards in the mode it was in.

    Not in inference mode: a model in training may keep a table that it makes here, and go backward through it later.
    """
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
