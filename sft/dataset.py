"""The conversations of a run: read, compared with evaluation data, rendered, divided, and accounted for."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from common.console import Console
from common.errors import UserError
from data.chat import Conversation
from data.packing import Batch
from data.tokenizer import is_chinese
from sft.overlap import Match, Overlap
from sft.packing import Mixture, make_batch, pack, padding, target_count
from sft.rendering import Rendered, Renderer, show
from sft.settings import SftSettings
from sft.sources import Filter, Source, open_sources

BLOCK = 10_000
"""Conversations that are rendered at a time."""

TOO_LONG, REFUSED, OVERLAP = "too long", "refused by the chat template", "overlap with evaluation data"
"""Reasons to leave a conversation out."""


@dataclass(frozen=True)
class Dataset:
    """What a run trains on and is validated on."""

    sources: list[Source]
    train: list[list[Rendered]]
    """Of each source."""
    held_out: dict[str, list[Rendered]]
    """Of each language, over all sources; a language that has none is not there."""
    accounts: dict[str, dict[str, int]]
    """Of each source by name: how many rows are trained on, held out, and left out for each reason."""
    matches: list[Match] | None
    """What was found of evaluation data, one for each conversation left out for it; None: it was not looked for."""

    @property
    def fingerprints(self) -> dict[str, str]:
        """A hash of each source's tokens and of what of them is learned."""
        found = {}
        for source, train in zip(self.sources, self.train, strict=True):
            digest = xxhash.xxh3_128()
            for one in train:
                digest.update(one.ids.tobytes())
                digest.update(one.trained.tobytes())
            found[source.name] = digest.hexdigest()
        return found

    def mixture(self, seq_len: int, seed: int) -> Mixture:
        """The order in which a run sees them."""
        return Mixture(self.train, [source.weight for source in self.sources], seq_len, seed)

    def held_out_batch(self, language: str, seq_len: int, tokens: int) -> Batch:
        """The first held-out conversations of a language that have ``tokens`` tokens together, in rows."""
        chosen: list[Rendered] = []
        for one in self.held_out[language]:
            if chosen and sum(other.length for other in chosen) >= tokens:
                break
            chosen.append(one)
        rows = pack([one.length for one in chosen], seq_len)
        return make_batch([[chosen[index] for index in row] for row in rows], seq_len)

    def record(self) -> dict[str, Any]:
        """What became of the rows, for ``palmtop.json``."""
        if self.matches is None:
            return dict(self.accounts)
        return self.accounts | {"overlap": [vars(match) for match in self.matches[:20]]}


class KeepOut:
    """A filter that leaves out what shares words with evaluation data.

    Args:
        folder: of evaluation data.
    """

    def __init__(self, folder: Path) -> None:
        self.overlap = Overlap.of(folder)
        self.matches: list[Match] = []

    def __call__(self, conversations: Sequence[Conversation]) -> list[str | None]:
        """The reason to leave each out, or None."""
        texts = [one.text for one in conversations]
        reasons: list[str | None] = [None] * len(texts)
        for index in self.overlap.find(texts):
            reasons[index] = OVERLAP
            self.matches.append(self.overlap.matches(texts[index])[0])
        return reasons


def read_dataset(settings: SftSettings, renderer: Renderer, seq_len: int, console: Console) -> Dataset:
    """Read, render and divide the conversations, and say what became of every row.

    Args:
        settings: as given.
        renderer: of the model's tokenizer.
        seq_len: positions in a row, the most that a conversation may take.
        console: where to say it.

    Raises:
        UserError: as :func:`sft.sources.open_sources`; or no conversation of a source fits into a row.
    """
    began = time.perf_counter()
    keep_out = KeepOut(Path(settings.keep_out)) if settings.keep_out is not None else None
    filters: list[Filter] = [renderer.misfits] if keep_out is None else [renderer.misfits, keep_out]
    sources = open_sources(settings.data, filters)
    train: list[list[Rendered]] = []
    held_out: dict[str, list[Rendered]] = {"en": [], "zh": []}
    accounts: dict[str, dict[str, int]] = {}
    for source in sources:
        train.append(_fitting(source, source.train, renderer, seq_len, console))
        kept = sum(map(len, held_out.values()))
        for language, found in held_out.items():
            ours = [one for one in source.held_out if is_chinese(one.text) == (language == "zh")]
            found += _fitting(source, ours, renderer, seq_len, console)
        held = sum(map(len, held_out.values())) - kept
        accounts[source.name] = {"trained on": len(train[-1]), "held out": held, **source.dropped}
        if not train[-1]:
            longer = f"none fits into {seq_len} tokens; give a larger --seq-len"
            raise UserError(f"{source.name} holds nothing to train on: {longer if source.train else 'all is held out'}")
    matches = None if keep_out is None else keep_out.matches
    if keep_out is not None:
        console.say(
            f"compared with {len(keep_out.overlap):,} questions of {settings.keep_out}; {keep_out.overlap.too_short:,} "
            "more are too short to be told from ordinary phrases"
        )
    there = {name: found for name, found in held_out.items() if found}
    dataset = Dataset(sources, train, there, accounts, matches)
    _report(dataset, settings, seq_len, time.perf_counter() - began, console)
    return dataset


def _fitting(
    source: Source, conversations: Sequence[Conversation], renderer: Renderer, seq_len: int, console: Console
) -> list[Rendered]:
    """Render conversations; those that are too long for a row are counted."""
    fitting: list[Rendered] = []
    total = len(conversations)
    if total > BLOCK:
        console.start(total, 0)
    try:
        for start in range(0, total, BLOCK):
            rendered = renderer.render(conversations[start : start + BLOCK])
            fitting += [one for one in rendered if one is not None and one.length <= seq_len]
            source.dropped.update(REFUSED for one in rendered if one is None)
            source.dropped.update(TOO_LONG for one in rendered if one is not None and one.length > seq_len)
            if total > BLOCK:
                console.progress(start + len(rendered), total, {"rendering": source.name})
    finally:
        console.stop()
    return fitting


def _report(dataset: Dataset, settings: SftSettings, seq_len: int, seconds: float, console: Console) -> None:
    for name, account in dataset.accounts.items():
        console.say(f"{name}: {', '.join(f'{count:,} {what}' for what, count in account.items())}")
    rows = dataset.mixture(seq_len, settings.seed).epoch(0)
    tokens = sum(len(one.ids) for part in (*dataset.train, *dataset.held_out.values()) for one in part)
    console.say(
        f"{tokens:,} tokens in {seconds:.0f} s, {tokens / seconds:,.0f} a second; an epoch is {len(rows):,} rows of "
        f"{seq_len}, {padding(rows, seq_len):.2%} of them padding, with {target_count(rows):,} tokens that are learned"
    )
    if dataset.matches is None:
        console.say("not compared with evaluation data: --keep-out DIR leaves out what shares 13 words with it")
        return
    console.say(f"{len(dataset.matches):,} conversations share 13 words, or a whole shorter question, with them")
    for match in dataset.matches[:3]:
        console.say(f"  {match.file}: “{match.words}”".replace("\n", " "))


def show_conversations(dataset: Dataset, renderer: Renderer, count: int, console: Console) -> None:
    """Print the first conversations of every source, token by token."""
    for source, train in zip(dataset.sources, dataset.train, strict=True):
        console.say(f"\n{source.name}: tokens behind + are learned, those behind - are not")
        for rendered in train[:count]:
            console.say("\n" + show(rendered, renderer.tokenizer))
