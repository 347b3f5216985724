"""CPU kernels that treat every token's row alone: lookup, norms, activations. Letters as in export/kernels.py.

``tokens`` is 1 for decoding, and None where a kernel takes any number.
"""

from typing import Any

from tvm.tirx import PrimFunc
from tvm.tirx.script import builder as T

from export.kernels import (
    LANES,
    argument,
    at,
    cast,
    constant,
    each_token,
    fill,
    kernel,
    registers,
    sigmoid,
    spans,
    store,
    summed,
    tokens_of,
)


def embed(vocab: int, width: int, dtype: str, tokens: int | None) -> PrimFunc:
    """ids (1, T) and table (V, D) to rows (T, D)."""

    def body() -> None:
        count = tokens_of(tokens)
        ids = argument("ids", (1, count), "int32")
        table = argument("table", (vocab, width), dtype)
        out = argument("out", (count, width))

        def row(token: Any) -> None:
            for start, vectors, lanes in spans(width):
                with T.serial(vectors) as vector:
                    here = at(start + vector * lanes, lanes)
                    store(out, cast(table[ids[0, token], here], lanes), token, here)

        each_token(count, row)

    return kernel("embed", body)


def last_row(width: int) -> PrimFunc:
    """The last row of (T, D), as (1, D)."""

    def body() -> None:
        count = T.int64()
        x = argument("x", (count, width))
        out = argument("out", (1, width))
        with T.serial(width) as i:
            store(out, x[count - 1, i], 0, i)

    return kernel("last_row", body)


def rms_norm(width: int, eps: float, dtype: str, tokens: int | None) -> PrimFunc:
    """x (T, D) over its root mean square, times weight (D)."""

    def body() -> None:
        count = tokens_of(tokens)
        x = argument("x", (count, width))
        weight = argument("weight", (width,), dtype)
        out = argument("out", (count, width))
        each_token(count, lambda token: _rms(x, weight, out, (token,), width, eps))

    return kernel("rms_norm", body)


def qk_norm(heads: int, kv_heads: int, width: int, eps: float, dtype: str, tokens: int | None) -> PrimFunc:
    """The heads of queries and keys in x (T, H + 2K, N) as by :func:`rms_norm`, each kind with its own weight (N)."""

    def body() -> None:
        count = tokens_of(tokens)
        x = argument("x", (count, heads + 2 * kv_heads, width))
        query_weight = argument("query_weight", (width,), dtype)
        key_weight = argument("key_weight", (width,), dtype)
        out = argument("out", (count, heads + 2 * kv_heads, width))

        def row(token: Any) -> None:
            with T.serial(heads) as head:
                _rms(x, query_weight, out, (token, head), width, eps)
            with T.serial(kv_heads) as head:
                _rms(x, key_weight, out, (token, heads + head), width, eps)
            with T.serial(kv_heads) as head:
                for start, vectors, lanes in spans(width):
                    with T.serial(vectors) as vector:
                        here = (token, heads + kv_heads + head, at(start + vector * lanes, lanes))
                        store(out, x[here], *here)

        each_token(count, row)

    return kernel("qk_norm", body)


def _rms(x: Any, weight: Any, out: Any, row: tuple[Any, ...], width: int, eps: float) -> None:
    """One row of :func:`rms_norm`."""
    squares = _row_sum(width, lambda here, lanes: x[(*row, here)] * x[(*row, here)])
    scale = registers(1, "scale")
    store(scale, T.float32(1) / T.sqrt(squares[0] / T.float32(width) + T.float32(eps)), 0)
    for start, vectors, lanes in spans(width):
        with T.serial(vectors) as vector:
            here = at(start + vector * lanes, lanes)
            store(out, x[(*row, here)] * fill(scale[0], lanes) * cast(weight[here], lanes), *row, here)


def layer_norm(width: int, eps: float, dtype: str, tokens: int | None) -> PrimFunc:
    """x (T, D) without its mean, over its standard deviation, times weight (D), plus bias (D)."""

    def body() -> None:
        count = tokens_of(tokens)
        x = argument("x", (count, width))
        weight = argument("weight", (width,), dtype)
        bias = argument("bias", (width,), dtype)
        out = argument("out", (count, width))

        def row(token: Any) -> None:
            mean, scale = registers(1, "mean"), registers(1, "scale")
            store(mean, _row_sum(width, lambda here, lanes: x[token, here])[0] / T.float32(width), 0)

            def square(here: Any, lanes: int) -> Any:
                difference = x[token, here] - fill(mean[0], lanes)
                return difference * difference

            variance = _row_sum(width, square)[0] / T.float32(width)
            store(scale, T.float32(1) / T.sqrt(variance + T.float32(eps)), 0)
            for start, vectors, lanes in spans(width):
                with T.serial(vectors) as vector:
                    here = at(start + vector * lanes, lanes)
                    normal = (x[token, here] - fill(mean[0], lanes)) * fill(scale[0], lanes)
                    store(out, normal * cast(weight[here], lanes) + cast(bias[here], lanes), token, here)

        each_token(count, row)

    return kernel("layer_norm", body)


def _row_sum(width: int, term: Any) -> Any:
    """A register that holds the sum of ``term(index, lanes)`` over a row."""
    partial, total = registers(4 * LANES, "partial"), registers(1, "total")
    store(total, T.float32(0), 0)
    for start, vectors, lanes in spans(width):
        sums = 4 if vectors % 4 == 0 else 1  # that do not wait for each other
        for one in range(sums):
            store(partial, constant(0, lanes), at(one * lanes, lanes))
        with T.serial(vectors // sums) as vector:
            for one in range(sums):
                here = at(start + (vector * sums + one) * lanes, lanes)
                store(partial, partial[at(one * lanes, lanes)] + term(here, lanes), at(one * lanes, lanes))
        store(total, total[0] + summed(partial, 0, sums * lanes), 0)
    return total


def swiglu(width: int, tokens: int | None) -> PrimFunc:
    """x (T, 2F), gates before values, to silu(gates) * values (T, F)."""

    def body() -> None:
        count = tokens_of(tokens)
        x = argument("x", (count, 2 * width))
        out = argument("out", (count, width))

        def row(token: Any) -> None:
            for start, vectors, lanes in spans(width):
                with T.serial(vectors) as vector:
                    here = start + vector * lanes
                    gate, value = x[token, at(here, lanes)], x[token, at(width + here, lanes)]
                    store(out, gate * sigmoid(gate, lanes) * value, token, at(here, lanes))

        each_token(count, row)

    return kernel("swiglu", body)


def gelu(width: int, tokens: int | None) -> PrimFunc:
    """GELU of x (T, F) with the tanh approximation ("gelu_new"), as a sigmoid: 1 + tanh(z) = 2 sigmoid(2z)."""

    def body() -> None:
        count = tokens_of(tokens)
        x = argument("x", (count, width))
        out = argument("out", (count, width))

        def row(token: Any) -> None:
            for start, vectors, lanes in spans(width):
                with T.serial(vectors) as vector:
                    here = at(start + vector * lanes, lanes)
                    value = x[token, here]
                    inner = value + constant(0.044715, lanes) * value * value * value
                    # 2 sqrt(2 / pi)
                    store(out, value * sigmoid(constant(1.5957691216057308, lanes) * inner, lanes), token, here)

        each_token(count, row)

    return kernel("gelu", body)


def row_sums(rows: int, width: int) -> PrimFunc:
    """The sum of each row of x (rows, width): nothing but reading, to measure the memory by."""

    def body() -> None:
        x = argument("x", (rows, width))
        out = argument("out", (rows,))
        with T.parallel(rows) as row:
            store(out, _row_sum(width, lambda here, lanes: x[row, here])[0], row)

    return kernel("row_sums", body)
