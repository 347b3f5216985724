"""A stand-in for vLLM: its interface, as far as it is used, over transformers' own greedy search, a prompt at a time.

vLLM itself has no build for a machine without a GPU. What it refuses is refused here too.
"""

from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from transformers import AutoConfig, AutoModelForCausalLM

__version__ = "0.0-stand-in"
ENGINES: list["LLM"] = []


@dataclass
class SamplingParams:
    temperature: float = 1.0
    max_tokens: int | None = 16
    repetition_penalty: float = 1.0
    ignore_eos: bool = False
    stop_token_ids: list[int] = field(default_factory=list)
    detokenize: bool = True


class LLM:
    def __init__(self, model, *, dtype, max_model_len, hf_overrides, trust_remote_code, load_format, seed):
        assert not trust_remote_code
        assert load_format == "safetensors"
        config = AutoConfig.from_pretrained(model)
        for name, value in hf_overrides.items():
            setattr(config, name, value)
        if max_model_len > config.max_position_embeddings:
            raise ValueError(f"max_model_len ({max_model_len}) is greater than the model's context")
        self.max_model_len, self.calls = max_model_len, []
        self.model = AutoModelForCausalLM.from_pretrained(model, config=config, dtype=getattr(torch, dtype)).eval()
        ENGINES.append(self)

    def generate(self, prompts, sampling_params, *, use_tqdm):
        assert not use_tqdm
        self.calls.append(len(prompts))
        return [
            SimpleNamespace(outputs=[SimpleNamespace(token_ids=self._write(prompt["prompt_token_ids"], sampling))])
            for prompt, sampling in zip(prompts, sampling_params, strict=True)
        ]

    @torch.no_grad()
    def _write(self, ids, sampling):
        assert sampling.temperature == 0
        assert sampling.ignore_eos
        if len(ids) >= self.max_model_len:
            raise ValueError(f"the prompt ({len(ids)}) is longer than max_model_len ({self.max_model_len})")
        written = []
        while len(written) < sampling.max_tokens and len(ids) + len(written) < self.max_model_len:
            logits = self.model(torch.tensor([ids + written])).logits[0, -1]
            written.append(int(logits.argmax()))
            if written[-1] in sampling.stop_token_ids:
                break
        return tuple(written)
