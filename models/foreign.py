"""Model folders from elsewhere as modules that train like our transformer.

What our transformer can be (Llama and Qwen3 without biases or scaled rotary embedding) it is; the rest, Qwen2,
Phi and the other Llamas, is transformers' own model behind the same few attributes, so that the engine, the loop
and the evaluation do not ask which it is.

Shapes: B batch, T sequence, D model width, V vocabulary, M = B·T tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.hf import WeightFiles, checked_shape, our_values, to_hugging_face
from models.hf_config import from_config, is_ours, nearest_shape, taken_values
from models.sizes import ModelConfig
from models.transformer import HEAD_CHUNK, IGNORE, HeadLoss, Transformer, compute_dtype

DROPOUT = ("attention_dropout", "embd_pdrop", "resid_pdrop")
"""Settings of dropout, which the loop does without: its random numbers would make a run depend on where it stopped and
on how many ranks there are. Phi-2's published configuration has some."""


@dataclass(frozen=True)
class Architecture:
    """The model that a ``config.json`` describes, ours where ours can be it."""

    values: dict[str, Any]
    """The contents of ``config.json``."""
    own: ModelConfig | None
    """The shape of our transformer; None for a foreign model."""
    nearest: ModelConfig
    """The shape of ours that comes nearest."""

    @classmethod
    def of(cls, folder: Path) -> "Architecture":
        """Of a model folder or a checkpoint.

        Raises:
            UserError: it is none, of an architecture that is not taken, or its weights are quantised.
        """
        values = taken_values(folder)
        return cls(values, from_config(values, folder) if is_ours(values) else None, nearest_shape(values, folder))

    @property
    def shape(self) -> ModelConfig:
        """The shape, of a foreign model the nearest one: for the arithmetic of memory and FLOPs."""
        return self.own or self.nearest

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are stored in; older folders call it ``torch_dtype``."""
        name = self.values.get("dtype") or self.values.get("torch_dtype") or "float32"
        return cast(torch.dtype, getattr(torch, name))

    def build(self) -> "Transformer | Foreign":
        """The model, without weights when torch's default device is meta."""
        return Transformer(self.own, seed=None) if self.own is not None else Foreign(self.values)

    def read(self, folder: Path) -> Callable[[str, torch.Size], Tensor]:
        """The weights of a model folder by the names of :meth:`build`, each read when it is asked for with its shape.

        Raises:
            UserError: one is missing, or of another shape.
        """
        if self.own is not None:
            return our_values(folder, self.own)
        files = WeightFiles(folder)
        return lambda name, shape: checked_shape(files.read(name.removeprefix("hf.")).float(), name, shape, folder)

    def hugging_face(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights by the names of :meth:`build`, under the names of a model folder."""
        if self.own is None:
            return {name.removeprefix("hf."): tensor for name, tensor in state.items()}
        head = {"head.weight": state["embedding.weight"]} if self.own.tied else {}
        return to_hugging_face(state | head, self.own)


class Foreign(nn.Module):
    """One of transformers' models, called as :class:`models.transformer.Transformer` is.

    Args:
        values: the contents of its ``config.json``.
    """

    def __init__(self, values: dict[str, Any]) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        super().__init__()
        config = AutoConfig.for_model(**(values | dict.fromkeys(DROPOUT, 0.0)))
        config.use_cache = False
        self.hf = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
        with torch.device("cpu"):  # its table of frequencies is no weight, so nothing would fill it later
            self.hf.model.rotary_emb = type(self.hf.model.rotary_emb)(config)
        self._checkpointing = "none"
        self._plain: dict[nn.Module, Callable[..., Any]] = {}

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder layers."""
        return cast(nn.ModuleList, self.hf.model.layers)

    @property
    def checkpointing(self) -> str:
        """What the backward pass recomputes: none or full, whole blocks."""
        return self._checkpointing

    @checkpointing.setter
    def checkpointing(self, mode: str) -> None:
        self._checkpointing = "none" if mode == "none" else "full"
        for block in self.blocks:
            plain = self._plain.setdefault(block, block.forward)
            block.forward = plain if mode == "none" else partial(checkpoint, plain, use_reentrant=False)

    def compile_parts(self) -> None:
        """Compile each decoder layer; before :attr:`checkpointing` is set, which stays outside of it."""
        torch._dynamo.config.optimize_ddp = False  # as in models/transformer.py
        for block in self.blocks:
            block.forward = torch.compile(block.forward, dynamic=False)

    def forward(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor | None = None,
        targets_BT: Tensor | None = None,
        *,
        head_loss: HeadLoss | None = None,
    ) -> Any:
        """As :meth:`models.transformer.Transformer.forward`, without z-loss."""
        mask = None
        if positions_BT is not None:
            mask = visible(positions_BT, compute_dtype(self.hf.model.embed_tokens.weight))
        hidden_BTD = self.hf.model(
            input_ids=tokens_BT, attention_mask=mask, position_ids=positions_BT, use_cache=False
        ).last_hidden_state
        if targets_BT is None:
            return self.hf.lm_head(hidden_BTD)
        return (head_loss or cross_entropy)(hidden_BTD.flatten(0, 1), self.hf.lm_head, targets_BT.flatten())


def visible(positions_BT: Tensor, dtype: torch.dtype) -> Tensor:
    """An additive mask (B, 1, T, T): 0 where a position may look, itself and before it in its own document.

    The least number that the dtype has stands elsewhere, as transformers has it.
    """
    documents_BT = (positions_BT == 0).cumsum(1)
    same = documents_BT[:, None, :, None] == documents_BT[:, None, None, :]
    causal = torch.ones_like(same[0, 0]).tril()
    return torch.zeros_like(same, dtype=dtype).masked_fill(~(same & causal), torch.finfo(dtype).min)


def cross_entropy(hidden_MD: Tensor, head: nn.Linear, targets_M: Tensor) -> tuple[Tensor, Tensor]:
    """The summed loss and negative log-likelihood of :meth:`models.transformer.Transformer.forward`."""

    def chunk(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        nll = F.cross_entropy(logits.float(), targets, reduction="sum")
        return nll, nll.detach()

    predicts = targets_M != IGNORE
    return summed_by_chunks(chunk, hidden_MD[predicts], head, targets_M[predicts])


def summed_by_chunks(
    chunk: Callable[..., tuple[Tensor, Tensor]], hidden_MD: Tensor, head: nn.Linear, *rest: Tensor
) -> tuple[Tensor, Tensor]:
    """Sum ``chunk(logits, *rest)`` over chunks of tokens whose logits exist one at a time.

    Args:
        chunk: gives a loss and a figure without gradient.
        hidden_MD: of the tokens that are predicted, which may be none.
        head: the head.
        rest: more values of each token.
    """
    # By their names: ZeRO-3 gathers a weight that is asked for so.
    loss, figure = _ByChunks.apply(chunk, rest, torch.is_grad_enabled(), hidden_MD, head.weight, head.bias)
    return loss, figure


class _ByChunks(torch.autograd.Function):
    """Takes the gradients of each chunk while its logits exist, as :class:`models.transformer.ChunkedCrossEntropy`.

    Nothing is computed twice then, and every weight of the head gets a gradient, also where no token is predicted:
    ranks exchange the gradients of all.
    """

    @staticmethod
    def forward(
        ctx: Any,
        chunk: Callable[..., tuple[Tensor, Tensor]],
        rest: Sequence[Tensor],
        with_gradients: bool,  # asked outside: gradients are never enabled in here
        hidden_MD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        size = HEAD_CHUNK[hidden_MD.device.type]
        loss = torch.zeros((), device=hidden_MD.device)
        figure = torch.zeros_like(loss)
        trained = [one for one in (weight_VD, bias_V) if with_gradients and one is not None and one.requires_grad]
        d_trained = [torch.zeros_like(weight, dtype=torch.float32) for weight in trained]
        d_hidden_MD = torch.empty_like(hidden_MD) if with_gradients else None
        for first in range(0, len(hidden_MD), size):
            hidden, *others = (tensor[first : first + size] for tensor in (hidden_MD, *rest))
            with torch.set_grad_enabled(with_gradients):
                hidden = hidden.detach().requires_grad_(with_gradients)
                one, other = chunk(F.linear(hidden, weight_VD, bias_V), *others)
            loss, figure = loss + one.detach(), figure + other
            if d_hidden_MD is not None:
                d_hidden_MD[first : first + size], *slopes = torch.autograd.grad(one, [hidden, *trained])
                for total, slope in zip(d_trained, slopes, strict=True):
                    total += slope
        ctx.save_for_backward(d_hidden_MD, *d_trained)
        ctx.dtypes = [one.dtype for one in trained]
        ctx.mark_non_differentiable(figure)
        return loss, figure

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor, d_figure: Tensor) -> Any:
        d_hidden_MD, *d_trained = ctx.saved_tensors
        found = iter((total * d_loss).to(dtype) for total, dtype in zip(d_trained, ctx.dtypes, strict=True))
        d_weight, d_bias = (next(found) if needed else None for needed in ctx.needs_input_grad[4:])
        return None, None, None, d_hidden_MD * d_loss.to(d_hidden_MD.dtype), d_weight, d_bias
