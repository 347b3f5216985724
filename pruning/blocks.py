"""A model folder block by block: what is in memory is one block, and the hidden states that go into it.

transformers' own decoder layers are filled from the safetensors files and run in fp32; each is split in two halves
that end in a linear layer, because pruning wants what that layer reads: the feed-forward units, or the heads' outputs.

Shapes: B rows, T tokens in a row, D model width, V vocabulary, H query heads, N head width, F feed-forward width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError
from data.packing import IGNORE, Batch
from models.foreign import DROPOUT, visible
from models.hf import WeightFiles, checked_shape
from models.hf_config import taken_values
from pruning.head import HEAD_TOKENS, Head

CHUNK = 4096
"""Tokens that go through a block at one time."""

Hidden = list[Tensor]
"""Hidden states (B, T, D) of all rows between two blocks, in host memory, by chunks of rows."""


@dataclass(frozen=True)
class Parts:
    """What an architecture calls the linear layers of a block."""

    queries: str
    keys_values: tuple[str, str]
    attention_out: str
    ffn_in: tuple[str, ...]
    ffn_out: str
    parallel: bool
    """Both halves read the block's input; otherwise the second reads what the first has added to."""


GATED = Parts(
    queries="self_attn.q_proj",
    keys_values=("self_attn.k_proj", "self_attn.v_proj"),
    attention_out="self_attn.o_proj",
    ffn_in=("mlp.gate_proj", "mlp.up_proj"),
    ffn_out="mlp.down_proj",
    parallel=False,
)
PHI = Parts(
    queries="self_attn.q_proj",
    keys_values=("self_attn.k_proj", "self_attn.v_proj"),
    attention_out="self_attn.dense",
    ffn_in=("mlp.fc1",),
    ffn_out="mlp.fc2",
    parallel=True,
)


def parts_of(values: dict[str, Any]) -> Parts:
    """The names for the architecture of a ``config.json``."""
    return PHI if values["architectures"][0] == "PhiForCausalLM" else GATED


@dataclass(frozen=True)
class Rows:
    """Packed rows, by the chunks that go through a block at one time, all (B, T)."""

    inputs: tuple[Tensor, ...]
    targets: tuple[Tensor, ...]
    positions: tuple[Tensor, ...]
    fitted: int
    """Chunks that weights are fitted to; those after them tell how well that holds for other text."""

    @classmethod
    def of(cls, batch: Batch, names: list[int] | None = None, apart: int = 0) -> "Rows":
        """Cut a batch into chunks.

        Args:
            batch: the rows.
            names: what its ids are places in, where they are.
            apart: rows at the end that nothing is fitted to.
        """
        inputs, targets, positions = (
            torch.from_numpy(part.copy()) for part in (batch.inputs, batch.targets, batch.positions)
        )
        if names is not None:
            lookup = torch.tensor(names)
            inputs, targets = lookup[inputs], torch.where(targets == IGNORE, IGNORE, lookup[targets.clamp_min(0)])
        rows, fitted = max(1, CHUNK // inputs.shape[1]), len(inputs) - apart
        sizes = [min(rows, fitted - start) for start in range(0, fitted, rows)]
        chunks = len(sizes)
        sizes += [min(rows, apart - start) for start in range(0, apart, rows)]
        return cls(inputs.split(sizes), targets.split(sizes), positions.split(sizes), chunks)

    @property
    def count(self) -> int:
        """B."""
        return sum(map(len, self.inputs))

    def first(self, tokens: int) -> "Rows":
        """The first chunks, that have so many tokens or all."""
        chunks = max(1, -(-tokens // self.inputs[0].numel()))
        return Rows(self.inputs[:chunks], self.targets[:chunks], self.positions[:chunks], min(chunks, self.fitted))

    @property
    def predicted(self) -> int:
        """Tokens that are targets."""
        return sum(int((chunk != IGNORE).sum()) for chunk in self.targets)


class Block(nn.Module):
    """A decoder layer in fp32, the layers that read its units apart.

    Args:
        values: the ``config.json`` that its tensors are shaped by.
        tensors: the weights by their names inside the block.
        device: where it is run.
    """

    def __init__(self, values: dict[str, Any], tensors: dict[str, Tensor], device: torch.device) -> None:
        super().__init__()
        parts, skeleton = parts_of(values), _one_block(values)
        self.parallel = parts.parallel
        self.layer = skeleton.model.layers[0]
        self.layer.load_state_dict({name: tensor.to(device).float() for name, tensor in tensors.items()}, assign=True)
        self.attention_out = self._taken(parts.attention_out)
        self.ffn_out = self._taken(parts.ffn_out)
        with device:  # its table of frequencies is no weight
            self.rotary = type(skeleton.model.rotary_emb)(skeleton.config)
        self.eval().requires_grad_(False)

    def _taken(self, name: str) -> nn.Linear:
        """Put an identity in the place of a linear layer."""
        owner, _, attribute = name.rpartition(".")
        module = self.layer.get_submodule(owner)
        linear = getattr(module, attribute)
        setattr(module, attribute, nn.Identity())
        return cast(nn.Linear, linear)

    def attention_units(self, hidden_BTD: Tensor, positions_BT: Tensor) -> Tensor:
        """What the heads found (B, T, H·N), which ``attention_out`` reads."""
        normed = self.layer.input_layernorm(hidden_BTD)
        units, _ = self.layer.self_attn(
            hidden_states=normed,
            attention_mask=visible(positions_BT, normed.dtype),
            position_embeddings=self.rotary(normed, positions_BT),
            position_ids=positions_BT,
        )
        return cast(Tensor, units)

    def ffn_units(self, hidden_BTD: Tensor, middle_BTD: Tensor) -> Tensor:
        """The feed-forward units (B, T, F), which ``ffn_out`` reads.

        Args:
            hidden_BTD: the block's input.
            middle_BTD: with attention's output added.
        """
        if self.parallel:
            return cast(Tensor, self.layer.mlp(self.layer.input_layernorm(hidden_BTD)))
        return cast(Tensor, self.layer.mlp(self.layer.post_attention_layernorm(middle_BTD)))

    def forward(self, hidden_BTD: Tensor, positions_BT: Tensor) -> Tensor:
        """The block's output."""
        middle = hidden_BTD + self.attention_out(self.attention_units(hidden_BTD, positions_BT))
        return middle + cast(Tensor, self.ffn_out(self.ffn_units(hidden_BTD, middle)))


class Blocks:
    """A model folder whose blocks are read when they are asked for.

    Raises:
        UserError: it is none, of an architecture that is not taken, or its weights are no safetensors.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder, self.device = folder, device
        self.values = taken_values(folder)
        self._files = WeightFiles(folder)
        with torch.device("meta"):
            self._skeleton = _one_block(self.values)

    @property
    def layers(self) -> int:
        """How many blocks there are."""
        return int(self.values["num_hidden_layers"])

    @property
    def _tied(self) -> bool:
        """Whether the head is the embedding."""
        return bool(self.values.get("tie_word_embeddings", False))

    @cached_property
    def stored(self) -> torch.dtype:
        """What the blocks' weights are stored in."""
        return self.tensors(0)[f"{parts_of(self.values).queries}.weight"].dtype

    @property
    def _kept(self) -> torch.dtype:
        """Of hidden states in host memory: fp32 for fp32 weights, else bf16, which holds what fp16 cannot."""
        return torch.float32 if self.stored == torch.float32 else torch.bfloat16

    def tensors(self, layer: int) -> dict[str, Tensor]:
        """The weights of a block by their names inside it, as they are stored.

        Raises:
            UserError: one is missing, or of another shape than ``config.json`` promises.
        """
        expected = self._skeleton.model.layers[0].named_parameters()
        return {name: self._read(f"model.layers.{layer}.{name}", one.shape) for name, one in expected}

    def ends(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the weights outside the blocks; a tied head is not among them."""
        tied = {"lm_head.weight"} if self._tied else set()
        return {
            name: tuple(one.shape)
            for name, one in self._skeleton.named_parameters()
            if not name.startswith("model.layers.") and name not in tied
        }

    def end(self, name: str) -> Tensor:
        """A weight outside the blocks as it is stored; raises as :meth:`tensors`."""
        return self._read(name, torch.Size(self.ends()[name]))

    @property
    def _norm(self) -> str:
        """What the architecture calls the norm after the last block."""
        return "final_layernorm" if hasattr(self._skeleton.model, "final_layernorm") else "norm"

    def last_norm(self) -> dict[str, Tensor]:
        """The weights of the norm after the last block, by their names in the folder, as they are stored."""
        return {name: self.end(name) for name in self.ends() if name.startswith(f"model.{self._norm}.")}

    def block(self, layer: int) -> Block:
        """A block as it is in the folder."""
        return Block(self.values, self.tensors(layer), self.device)

    def embed(self, rows: Rows) -> Hidden:
        """What goes into the first block."""
        matrix_VD = self.end("model.embed_tokens.weight")
        return [F.embedding(tokens, matrix_VD).to(self._kept) for tokens in rows.inputs]

    def through(self, step: Callable[[Tensor, Tensor], Tensor], hidden: Hidden, rows: Rows) -> None:
        """Replace the hidden states by what ``step(hidden_BTD, positions_BT)`` makes of them, chunk by chunk."""
        for number, positions in enumerate(rows.positions):
            hidden[number] = self.keep(step(self.fetch(hidden[number]), positions.to(self.device)))

    def fetch(self, hidden_BTD: Tensor) -> Tensor:
        """Hidden states from host memory, in fp32 on the device."""
        return hidden_BTD.to(self.device).float()

    def keep(self, hidden_BTD: Tensor) -> Tensor:
        """Hidden states for host memory."""
        return hidden_BTD.to("cpu", self._kept)

    def nats(self, hidden: Hidden, rows: Rows) -> float:
        """The summed negative log-likelihood of all targets, from what comes out of the last block."""
        head, total = self.head(), 0.0
        for chunk, targets in zip(hidden, rows.targets, strict=True):
            states_MD, targets_M = chunk.flatten(0, 1), targets.flatten()
            predicts = targets_M != IGNORE
            parts = zip(states_MD[predicts].split(HEAD_TOKENS), targets_M[predicts].split(HEAD_TOKENS), strict=True)
            for states, wanted in parts:
                total += head.nll(self.fetch(states), wanted)
        return total

    def expected(self, hidden: Hidden, rows: Rows) -> Tensor:
        """The mean over the places of all targets of the probability that is predicted for each token (V,).

        Args:
            hidden: what comes out of the last block.
            rows: the text, with a target at least.
        """
        head, total_V = self.head(), torch.zeros(int(self.values["vocab_size"]), dtype=torch.float64)
        for chunk, targets in zip(hidden, rows.targets, strict=True):
            for states in chunk.flatten(0, 1)[targets.flatten() != IGNORE].split(HEAD_TOKENS):
                total_V += head.chances(self.fetch(states)).cpu()
        return total_V / rows.predicted

    def slopes(self, hidden: Hidden, rows: Rows, generator: torch.Generator) -> Hidden:
        """The gradient of the negative log-likelihood of tokens that are drawn from the model's own prediction.

        Args:
            hidden: what comes out of the last block.
            rows: the text; where it has no target, nothing is drawn and the gradient is 0.
            generator: draws.

        Returns:
            The gradient with respect to ``hidden``.
        """
        head, found = self.head(), []
        for chunk, targets in zip(hidden, rows.targets, strict=True):
            slopes_MD = torch.zeros(targets.numel(), chunk.shape[-1])
            for part in (targets.flatten() != IGNORE).nonzero().squeeze(1).split(HEAD_TOKENS):
                slopes_MD[part] = head.slope(self.fetch(chunk.flatten(0, 1)[part]), generator).cpu()
            found.append(self.keep(slopes_MD.view(chunk.shape)))
        return found

    def head(self, kept: list[int] | None = None) -> Head:
        """What stands after the last block.

        Args:
            kept: the tokens that it predicts; None: all.
        """
        linear = self._skeleton.lm_head
        norm = getattr(_one_block(self.values).model, self._norm)
        weights = {name.rpartition(".")[2]: one.to(self.device).float() for name, one in self.last_norm().items()}
        norm.load_state_dict(weights, assign=True)
        weight_VD = self.end("model.embed_tokens.weight" if self._tied else "lm_head.weight")
        bias_V = torch.zeros(len(weight_VD)) if linear.bias is None else self.end("lm_head.bias").float()
        if kept is not None:
            weight_VD, bias_V = weight_VD[kept], bias_V[kept]
        return Head(norm.requires_grad_(False), weight_VD, bias_V.to(self.device))

    def _read(self, name: str, shape: torch.Size) -> Tensor:
        tensor = checked_shape(self._files.read(name), name, shape, self.folder)
        if not tensor.is_floating_point():
            raise UserError(
                f"the weights of {self.folder} are quantised ({name} is {tensor.dtype}); give unquantised ones"
            )
        return tensor


def _one_block(values: dict[str, Any]) -> Any:
    """transformers' model of one layer, without weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    one = values | dict.fromkeys(DROPOUT, 0.0) | {"num_hidden_layers": 1, "layer_types": None}
    config = AutoConfig.for_model(**one)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
