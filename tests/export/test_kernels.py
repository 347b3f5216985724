"""The CPU kernels against NumPy, in shapes that no vector or tile divides."""

import math

import numpy as np
import pytest
import tvm

from export import attention, matmul, rowwise
from export.kernels import spans
from export.library import compile_kernel


@pytest.fixture
def numbers():
    rng = np.random.default_rng(0)
    return lambda *shape: rng.standard_normal(shape).astype(np.float32)


def run(kernel, *arguments):
    """Call a kernel on arrays; returns its output arrays, which are those that hold nothing yet."""
    tensors = [tvm.runtime.tensor(one) if isinstance(one, np.ndarray) else one for one in arguments]
    compile_kernel(kernel)(*tensors)
    return [tensor.numpy() for tensor in tensors if not isinstance(tensor, int | float)]


@pytest.mark.parametrize("width", [1, 7, 8, 29, 64])
def test_spans_cover_every_number_once(width: int) -> None:
    covered = [
        start + vector * lanes + lane
        for start, count, lanes in spans(width)
        for vector in range(count)
        for lane in range(lanes)
    ]
    assert covered == list(range(width))


@pytest.mark.parametrize(("out_width", "width"), [(3, 5), (17, 29), (50, 24), (16, 64)])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_products(numbers, out_width: int, width: int, dtype: str) -> None:
    weight, bias = numbers(out_width, width).astype(dtype), numbers(out_width).astype(dtype)
    for tokens in (1, 13):
        x, residual, out = numbers(tokens, width), numbers(tokens, out_width), np.zeros((tokens, out_width), np.float32)
        added = {"bias": True, "residual": True}
        if tokens == 1:
            kernel = matmul.matvec(out_width, width, dtype, fmlal=False, **added)
        else:
            kernel = matmul.matmul(out_width, width, dtype, **added)
        found = run(kernel, x, weight, bias, residual, out)[-1]
        expected = x @ weight.astype(np.float32).T + bias.astype(np.float32) + residual
        np.testing.assert_allclose(found, expected, atol=2e-5)


def test_activations(numbers) -> None:
    x = 20 * numbers(5, 2 * 13)
    out = np.zeros((5, 13), np.float32)
    gate, value = x[:, :13].astype(np.float64), x[:, 13:]
    np.testing.assert_allclose(
        run(rowwise.swiglu(13, None), x, out)[-1], gate / (1 + np.exp(-gate)) * value, rtol=2e-6, atol=1e-6
    )
    expected = 0.5 * gate * (1 + np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
    x = np.ascontiguousarray(x[:, :13])
    np.testing.assert_allclose(run(rowwise.gelu(13, None), x, out)[-1], expected, rtol=2e-6, atol=1e-6)


def attend(queries, keys, values, scale: float, *, causal: bool):
    """The reference: queries (T, H, N), keys and values (L, K, N)."""
    group = queries.shape[1] // keys.shape[1]
    keys, values = keys.repeat(group, axis=1), values.repeat(group, axis=1)
    scores = np.einsum("thn,lhn->htl", queries, keys).astype(np.float64) * scale
    if causal:
        scores += np.triu(np.full(scores.shape[1:], -np.inf), 1)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    total = weights.sum(-1, keepdims=True)
    logsum = (np.log2(total) + scores.max(-1, keepdims=True) / math.log(2))[..., 0]
    return np.einsum("htl,lhn->thn", weights / total, values), logsum.T


def index(*values: int):
    return np.array(values, dtype=np.int32)


@pytest.mark.parametrize("width", [6, 24, 64])
def test_attention_of_new_tokens_to_each_other(numbers, width: int) -> None:
    queries, keys, values = numbers(23, 6, width), numbers(23, 3, width), numbers(23, 3, width)
    out, logsum = np.zeros_like(queries), np.zeros((23, 6), np.float32)
    ends, places = index(0, 23), index(*range(23))
    rest = (1, 0, 1.0, 10_000.0, 0.3)
    found = run(
        attention.prefill_own(6, 3, width), queries, ends, keys, values, ends, places, index(0), out, logsum, *rest
    )
    expected = attend(queries, keys, values, 0.3, causal=True)
    np.testing.assert_allclose(found[-2], expected[0], atol=1e-5)
    np.testing.assert_allclose(found[-1], expected[1], atol=1e-5)


@pytest.mark.parametrize(("tokens", "length"), [(1, 5), (1, 37), (9, 37)])
def test_attention_to_pages(numbers, tokens: int, length: int) -> None:
    """Pages lie anywhere, and hold garbage after the last token."""
    queries, keys, values = numbers(tokens, 6, 16), numbers(length, 3, 16), numbers(length, 3, 16)
    order = [5, 1, 4][: -(-length // attention.PAGE)]
    pages = np.full((7, 2, 3, attention.PAGE, 16), np.nan, np.float32)
    places = index(*(order[i // attention.PAGE] * attention.PAGE + i % attention.PAGE for i in range(length)))
    pages = run(attention.append(3, 16), pages, keys, values, places)[0]
    out, logsum = np.zeros_like(queries), np.zeros((tokens, 6), np.float32)
    paged = (pages, index(0, len(order)), index(*order), index((length - 1) % attention.PAGE + 1), index(0))
    if tokens == 1:
        kernel, before, rest = attention.decode(6, 3, 16), (), (0, 1.0, 10_000.0, 0.3)
    else:
        kernel, before, rest = attention.prefill_pages(6, 3, 16), (index(0, tokens),), (0, 0, 1.0, 10_000.0, 0.3)
    found = run(kernel, queries, *before, *paged, index(*range(tokens)), out, logsum, *rest)
    expected = attend(queries, keys, values, 0.3, causal=False)
    np.testing.assert_allclose(found[-2], expected[0], atol=1e-5)
    np.testing.assert_allclose(found[-1], expected[1], atol=1e-5)
