"""The models that ours is measured against, with its shape and its weights: transformers' Llama and litgpt's GPT.

litgpt is wanted by none but these measurements, and pins versions that are not ours. What its model needs is
there already, so it may lie in a folder of its own:

    pip install --no-deps --target /tmp/peers litgpt==0.5.13
    PYTHONPATH=/tmp/peers python bench/train_step.py
"""

import importlib
import importlib.metadata
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from models.hf_config import to_config
from models.sizes import ModelConfig

LITGPT_BLOCK = {
    "norm_1": "attention_norm",
    "attn.qkv": "attention.qkv",
    "attn.proj": "attention.out",
    "norm_2": "ffn_norm",
    "mlp.proj": "ffn.down",
}
"""Modules of a block of litgpt's, and ours with the same weight."""


@dataclass(frozen=True)
class Batch:
    """The rows of a step (B, T); every token has a target."""

    tokens: Tensor
    targets: Tensor
    positions: Tensor | None
    """Each token's place in its document; None where every row is one document."""

    @classmethod
    def random(cls, config: ModelConfig, rows: int, seq_len: int, device: str, packed: bool = False) -> "Batch":
        """Random tokens; packed rows hold four documents of about equal length."""
        generator = torch.Generator().manual_seed(0)
        text = torch.randint(config.vocab, (rows, seq_len + 1), generator=generator).to(device)
        positions = torch.arange(seq_len, device=device).remainder(-(-seq_len // 4)).repeat(rows, 1) if packed else None
        return cls(text[:, :-1].contiguous(), text[:, 1:].contiguous(), positions)


def llama(config: ModelConfig, *, causal: bool = False) -> Any:
    """transformers' Llama, on torch's default device, ready to train.

    Compiled it cannot see that a row is one document, and gives SDPA a mask, which flash attention does not take.
    ``causal`` leaves its mask out, so that SDPA is told "causal" and nothing else: its best, not its default.
    """
    transformers.AttentionInterface.register("causal_sdpa", sdpa_attention_forward)  # no mask belongs to this name
    values = to_config(config, bos=None, eos=0, pad=None) | {"attn_implementation": "causal_sdpa" if causal else "sdpa"}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**values)).train()


def llama_loss(model: Any, batch: Batch) -> Tensor:
    """Mean loss of a batch."""
    # labels only make it compute a loss; the targets are already shifted
    output = model(
        input_ids=batch.tokens,
        position_ids=batch.positions,
        labels=batch.targets,
        shift_labels=batch.targets,
        use_cache=False,
    )
    return output.loss


def litgpt(config: ModelConfig) -> Any:
    """litgpt's GPT, on torch's default device; it must be installed, see :func:`why_no_litgpt`."""
    module = importlib.import_module("litgpt.model")
    shape = module.Config(
        name="llama",
        block_size=config.context,
        n_layer=config.layers,
        n_embd=config.width,
        n_head=config.heads,
        n_query_groups=config.kv_heads,
        head_size=config.head_width,
        intermediate_size=config.ffn,
        vocab_size=config.vocab,
        padded_vocab_size=config.vocab,
        rotary_percentage=1.0,
        rope_base=int(config.rope_theta),
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        norm_eps=config.norm_eps,
        mlp_class_name="LLaMAMLP",
    )
    model = module.GPT(shape)
    if config.tied:
        model.transformer.wte.weight = model.lm_head.weight
    return model


def litgpt_loss(model: Any, batch: Batch) -> Tensor:
    """Mean loss of a batch of whole rows, as its pre-training takes it."""
    loss = importlib.import_module("litgpt.utils").chunked_cross_entropy
    return loss(model(batch.tokens), batch.targets)


def to_litgpt(state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Our state dict under litgpt's names."""
    out = {
        "lm_head.weight": state["head.weight"],
        "transformer.wte.weight": state["embedding.weight"],
        "transformer.ln_f.weight": state["norm.weight"],
    }
    for layer in range(config.layers):
        ours, theirs = f"blocks.{layer}.", f"transformer.h.{layer}."
        gate, up = state[ours + "ffn.gate_up.weight"].chunk(2)
        out[theirs + "mlp.fc_1.weight"], out[theirs + "mlp.fc_2.weight"] = gate, up
        out |= {f"{theirs}{name}.weight": state[f"{ours}{other}.weight"] for name, other in LITGPT_BLOCK.items()}
    return out


def why_no_litgpt() -> str | None:
    """Why litgpt takes no part; None when it does."""
    try:
        importlib.import_module("litgpt.model")
    except ModuleNotFoundError as error:
        return "not installed" if (error.name or "").startswith("litgpt") else f"cannot be imported: {error}"
    except ImportError as error:
        return f"cannot be imported: {error}"
    return None


def litgpt_version() -> str:
    """Its version."""
    return importlib.metadata.version("litgpt")
