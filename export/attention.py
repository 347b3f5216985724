"""CPU kernels of the paged KV cache. Letters as in export/kernels.py; L keys, P pages.

TVM's runtime keeps the pages and calls these functions, whose signatures are its own: it hands over tensors that we do
not need (offsets of rotations within attention, of which there are none here). Its own CPU kernels work on one number
at a time, on one thread. One sequence is served at a time.

Queries and keys are rotated when they enter the cache. Scores are in units of log 2, as the runtime expects of the sums
that it merges.
"""

import math
from collections.abc import Callable
from typing import Any

from tvm.tirx import PrimFunc
from tvm.tirx.script import builder as T

from export.kernels import (
    LANES,
    argument,
    at,
    constant,
    each_token,
    exp2,
    fill,
    kernel,
    registers,
    scratch,
    spans,
    store,
    summed,
    tree,
)
from export.matmul import TILE_COLUMNS, TILE_TOKENS, multiply_tile

PAGE = 16
"""Tokens of a page: what the runtime's helpers are written for."""

NOTHING = -1e30
"""A score of a key that is not looked at."""


def rotary_table(context: int, rotary: int) -> PrimFunc:
    """Frequencies (rotary / 2) to cosines and sines (context, rotary): all cosines of a position, then its sines."""

    def body() -> None:
        frequencies = argument("frequencies", (rotary // 2,))
        table = argument("table", (context, rotary))
        with T.parallel(context) as position, T.serial(rotary // 2) as i:
            angle = T.cast(position, "float32") * frequencies[i]
            store(table, T.cos(angle), position, i)
            store(table, T.sin(angle), position, rotary // 2 + i)

    return kernel("rotary_table", body)


def split_rotary(heads: int, kv_heads: int, width: int, rotary: int, context: int) -> PrimFunc:
    """Cut qkv (T, H + 2K, N) apart and rotate queries and keys: number i of a head with number i + rotary / 2."""
    half = rotary // 2

    def body() -> None:
        count = T.int32()
        qkv = argument("qkv", (count, heads + 2 * kv_heads, width))
        positions = argument("positions", (count,), "int32", offset=True)
        queries = argument("queries", (count, heads, width))
        keys = argument("keys", (count, kv_heads, width))
        values = argument("values", (count, kv_heads, width))
        table = argument("table", (context, rotary))

        def rotate(token: Any, source: Any, out: Any, head: Any) -> None:
            position = positions[token]
            for start, vectors, lanes in spans(half):
                with T.serial(vectors) as vector:
                    low, high = start + vector * lanes, half + start + vector * lanes
                    cosine, sine = table[position, at(low, lanes)], table[position, at(high, lanes)]
                    one, other = qkv[token, source, at(low, lanes)], qkv[token, source, at(high, lanes)]
                    store(out, one * cosine - other * sine, token, head, at(low, lanes))
                    store(out, other * cosine + one * sine, token, head, at(high, lanes))
            copy(token, source, out, head, rotary)

        def copy(token: Any, source: Any, out: Any, head: Any, first: int) -> None:
            for start, vectors, lanes in spans(width - first):
                with T.serial(vectors) as vector:
                    here = at(first + start + vector * lanes, lanes)
                    store(out, qkv[token, source, here], token, head, here)

        def row(token: Any) -> None:
            with T.serial(heads) as head:
                rotate(token, head, queries, head)
            with T.serial(kv_heads) as head:
                rotate(token, heads + head, keys, head)
                copy(token, heads + kv_heads + head, values, head, 0)

        each_token(count, row)

    return kernel("split_rotary", body)


def append(kv_heads: int, width: int) -> PrimFunc:
    """Put keys and values (T, K, N) into pages (P, 2, K, PAGE, N) at the given places."""

    def body() -> None:
        count = T.int32()
        pages = _pages(kv_heads, width)
        keys = argument("keys", (count, kv_heads, width))
        values = argument("values", (count, kv_heads, width))
        places = argument("places", (count,), "int32", offset=True)

        def row(token: Any) -> None:
            page, slot = places[token] // PAGE, places[token] % PAGE
            with T.serial(kv_heads) as head:
                for start, vectors, lanes in spans(width):
                    with T.serial(vectors) as vector:
                        here = at(start + vector * lanes, lanes)
                        store(pages, keys[token, head, here], page, 0, head, slot, here)
                        store(pages, values[token, head, here], page, 1, head, slot, here)

        each_token(count, row)

    return kernel("kv_append", body)


def _pages(kv_heads: int, width: int) -> Any:
    return argument("pages", (T.int32(), 2, kv_heads, PAGE, width))


def decode(heads: int, kv_heads: int, width: int) -> PrimFunc:
    """The attention of one token to all keys in its pages, its own among them."""

    def body() -> None:
        batch, used = T.int32(), T.int32()
        queries = argument("queries", (batch, heads, width))
        pages = _pages(kv_heads, width)
        page_ends = argument("page_ends", (batch + 1,), "int32", offset=True)
        page_of = argument("page_of", (used,), "int32", offset=True)
        last = argument("last", (batch,), "int32", offset=True)
        argument("key_offset", (batch,), "int32", offset=True)
        argument("positions", (batch,), "int32", offset=True)
        out = argument("out", (batch, heads, width))
        logsum = argument("logsum", (batch, heads))
        scale = _scalars()
        length = (page_ends[1] - page_ends[0] - 1) * PAGE + last[0]
        with T.parallel(heads) as head:
            kv_head = head // (heads // kv_heads)
            scores = scratch((length + PAGE - 1) // PAGE * PAGE, "scores")
            with T.serial((length + PAGE - 1) // PAGE) as page:
                # The last page's slots beyond the sequence hold older numbers; they are masked below.
                sums = registers(PAGE * LANES, "sums")
                for slot in range(PAGE):
                    key = (page_of[page_ends[0] + page], 0, kv_head, slot)
                    dot = registers(1, "dot")
                    store(dot, T.float32(0), 0)
                    for start, vectors, lanes in spans(width):
                        own = slot * LANES
                        store(sums, constant(0, lanes), at(own, lanes))
                        for vector in range(vectors):
                            here = at(start + vector * lanes, lanes)
                            product = queries[0, head, here] * pages[(*key, here)]
                            store(sums, sums[at(own, lanes)] + product, at(own, lanes))
                        store(dot, dot[0] + summed(sums, own, lanes), 0)
                    store(scores, dot[0] * scale, page * PAGE + slot)
            total, most = _softmax(scores, 0, length, (length + PAGE - 1) // PAGE * PAGE)
            for start, vectors, lanes in spans(width):
                # The whole row of a value in registers, where it fits.
                for first in range(0, vectors, 8):
                    group = range(first, min(first + 8, vectors))
                    mixed = registers(8 * LANES, "mixed")
                    for vector in group:
                        store(mixed, constant(0, lanes), at((vector - first) * lanes, lanes))
                    with T.serial(length) as key:
                        page = page_of[page_ends[0] + key // PAGE]
                        for vector in group:
                            own, here = at((vector - first) * lanes, lanes), at(start + vector * lanes, lanes)
                            value = pages[page, 1, kv_head, key % PAGE, here]
                            store(mixed, mixed[own] + fill(scores[key], lanes) * value, own)
                    for vector in group:
                        own, here = at((vector - first) * lanes, lanes), at(start + vector * lanes, lanes)
                        store(out, mixed[own] / fill(total[0], lanes), 0, head, here)
            store(logsum, most[0] + T.log2(total[0]), 0, head)

    return kernel("attention_decode", body)


def _scalars() -> Any:
    """Take the runtime's scalar arguments; returns the factor of a score in units of log 2."""
    T.arg("rotary_mode", T.int32())
    T.arg("rope_scale", T.float32())
    T.arg("rope_theta", T.float32())
    return T.arg("sm_scale", T.float32()) * T.float32(1 / math.log(2))


def _softmax(scores: Any, first: Any, length: Any, padded: Any) -> tuple[Any, Any]:
    """Turn ``length`` scores from ``first`` on into 2 to the power of their distance to the largest.

    Args:
        scores: memory.
        first: of the row, a multiple of :data:`LANES`.
        length: of the row.
        padded: length rounded up to such a multiple, or more; the numbers beyond ``length`` become 0.

    Returns:
        Registers that hold the sum, and the largest score.
    """
    with T.serial(padded - length) as beyond:
        store(scores, T.float32(NOTHING), first + length + beyond)
    largest, most = registers(LANES, "largest"), registers(1, "most")
    store(largest, constant(NOTHING, LANES), at(0, LANES))
    with T.serial(padded // LANES) as vector:
        here = at(first + vector * LANES, LANES)
        store(largest, T.max(largest[at(0, LANES)], scores[here]), at(0, LANES))
    store(most, tree([largest[lane] for lane in range(LANES)], T.max), 0)
    partial, total = registers(LANES, "partial"), registers(1, "total")
    store(partial, constant(0, LANES), at(0, LANES))
    with T.serial(padded // LANES) as vector:
        here = at(first + vector * LANES, LANES)
        store(scores, exp2(scores[here] - fill(most[0], LANES), LANES), here)
        store(partial, partial[at(0, LANES)] + scores[here], at(0, LANES))
    store(total, summed(partial, 0, LANES), 0)
    return total, most


def prefill_own(heads: int, kv_heads: int, width: int) -> PrimFunc:
    """The attention of new tokens to each other, causal, before they are in pages."""

    def body() -> None:
        batch, count = T.int32(), T.int32()
        queries = argument("queries", (count, heads, width))
        argument("query_ends", (batch + 1,), "int32", offset=True)
        keys = argument("keys", (count, kv_heads, width))
        values = argument("values", (count, kv_heads, width))
        argument("key_ends", (batch + 1,), "int32", offset=True)
        argument("positions", (count,), "int32", offset=True)
        argument("key_offset", (batch,), "int32", offset=True)
        out = argument("out", (count, heads, width))
        logsum = argument("logsum", (count, heads))
        T.arg("causal", T.int32())
        _attend(
            (queries, out, logsum),
            (heads, kv_heads, width),
            count,
            count,
            lambda head, key, here: keys[key, head, here],
            lambda head, key, here: values[key, head, here],
            _scalars(),
            causal=True,
        )

    return kernel("attention_prefill_own", body)


def prefill_pages(heads: int, kv_heads: int, width: int) -> PrimFunc:
    """The attention of new tokens to all that are in pages."""

    def body() -> None:
        batch, count, used = T.int32(), T.int32(), T.int32()
        queries = argument("queries", (count, heads, width))
        argument("query_ends", (batch + 1,), "int32", offset=True)
        pages = _pages(kv_heads, width)
        page_ends = argument("page_ends", (batch + 1,), "int32", offset=True)
        page_of = argument("page_of", (used,), "int32", offset=True)
        last = argument("last", (batch,), "int32", offset=True)
        argument("key_offset", (batch,), "int32", offset=True)
        argument("positions", (count,), "int32", offset=True)
        out = argument("out", (count, heads, width))
        logsum = argument("logsum", (count, heads))
        T.arg("causal", T.int32())

        def paged(kind: int) -> Callable[[Any, Any, Any], Any]:
            return lambda head, key, here: pages[page_of[page_ends[0] + key // PAGE], kind, head, key % PAGE, here]

        length = (page_ends[1] - page_ends[0] - 1) * PAGE + last[0]
        _attend(
            (queries, out, logsum),
            (heads, kv_heads, width),
            count,
            length,
            paged(0),
            paged(1),
            _scalars(),
            causal=False,
        )

    return kernel("attention_prefill_pages", body)


def _attend(
    tensors: tuple[Any, Any, Any],
    shape: tuple[int, int, int],
    count: Any,
    length: Any,
    key_of: Callable[[Any, Any, Any], Any],
    value_of: Callable[[Any, Any, Any], Any],
    scale: Any,
    *,
    causal: bool,
) -> None:
    """The attention of ``count`` tokens to ``length`` keys.

    The keys are turned once for all, so that the scores of neighbours lie in a vector. Then each head takes the tokens
    by tiles: scores to all its keys, softmax, the mixture of values, two products as in :func:`export.matmul.matmul`.

    Args:
        tensors: queries, out, logsum.
        shape: H, K, N.
        count: of tokens.
        length: how many keys there are.
        key_of: ``key_of(head, key, index)`` is one number of a key.
        value_of: likewise of a value.
        scale: of scores, in units of log 2.
        causal: whether token i sees the keys up to i alone.
    """
    queries, out, logsum = tensors
    heads, kv_heads, width = shape
    blocks = (length + TILE_COLUMNS - 1) // TILE_COLUMNS
    turned = scratch(kv_heads * blocks * (width * TILE_COLUMNS), "turned_keys")
    with T.parallel(kv_heads * blocks) as block, T.unroll(TILE_COLUMNS) as column, T.serial(width) as i:
        key = T.min(block % blocks * TILE_COLUMNS + column, length - 1)
        store(turned, key_of(block // blocks, key, i), (block * width + i) * TILE_COLUMNS + column)
    tiles = (count + TILE_TOKENS - 1) // TILE_TOKENS
    with T.parallel(heads * tiles) as task:
        head, tile = task // tiles, task % tiles
        kv_head = head // (heads // kv_heads)
        tokens = [T.min(tile * TILE_TOKENS + row, count - 1) for row in range(TILE_TOKENS)]
        seen = T.min(tile * TILE_TOKENS + TILE_TOKENS, length) if causal else length
        padded = (seen + TILE_COLUMNS - 1) // TILE_COLUMNS * TILE_COLUMNS
        scores = scratch(TILE_TOKENS * padded, "scores")
        sums = registers(TILE_TOKENS * TILE_COLUMNS, "sums")
        with T.serial(padded // TILE_COLUMNS) as block:
            multiply_tile(
                sums,
                TILE_COLUMNS,
                LANES,
                width,
                lambda row, k: queries[tokens[row], head, k],
                lambda k, column: turned[at(((kv_head * blocks + block) * width + k) * TILE_COLUMNS + column, LANES)],
            )
            for row in range(TILE_TOKENS):
                for column in range(0, TILE_COLUMNS, LANES):
                    value = sums[at(row * TILE_COLUMNS + column, LANES)] * fill(scale, LANES)
                    store(scores, value, at(row * padded + block * TILE_COLUMNS + column, LANES))
        totals = registers(TILE_TOKENS, "totals")
        for row, token in enumerate(tokens):
            own = token + 1 if causal else length
            total, most = _softmax(scores, row * padded, own, padded)
            store(totals, total[0], row)
            store(logsum, most[0] + T.log2(total[0]), token, head)
        for start, vectors, lanes in spans(width):
            # Two vectors of a row at a time, as in a tile of scores.
            for first in range(0, vectors, 2):
                columns = min(2, vectors - first) * lanes
                begin = start + first * lanes
                mixed = registers(TILE_TOKENS * columns, "mixed")
                multiply_tile(
                    mixed,
                    columns,
                    lanes,
                    seen,
                    lambda row, k: scores[row * padded + k],
                    lambda k, column, begin=begin, lanes=lanes: value_of(kv_head, k, at(begin + column, lanes)),
                )
                for row, token in enumerate(tokens):
                    for column in range(0, columns, lanes):
                        value = mixed[at(row * columns + column, lanes)] / fill(totals[row], lanes)
                        store(out, value, token, head, at(begin + column, lanes))


def merge(heads: int, width: int) -> PrimFunc:
    """Merge another part of the attention (T, H, N), and its logarithms of sums (T, H), into one."""

    def body() -> None:
        count = T.int32()
        out = argument("out", (count, heads, width))
        logsum = argument("logsum", (count, heads))
        other_out = argument("other_out", (count, heads, width))
        other_logsum = argument("other_logsum", (count, heads))

        def row(token: Any) -> None:
            with T.serial(heads) as head:
                most, one, other = registers(1, "most"), registers(1, "one"), registers(1, "other")
                store(most, T.max(logsum[token, head], other_logsum[token, head]), 0)
                store(one, exp2(logsum[token, head] - most[0], 1), 0)
                store(other, exp2(other_logsum[token, head] - most[0], 1), 0)
                total = one[0] + other[0]
                for start, vectors, lanes in spans(width):
                    with T.serial(vectors) as vector:
                        here = (token, head, at(start + vector * lanes, lanes))
                        mixed = out[here] * fill(one[0], lanes) + other_out[here] * fill(other[0], lanes)
                        store(out, mixed / fill(total, lanes), *here)
                store(logsum, most[0] + T.log2(total), token, head)

        each_token(count, row)

    return kernel("attention_merge", body)


def never() -> PrimFunc:
    """What stands for the functions that the runtime calls for several sequences, or to debug: it does nothing."""
    return kernel("never", lambda: T.evaluate(0))
