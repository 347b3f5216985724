"""Greedy answers from vLLM, where it is installed: for GPUs, and many prompts.

Prompts are the same tokens as :class:`scoring.generation.Generator`'s, cut alike, and end at the same tokens, so that
the answers differ only where two tokens are nearly as likely. vLLM forms its own batches as it goes, so two runs may
differ there too.
"""

import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from common.errors import UserError
from scoring.generation import GenerationSettings, beginning, context_of, end_tokens
from scoring.loading import load_tokenizer
from scoring.requests import Keep, Request

CHUNK = 512
"""Requests that vLLM gets at a time: enough to keep a GPU busy, and no more are lost when a run is killed."""


class VllmGenerator:
    """A model folder answering through vLLM.

    Args:
        folder: a model folder.
        settings: the context and the form of prompts; vLLM chooses batches by itself and writes every answer to its
            end.
        dtype: float16, bfloat16 or float32; OpenCompass's default is float16.
        say: is told what of the settings vLLM does not do.

    Raises:
        UserError: vLLM is not installed, or the folder is no model folder.
    """

    def __init__(
        self,
        folder: Path,
        settings: GenerationSettings | None = None,
        *,
        dtype: str = "float16",
        say: Callable[[str], None] = print,
    ) -> None:
        try:
            import vllm
        except ImportError as error:
            raise UserError(
                f"vLLM is not installed here ({error}): pip install vllm into an environment with a GPU, or leave the "
                "engine to transformers"
            ) from error
        self._vllm, self._folder, self._dtype = vllm, folder, dtype
        self.settings = settings or GenerationSettings()
        self.tokenizer = load_tokenizer(folder)
        self.tokenizer.truncation_side = "left"
        self._described = described(folder)
        self.limit = self.settings.max_seq_len or context_of(self._described)
        self._ends = sorted(end_tokens(self._described, self.tokenizer, chat=self.settings.chat))
        self._end_texts = [self.tokenizer.decode([end]) for end in self._ends] if self.settings.chat else []
        self._engine: Any = None
        self._longest = 0
        if self.settings.early_stop:
            say("vLLM has no early stop: answers are written to their end, and score the same")

    @property
    def asked(self) -> dict[str, Any]:
        """What decides the answers besides the model's weights."""
        versions = {"vllm": self._vllm.__version__}
        form = {"chat": self.settings.chat, "max_seq_len": self.limit}
        return {"engine": "vllm", "dtype": self._dtype} | form | versions

    def generate(self, requests: Sequence[Request], keep: Keep) -> None:
        """Answer every request, a chunk at a time, handing each answer to ``keep`` when its chunk is done."""
        prompts = [self._encode(request.prompt) for request in requests]
        pairs = zip(prompts, requests, strict=True)
        longest = max((len(ids) + request.max_new_tokens for ids, request in pairs), default=0)
        engine = self._engine_for(longest)
        for first in range(0, len(requests), CHUNK):
            chunk = requests[first : first + CHUNK]
            answers = engine.generate(
                [{"prompt_token_ids": ids} for ids in prompts[first : first + CHUNK]],
                [self._sampling(request) for request in chunk],
                use_tqdm=False,
            )
            for request, answer in zip(chunk, answers, strict=True):
                keep(request, self._text(answer.outputs[0].token_ids))

    def _engine_for(self, longest: int) -> Any:
        """vLLM's engine for prompts and answers of ``longest`` tokens together; a larger one replaces a smaller one."""
        if longest <= self._longest:
            return self._engine
        self._engine = None
        gc.collect()
        # OpenCompass keeps no room for the answer, which may run past the context: vLLM wants to be told of the places.
        beyond = {"max_position_embeddings": longest} if longest > context_of(self._described) else {}
        try:
            self._engine = self._vllm.LLM(
                model=str(self._folder),
                dtype=self._dtype,
                max_model_len=longest,
                hf_overrides=beyond,
                trust_remote_code=False,
                load_format="safetensors",
                seed=0,
            )
        except (ValueError, RuntimeError, OSError) as error:
            raise UserError(f"vLLM cannot run {self._folder}: {' '.join(str(error).split())[:300]}") from error
        self._longest = longest
        return self._engine

    def _sampling(self, request: Request) -> Any:
        return self._vllm.SamplingParams(
            temperature=0.0,
            max_tokens=request.max_new_tokens,
            repetition_penalty=self._described.generation_config.repetition_penalty or 1.0,
            ignore_eos=True,  # vLLM would take the tokenizer's too, which end no answer of a base model
            stop_token_ids=self._ends,
            detokenize=False,
        )

    def _encode(self, prompt: str) -> list[int]:
        special = not self.settings.chat
        ids = self.tokenizer(prompt, add_special_tokens=special, truncation=True, max_length=self.limit)["input_ids"]
        return list(ids) or [beginning(self.tokenizer)]

    def _text(self, ids: Sequence[int]) -> str:
        """What was written, as :class:`scoring.generation.Generator` reads it."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=not self.settings.chat)
        for end in self._end_texts:
            text = text.partition(end)[0]
        return text


def described(folder: Path) -> Any:
    """What a folder says of its model, under transformers' names: ``config`` and ``generation_config``."""
    from transformers import AutoConfig, GenerationConfig

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is no model folder: {' '.join(str(error).split())[:300]}") from error
    try:
        generation = GenerationConfig.from_pretrained(folder, local_files_only=True)
    except OSError:  # without generation_config.json transformers takes it from config.json
        generation = GenerationConfig.from_model_config(config)
    return SimpleNamespace(config=config, generation_config=generation)
