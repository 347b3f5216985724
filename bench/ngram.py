"""Unigram and bigram baselines of a corpus: what a model has to beat.

    python bench/ngram.py --data sample --tokenizer runs/demo/tokenizer
    python bench/ngram.py --data DIR --tokenizer DIR --tokens 1200000 --eval-tokens 100000

Counts pairs of tokens in the training documents and predicts the held-out text that training validates
on, by its convention: every token of a document but the first is predicted, the end token too, and bits
per byte are over the bytes of the text. The bigram is interpolated Kneser-Ney with one discount
(Kneser and Ney 1995; Chen and Goodman 1998), the unigram adds one to every count.
"""

import argparse
import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout that is not installed

from common.command import run_command
from data.packing import IGNORE, Array, make_batch
from data.prepared import PreparedSource
from data.sources import TextSource, held_out, lines, open_source, text_of
from data.tokenizer import Tokenizer
from data.validation import HeldOut, read_held_out

CHUNK = 2**22
"""Pairs that are sorted at a time."""


@dataclass(frozen=True)
class Ngrams:
    """Counts of pairs of tokens, and the probabilities that follow from them."""

    vocab: int
    pairs: Array
    """first · vocab + second of every pair seen, in order."""
    counts: Array
    """How often each was seen."""

    @classmethod
    def count(cls, documents: Iterable[Array], vocab: int) -> "Ngrams":
        """Count the pairs within documents."""
        none = np.empty(0, dtype=np.int64)
        pairs, counts, waiting, size = none, none, [], 0
        for document in documents:
            ids = document.astype(np.int64)
            waiting.append(ids[:-1] * vocab + ids[1:])
            size += len(waiting[-1])
            if size >= CHUNK:
                pairs, counts = _merge(pairs, counts, np.concatenate(waiting))
                waiting, size = [], 0
        pairs, counts = _merge(pairs, counts, np.concatenate([none, *waiting]))
        return cls(vocab, pairs, counts)

    def unigram(self, second: Array) -> Array:
        """Probability of tokens, one added to every count."""
        counts = np.bincount(self.pairs % self.vocab, self.counts, self.vocab) + 1
        return (counts / counts.sum())[second]

    def bigram(self, first: Array, second: Array) -> Array:
        """Probability of ``second`` after ``first``: what discounting saves goes to the continuations.

        A continuation counts the different tokens that a token follows; discounted too, and what that
        saves goes to all tokens alike.
        """
        once, twice = (np.count_nonzero(self.counts == times) for times in (1, 2))
        discount = once / (once + 2 * twice) if twice else 0.5
        followed = np.bincount(self.pairs % self.vocab, minlength=self.vocab)
        kinds = max(len(self.pairs), 1)
        continuation = np.maximum(followed - discount, 0) / kinds
        continuation += (1 - continuation.sum()) / self.vocab

        seen = np.bincount(self.pairs // self.vocab, self.counts, self.vocab)[first]
        followers = np.bincount(self.pairs // self.vocab, minlength=self.vocab)[first]
        wanted = first.astype(np.int64) * self.vocab + second
        place = np.minimum(np.searchsorted(self.pairs, wanted), len(self.pairs) - 1)
        together = np.where(self.pairs[place] == wanted, self.counts[place], 0)
        kept = np.maximum(together - discount, 0) / np.maximum(seen, 1)
        saved = np.where(seen > 0, discount * followers / np.maximum(seen, 1), 1)
        return kept + saved * continuation[second]


def _merge(pairs: Array, counts: Array, more: Array) -> tuple[Array, Array]:
    """Sorted pairs with their counts, and some more pairs."""
    new, times = np.unique(more, return_counts=True)
    merged, place = np.unique(np.concatenate([pairs, new]), return_inverse=True)
    return merged, np.bincount(place, np.concatenate([counts, times]), len(merged)).astype(np.int64)


def training_documents(source: TextSource | PreparedSource, tokenizer: Tokenizer) -> Iterator[Array]:
    """The tokens of every training document, shard after shard."""
    if isinstance(source, PreparedSource):
        for prepared in source.train:
            for start, stop in pairwise(prepared.bounds().tolist()):
                yield prepared.tokens(start, stop)
        return
    for shard in source.train:
        texts = (text_of(line, shard, number) for number, line in enumerate(lines(shard), 1))
        kept = (text for text in texts if text and not (source.holds_out and held_out(text)))
        while batch := list(islice(kept, 256)):
            yield from tokenizer.encode_documents(batch)


def first_tokens(documents: Iterable[Array], tokens: int | None) -> Iterator[Array]:
    """Documents until they have so many tokens; None: all."""
    count = 0
    for document in documents:
        if tokens is not None and count >= tokens:
            return
        count += len(document)
        yield document


def predicted(held: HeldOut, end: int) -> tuple[Array, Array]:
    """The tokens that are predicted, each with the one before it: (first, second)."""
    batch = make_batch(held.rows, end)
    counted = batch.targets != IGNORE
    return batch.inputs[counted], batch.targets[counted]


def loss_and_bits(probabilities: Array, text_bytes: int) -> tuple[float, float]:
    """Nats a token, and bits per byte of text."""
    nll = float(-np.log(probabilities).sum())
    return nll / len(probabilities), nll / math.log(2) / text_bytes


def main() -> None:
    """Count, predict and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a source of train.py: c4, sample, a folder")
    parser.add_argument("--tokenizer", required=True, type=Path, help="a tokenizer's folder")
    parser.add_argument("--tokens", type=int, help="training tokens to count; default: all")
    parser.add_argument("--eval-tokens", type=int, default=500_000, help="as --eval.tokens of train.py")
    args = parser.parse_args()
    source, tokenizer = open_source(args.data), Tokenizer(args.tokenizer)
    held = read_held_out(source, tokenizer, 1024, args.eval_tokens)
    first, second = predicted(held, tokenizer.end)
    ngrams = Ngrams.count(first_tokens(training_documents(source, tokenizer), args.tokens), tokenizer.vocab_size)

    print(f"{source.name}, vocabulary {tokenizer.vocab_size:,}")
    print(f"counted {ngrams.counts.sum():,} pairs, {len(ngrams.pairs):,} different ones")
    print(f"predicted {len(second):,} tokens, {held.text_bytes:,} bytes in {held.documents:,} held-out documents\n")
    print(f"{'':<10} {'nats/token':>10} {'bits/byte':>10}")
    for name, probabilities in (("unigram", ngrams.unigram(second)), ("bigram", ngrams.bigram(first, second))):
        loss, bits = loss_and_bits(probabilities, held.text_bytes)
        print(f"{name:<10} {loss:>10.4f} {bits:>10.4f}")


if __name__ == "__main__":
    run_command(main)
