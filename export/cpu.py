"""The model's operations as our CPU kernels. Activations are fp32; weights are of the library's dtype.

A tensor of one known token takes the kernels of decoding, one of a symbolic number of tokens those of prefill.
"""

from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn.llm import kv_cache as stock

from export import attention, matmul, rowwise
from export.attention import PAGE


class CpuOperations:
    """What export/graph.py builds a model from.

    Args:
        dtype: of weights, float16 or float32.
        fmlal: use ARM's FMLAL where one token is multiplied by fp16 weights.
    """

    def __init__(self, dtype: str, *, fmlal: bool = False) -> None:
        self._dtype, self._fmlal = dtype, fmlal

    def embed(self, ids: nn.Tensor, table: nn.Tensor) -> nn.Tensor:
        """ids (1, T), table (V, D) to (T, D)."""
        vocab, width = table.shape
        tokens = ids.shape[1]
        function = rowwise.embed(vocab, width, self._dtype, _known(tokens))
        return _call(function, [ids, table], (tokens, width))

    def linear(self, x: nn.Tensor, weight: nn.Tensor, bias: Any = None, residual: Any = None) -> nn.Tensor:
        """x (T, D) times weight (F, D), plus bias (F), plus residual (T, F)."""
        (tokens, width), out_width = x.shape, weight.shape[0]
        added = {"bias": bias is not None, "residual": residual is not None}
        if _known(tokens):
            function = matmul.matvec(out_width, width, self._dtype, fmlal=self._fmlal, **added)
        else:
            function = matmul.matmul(out_width, width, self._dtype, **added)
        arguments = [x, weight, *(one for one in (bias, residual) if one is not None)]
        return _call(function, arguments, (tokens, out_width))

    def rms_norm(self, x: nn.Tensor, weight: nn.Tensor, eps: float) -> nn.Tensor:
        """x (T, D) over its root mean square, times weight."""
        return _call(rowwise.rms_norm(x.shape[1], eps, self._dtype, _known(x.shape[0])), [x, weight], x.shape)

    def layer_norm(self, x: nn.Tensor, weight: nn.Tensor, bias: nn.Tensor, eps: float) -> nn.Tensor:
        """x (T, D) without its mean, over its standard deviation, times weight, plus bias."""
        function = rowwise.layer_norm(x.shape[1], eps, self._dtype, _known(x.shape[0]))
        return _call(function, [x, weight, bias], x.shape)

    def qk_norm(self, qkv: nn.Tensor, heads: int, query: nn.Tensor, key: nn.Tensor, eps: float) -> nn.Tensor:
        """qkv (T, H + 2K, N) with its queries and keys normalised as by :meth:`rms_norm`."""
        tokens, both, width = qkv.shape
        kv_heads = (both - heads) // 2
        function = rowwise.qk_norm(heads, kv_heads, width, eps, self._dtype, _known(tokens))
        return _call(function, [qkv, query, key], qkv.shape)

    def swiglu(self, x: nn.Tensor) -> nn.Tensor:
        """x (T, 2F), gates first, to silu(gates) * values (T, F)."""
        tokens, width = x.shape[0], x.shape[1] // 2
        return _call(rowwise.swiglu(width, _known(tokens)), [x], (tokens, width))

    def gelu(self, x: nn.Tensor) -> nn.Tensor:
        """GELU with the tanh approximation."""
        return _call(rowwise.gelu(x.shape[1], _known(x.shape[0])), [x], x.shape)

    def last_row(self, x: nn.Tensor) -> nn.Tensor:
        """The last token's row of x (T, D), as (1, D)."""
        return x if _known(x.shape[0]) else _call(rowwise.last_row(x.shape[1]), [x], (1, x.shape[1]))

    def logits(self, x: nn.Tensor) -> nn.Tensor:
        """As they leave the library."""
        return x

    def cache(self, shape: Any, total: Any) -> "stock.PagedKVCache":
        """An empty cache for ``total`` tokens of a model of this :class:`export.graph.Shape`."""
        return CpuCache(shape, total)


class CpuCache(stock.PagedKVCache):
    """TVM's paged KV cache with our kernels."""

    def __init__(self, shape: Any, total: Any) -> None:
        heads, kv_heads, width, rotary = shape.heads, shape.kv_heads, shape.head_width, len(shape.frequencies) * 2
        builder = relax.BlockBuilder.current()

        def function(one: Any, name: str) -> Any:
            return builder.add_func(one, name)

        def attention_of(one: Any, name: str) -> Any:
            return relax.Tuple([tvm.ir.StringImm("tirx"), function(one, name)])

        frequencies = nn.Tensor(_expr=relax.const(np.array(shape.frequencies, dtype=np.float32)))
        table = _call(attention.rotary_table(shape.context, rotary), [frequencies], (shape.context, rotary))
        unused, never = relax.Tuple([]), function(attention.never(), "never")
        empty = relax.const(np.zeros((), dtype=np.float32))
        arguments = [
            relax.ShapeExpr([1, total, shape.chunk, PAGE, 0, 1]),
            relax.ShapeExpr([0, shape.layers]),
            *(relax.prim_value(one) for one in (heads, kv_heads, width, width)),
            relax.ShapeExpr([int(stock.AttnKind.MHA)] * shape.layers),
            relax.prim_value(False),
            relax.prim_value(int(stock.RopeMode.NORMAL)),
            *(relax.prim_value(one) for one in (1, 10_000)),  # scale and theta: the table holds what they are for
            table._expr,
            empty,  # of the cache's dtype
            function(attention.append(kv_heads, width), "kv_append"),
            never,  # append for MLA
            attention_of(attention.prefill_own(heads, kv_heads, width), "attention_prefill_own"),
            attention_of(attention.prefill_pages(heads, kv_heads, width), "attention_prefill_pages"),
            attention_of(attention.decode(heads, kv_heads, width), "attention_decode"),
            *[unused] * 5,  # sliding windows, trees of tokens, MLA
            relax.Tuple([function(attention.merge(heads, width), "attention_merge")]),
            function(attention.split_rotary(heads, kv_heads, width, rotary, shape.context), "split_rotary"),
            *[never] * 3,  # copy a page, read the cache, compact it
        ]
        expression = relax.call_pure_packed(
            "vm.builtin.paged_attention_kv_cache_create", *arguments, ty_args=relax.AnyType()
        )
        super().__init__(_expr=expression, _name="cache")


def _known(tokens: Any) -> int | None:
    """The number of tokens where it is known, which is 1."""
    return tokens if isinstance(tokens, int) else None


def _call(function: Any, arguments: list[Any], shape: tuple[Any, ...]) -> nn.Tensor:
    return nn.op.tensor_ir_op(
        function, str(function.attrs["kernel"]), arguments, nn.Tensor.placeholder(shape, "float32")
    )
