"""CPU kernels for a matrix times one token, and times many. Letters as in export/kernels.py.

Weights are (F, D), row by row as they lie in MLC's files, fp16 or fp32. An fp16 weight is widened to fp32 when it is
loaded into a register: memory is read at 2 bytes a weight, and nothing is summed in fp16.
"""

from typing import Any

from tvm.tirx import PrimFunc, Shuffle
from tvm.tirx.script import builder as T

from export.kernels import (
    LANES,
    argument,
    at,
    cast,
    constant,
    fill,
    kernel,
    registers,
    scratch,
    spans,
    store,
    summed,
    tree,
)

UNROLL = 4
"""Sums of a row that do not wait for each other: an FMA takes 4 cycles, and two begin in each."""

TILE_TOKENS, TILE_COLUMNS = 6, 2 * LANES
"""Tile of :func:`matmul` that is summed in registers: 12 of AVX2's 16, 24 of NEON's 32."""


def matvec(out_width: int, width: int, dtype: str, *, bias: bool, residual: bool, fmlal: bool) -> PrimFunc:
    """x (1, D) times weight (F, D), plus bias (F), plus residual (1, F): the matrix is read once, in order.

    One row after the other: several at a time would load the input less often, but to what fetches memory ahead they
    are so many short streams, and narrow models decode half as fast.

    With ``fmlal`` the input is rounded to fp16 and multiplied by ARM's FMLAL, which sums products of fp16 in fp32.
    """

    def body() -> None:
        x = argument("x", (1, width))
        weight = argument("weight", (out_width, width), dtype)
        added = _added(out_width, 1, dtype, bias=bias, residual=residual)
        out = argument("out", (1, out_width))
        halves = _halves(x, width) if fmlal else None
        with T.parallel(out_width) as row:
            sums, total = registers(UNROLL * LANES, "sums"), registers(1, "total")
            store(total, T.float32(0), 0)

            def step(start: Any, lanes: int, part: int) -> None:
                here, sum_of_part = at(start, lanes), at(part * LANES, lanes)
                if halves is not None and lanes == 8:
                    _fmlal(sums, part * LANES, halves[here], weight[row, here])
                else:
                    store(sums, sums[sum_of_part] + x[0, here] * cast(weight[row, here], lanes), sum_of_part)

            for start, vectors, lanes in spans(width):
                unroll = next(parts for parts in (UNROLL, 2, 1) if vectors % parts == 0)
                for part in range(unroll):
                    store(sums, constant(0, lanes), at(part * LANES, lanes))
                with T.serial(vectors // unroll) as vector:
                    for part in range(unroll):
                        step(start + (vector * unroll + part) * lanes, lanes, part)
                found = tree([sums[at(part * LANES, lanes)] for part in range(unroll)])
                store(sums, found, at(0, lanes))
                store(total, total[0] + summed(sums, 0, lanes), 0)
            store(out, total[0] + added(0, row, 1), 0, row)

    return kernel("matvec", body)


def _added(out_width: int, count: Any, dtype: str, *, bias: bool, residual: bool) -> Any:
    """Take the arguments that are added to a product; returns what gives their sum at (token, column)."""
    biases = argument("bias", (out_width,), dtype) if bias else None
    residuals = argument("residual", (count, out_width)) if residual else None

    def added(token: Any, column: Any, lanes: int) -> Any:
        total = constant(0, lanes)
        if biases is not None:
            total = total + cast(biases[at(column, lanes)], lanes)
        if residuals is not None:
            total = total + residuals[token, at(column, lanes)]
        return total

    return added


def _halves(x: Any, width: int) -> Any:
    """The input in fp16."""
    found = scratch(width, "halves", "float16")
    with T.serial(width) as i:
        store(found, T.cast(x[0, i], "float16"), i)
    return found


def _fmlal(sums: Any, first: int, x: Any, weights: Any) -> None:
    """Add eight products to eight sums: FMLAL takes the lower four, FMLAL2 the upper."""
    for half, name in enumerate(("fmlal", "fmlal2")):
        here = T.ramp(first + 4 * half, 1, 4)
        value = T.call_llvm_pure_intrin("float32x4", f"llvm.aarch64.neon.{name}", sums[here], x, weights)
        store(sums, value, here)


def matmul(out_width: int, width: int, dtype: str, *, bias: bool, residual: bool) -> PrimFunc:
    """x (T, D) times weight (F, D), plus bias (F), plus residual (T, F).

    A thread takes some columns of the result at a time: their weights are turned and widened into (D, columns), once,
    and serve all tokens. A tile of tokens and columns is summed in registers over the whole of D.
    """
    columns = next(one for one in (TILE_COLUMNS, LANES, 4, 2, 1) if one <= out_width)
    lanes = min(LANES, columns)

    def body() -> None:
        count = T.int64()
        x = argument("x", (count, width))
        weight = argument("weight", (out_width, width), dtype)
        added = _added(out_width, count, dtype, bias=bias, residual=residual)
        out = argument("out", (count, out_width))
        with T.parallel(-(-out_width // columns)) as panel:
            # The last panel may reach over the end: it begins earlier, and computes some columns again.
            first = T.min(panel * columns, out_width - columns)
            turned = scratch(width * columns, "turned")
            _turn(weight, turned, first, columns, width)
            with T.serial((count + TILE_TOKENS - 1) // TILE_TOKENS) as tile:
                # So does the last tile with the last token.
                tokens = [T.min(tile * TILE_TOKENS + row, count - 1) for row in range(TILE_TOKENS)]
                sums = registers(TILE_TOKENS * columns, "sums")
                multiply_tile(
                    sums,
                    columns,
                    lanes,
                    width,
                    lambda row, k: x[tokens[row], k],
                    lambda k, column: turned[at(k * columns + column, lanes)],
                )
                for row, token in enumerate(tokens):
                    for column in range(0, columns, lanes):
                        value = sums[at(row * columns + column, lanes)] + added(token, first + column, lanes)
                        store(out, value, token, at(first + column, lanes))

    return kernel("matmul", body)


def _turn(weight: Any, turned: Any, first: Any, columns: int, width: int) -> None:
    """Rows ``first`` and following of ``weight``, in fp32, to the columns of ``turned`` (D, columns)."""
    for start, vectors, lanes in spans(width):
        with T.serial(vectors) as vector:
            begin = start + vector * lanes
            for column in range(0, columns, lanes) if columns % lanes == 0 else ():
                square = registers(lanes * lanes, "square")
                for row in range(lanes):
                    values = cast(weight[first + column + row, at(begin, lanes)], lanes)
                    store(square, values, at(row * lanes, lanes))
                _transpose(square, lanes)
                for row in range(lanes):
                    here = at((begin + row) * columns + column, lanes)
                    store(turned, square[at(row * lanes, lanes)], here)
            if columns % lanes:
                with T.serial(columns) as column, T.serial(lanes) as lane:
                    value = T.cast(weight[first + column, begin + lane], "float32")
                    store(turned, value, (begin + lane) * columns + column)


def _transpose(square: Any, lanes: int) -> None:
    """Transpose registers (lanes, lanes): exchange the off-diagonal quarters, then those of the quarters, and so on."""
    step = lanes // 2
    while step:
        for row in range(lanes):
            if row & step:
                continue
            here, there = at(row * lanes, lanes), at((row + step) * lanes, lanes)
            pair = [square[here], square[there]]
            # Places in the pair: those of the first vector, then those of the second.
            upper = [lane if not lane & step else lanes + lane - step for lane in range(lanes)]
            lower = [lane + step if not lane & step else lanes + lane for lane in range(lanes)]
            kept = registers(lanes, "kept")
            store(kept, Shuffle(pair, lower), at(0, lanes))
            store(square, Shuffle(pair, upper), here)
            store(square, kept[at(0, lanes)], there)
        step //= 2


def multiply_tile(sums: Any, columns: int, lanes: int, depth: Any, left: Any, right: Any) -> None:
    """Set ``sums`` (:data:`TILE_TOKENS`, ``columns``) to a product over ``depth``.

    Args:
        sums: registers.
        columns: of the tile, a multiple of ``lanes``.
        lanes: of a vector.
        depth: how many terms a sum has.
        left: ``left(row, k)`` is a number of the left matrix.
        right: ``right(k, column)`` is a vector of the right matrix that begins at ``column``.
    """
    places = [(row, column) for row in range(TILE_TOKENS) for column in range(0, columns, lanes)]
    for row, column in places:
        store(sums, constant(0, lanes), at(row * columns + column, lanes))
    with T.serial(depth) as k:
        for row, column in places:
            here = at(row * columns + column, lanes)
            store(sums, sums[here] + fill(left(row, k), lanes) * right(k, column), here)
