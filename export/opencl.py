"""The model's operations as TVM's own, for OpenCL: DLight schedules them, TVM's cache brings its kernels.

Activations are of the library's dtype, as in MLC-LLM: an Adreno multiplies fp16 twice as fast, and has no bandwidth to
spare for fp32.
"""

import math
from typing import Any

from tvm import relax, te, tirx
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn.llm import kv_cache as stock
from tvm.relax.frontend.nn.llm import position_embedding
from tvm.target import Target

from export.attention import PAGE


class OpenClOperations:
    """What export/graph.py builds a model from; :class:`export.cpu.CpuOperations` says what each does.

    Args:
        dtype: of weights and activations, float16 or float32.
        target: TVM's description of the processor, which the cache's kernels are chosen by.
    """

    def __init__(self, dtype: str, target: Target) -> None:
        self._dtype, self._target = dtype, target

    def embed(self, ids: nn.Tensor, table: nn.Tensor) -> nn.Tensor:
        """A row of the table for each token."""
        tokens = ids.reshape(ids.shape[1])
        return nn.op.wrap_nested(relax.op.take(table._expr, tokens._expr, axis=0, mode="clip"), "embed")

    def linear(self, x: nn.Tensor, weight: nn.Tensor, bias: Any = None, residual: Any = None) -> nn.Tensor:
        """A product, and what is added to it."""
        product = nn.op.matmul(x, nn.op.permute_dims(weight))
        for added in (bias, residual):
            product = product if added is None else product + added
        return product

    def rms_norm(self, x: nn.Tensor, weight: nn.Tensor, eps: float) -> nn.Tensor:
        """Each row over its root mean square."""
        return nn.op.rms_norm(x, weight, axes=-1, epsilon=eps)

    def layer_norm(self, x: nn.Tensor, weight: nn.Tensor, bias: nn.Tensor, eps: float) -> nn.Tensor:
        """Each row without its mean, over its standard deviation."""
        return nn.op.layer_norm(x, x.shape[-1:], weight, bias, eps)

    def qk_norm(self, qkv: nn.Tensor, heads: int, query: nn.Tensor, key: nn.Tensor, eps: float) -> nn.Tensor:
        """Queries and keys normalised, each kind with its own weight."""
        kv_heads = (qkv.shape[1] - heads) // 2
        queries, keys, values = nn.op.split(qkv, [heads, heads + kv_heads], axis=1)
        return nn.op.concat([self.rms_norm(queries, query, eps), self.rms_norm(keys, key, eps), values], dim=1)

    def swiglu(self, x: nn.Tensor) -> nn.Tensor:
        """silu(gates) * values."""
        gate, value = nn.op.split(x, 2, axis=-1)
        return nn.op.silu(gate) * value

    def gelu(self, x: nn.Tensor) -> nn.Tensor:
        """GELU with the tanh approximation."""
        return nn.op.gelu(x, approximate="tanh")

    def last_row(self, x: nn.Tensor) -> nn.Tensor:
        """The last token's row."""
        return nn.op.tensor_expr_op(_last_row, "last_row", [x])

    def logits(self, x: nn.Tensor) -> nn.Tensor:
        """In fp32."""
        return x.astype("float32")

    def cache(self, shape: Any, total: Any) -> stock.PagedKVCache:
        """TVM's cache with TVM's kernels."""
        return stock.TIRPagedKVCache(
            attn_kind="mha",
            max_batch_size=1,
            max_total_seq_len=total,
            prefill_chunk_size=shape.chunk,
            page_size=PAGE,
            support_sliding_window=0,
            layer_partition=relax.ShapeExpr([0, shape.layers]),
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            qk_head_dim=shape.head_width,
            v_head_dim=shape.head_width,
            mla_original_qk_head_dim=0,
            mla_original_v_head_dim=0,
            rope_mode=stock.RopeMode.NORMAL,
            rope_scale=1,
            rope_theta=shape.rotary.theta,
            rope_scaling=shape.rotary.scaling or {},
            rope_ext_factors=relax.prim_value(0),
            rotary_dim=2 * len(shape.frequencies),
            enable_disaggregation=False,
            dtype=self._dtype,
            target=self._target,
        )


def _last_row(x: Any) -> Any:
    return te.compute((1, x.shape[1]), lambda _, i: x[x.shape[0] - 1, i], name="last_row")


def _scaled_frequency(
    position: Any,
    place: Any,
    width: int,
    theta: float,
    dtype: str,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: float,
) -> tuple[Any, Any, dict[Any, Any]]:
    """What Llama 3.1 turns a pair by, as TVM's ``rope_freq_llama3`` gives it: cosine, sine, and the angle they name."""
    frequency = tirx.const(1, "float32") / tirx.power(theta, place * 2 % width / tirx.const(width, "float32"))
    turns = original_max_position_embeddings / (2 * math.pi) * frequency
    smooth = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor)
    smooth = tirx.max(0.0, tirx.min(1.0, smooth))
    angle = tirx.Var("angle", "float32")
    scaled = position * ((1.0 - smooth) * frequency / factor + smooth * frequency)
    return tirx.cos(angle).astype(dtype), tirx.sin(angle).astype(dtype), {angle: scaled}


# TVM's own names the frequency too, and its common subexpressions are then moved before what they are made of.
position_embedding.rope_freq_llama3 = _scaled_frequency
