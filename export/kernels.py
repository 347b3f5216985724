"""What the CPU kernels are written with.

TVM's default schedules leave a CPU kernel scalar and on one thread. Ours are written out as loops: the parallel ones
outside, vectors of ``lanes`` numbers inside, sums in registers. Weights may be fp16 in memory; all arithmetic is fp32.

Letters: T tokens, V vocabulary, D width in, F width out, H query heads, K key/value heads, N head width.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.tirx import PrimFunc
from tvm.tirx.script import builder as T

LANES = 8
"""fp32 numbers that are worked on at once: a register of AVX2, two of NEON."""

LN2 = math.log(2)


def kernel(name: str, body: Callable[[], None]) -> PrimFunc:
    """The function that ``body`` emits with TVM's builder."""
    with IRBuilder() as builder, T.prim_func(private=True):
        T.func_attr({"kernel": name, "tirx.noalias": True, "tirx.is_scheduled": True})
        body()
    return builder.get()


def argument(name: str, shape: tuple[Any, ...], dtype: str = "float32", *, offset: bool = False) -> Any:
    """The kernel's next tensor; with ``offset`` it may be a view that begins inside of another."""
    handle = T.arg(name, T.handle())
    return T.match_buffer(handle, shape, dtype, elem_offset=T.int32() if offset else None)


def spans(width: int, lanes: int = LANES) -> Iterator[tuple[int, int, int]]:
    """Cut ``width`` numbers into vectors: (first number, vectors, lanes of each), the widest ones first."""
    start = 0
    while lanes and start < width:
        count = (width - start) // lanes
        if count:
            yield start, count, lanes
        start, lanes = start + count * lanes, lanes // 2


def at(start: Any, lanes: int) -> Any:
    """The index of ``lanes`` numbers that begin at ``start``."""
    return start if lanes == 1 else T.ramp(start, 1, lanes)


def fill(value: Any, lanes: int) -> Any:
    """``value`` in every lane."""
    return value if lanes == 1 else T.broadcast(value, lanes)


def cast(value: Any, lanes: int, dtype: str = "float32") -> Any:
    """A number or vector as another type."""
    return T.cast(value, dtype if lanes == 1 else f"{dtype}x{lanes}")


def constant(value: float, lanes: int = 1) -> Any:
    """An fp32 constant in every lane."""
    return fill(T.float32(value), lanes)


def registers(count: int, name: str) -> Any:
    """A small array; indexed by constants alone it never reaches memory.

    TVM takes arrays below 1 KiB of the plain scope from the stack, where LLVM makes registers of them; those of the
    scope that is called local it would take from the heap.
    """
    assert count < 256, "this would not be on the stack"
    found = T.alloc_buffer((count,), "float32")
    IRBuilder.name(name, found)
    return found


def scratch(count: Any, name: str, dtype: str = "float32") -> Any:
    """Memory of the thread that runs the enclosing loop."""
    found = T.alloc_buffer((count,), dtype)
    IRBuilder.name(name, found)
    return found


def store(buffer: Any, value: Any, *indices: Any) -> None:
    """``buffer[indices] = value``."""
    T.buffer_store(buffer, value, list(indices))


def tree(values: list[Any], combine: Callable[[Any, Any], Any] = lambda a, b: a + b) -> Any:
    """Combine values in pairs, then the results in pairs, and so on."""
    while len(values) > 1:
        values = [combine(*values[i : i + 2]) if i + 1 < len(values) else values[i] for i in range(0, len(values), 2)]
    return values[0]


def summed(buffer: Any, start: int, lanes: int) -> Any:
    """The sum of ``lanes`` neighbours."""
    return tree([buffer[start + lane] for lane in range(lanes)])


def exp2(x: Any, lanes: int) -> Any:
    """2 to the power of x, to within 2e-7 of it, from -126 to 127.

    The whole part goes into the exponent of a float; the rest, of -0.5 to 0.5, into a Taylor polynomial. libm's
    function takes one number at a time.
    """
    x = T.max(T.min(x, constant(127, lanes)), constant(-126, lanes))
    whole = T.nearbyint(x)
    rest = x - whole
    polynomial = constant(LN2**7 / math.factorial(7), lanes)
    for power in range(6, -1, -1):
        polynomial = polynomial * rest + constant(LN2**power / math.factorial(power), lanes)
    exponent = (cast(whole, lanes, "int32") + fill(T.int32(127), lanes)) << fill(T.int32(23), lanes)
    return polynomial * T.reinterpret("float32" if lanes == 1 else f"float32x{lanes}", exponent)


def sigmoid(x: Any, lanes: int) -> Any:
    """1 / (1 + exp(-x))."""
    return constant(1, lanes) / (constant(1, lanes) + exp2(x * constant(-1 / LN2, lanes), lanes))


def tokens_of(count: int | None) -> Any:
    """The number of tokens in a kernel's shapes: known, or a symbol."""
    return T.int64() if count is None else count


def each_token(count: Any, body: Callable[[Any], None]) -> None:
    """``body`` for every token, in parallel; one token alone is not worth waking threads for."""
    if isinstance(count, int):
        assert count == 1
        body(0)
        return
    with T.If(count == 1):
        with T.Then():
            body(T.int64(0))
        with T.Else(), T.parallel(count) as token:
            body(token)
