"""The model wrapper of palmtop's folders for OpenCompass 0.3.1; it lies beside the configuration and needs no more.

OpenCompass's own wrapper, but for two things: a tokenizer that transformers 5 wrote, as its class names it, is unknown
to the older transformers that OpenCompass needs, so its ``tokenizer.json`` is read as it is; and nothing that is run
comes out of the folder, neither code nor pickled weights.
"""

import json
from pathlib import Path
from typing import Any

from opencompass.models import (  # type: ignore[import-not-found]
    HuggingFaceBaseModel,
    HuggingFacewithChatTemplate,
)
from transformers import PreTrainedTokenizerFast

NEWER_CLASS = "TokenizersBackend"
"""What transformers 5 calls a tokenizer that is its tokenizer.json and nothing else."""

SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


class _ModelFolder:
    """What both forms load in another way than OpenCompass does."""

    tokenizer: Any

    def _load_tokenizer(self, path: str, kwargs: dict[str, Any], pad_token_id: int | None = None) -> None:
        settings = json.loads((Path(path) / "tokenizer_config.json").read_text(encoding="utf-8"))
        if settings.get("tokenizer_class") != NEWER_CLASS:
            super()._load_tokenizer(path, {"trust_remote_code": False, **kwargs}, pad_token_id)  # type: ignore[misc]
            return
        self.tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=str(Path(path) / "tokenizer.json"),
            chat_template=settings.get("chat_template"),
            clean_up_tokenization_spaces=settings.get("clean_up_tokenization_spaces", False),
            padding_side="left",
            truncation_side="left",
            model_input_names=["input_ids", "attention_mask"],  # by default also a third, which no causal model takes
            **{name: settings[name] for name in SPECIAL if settings.get(name)},
            **kwargs,
        )
        if pad_token_id is not None:
            self.tokenizer.pad_token_id = pad_token_id
        elif self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    def _load_model(self, path: str, kwargs: dict[str, Any], **adapter: Any) -> None:
        safe = {"trust_remote_code": False, "use_safetensors": True, **kwargs}
        super()._load_model(path, safe, **adapter)  # type: ignore[misc]


class PalmtopBase(_ModelFolder, HuggingFaceBaseModel):
    """A model that goes on with a text."""


class PalmtopChat(_ModelFolder, HuggingFacewithChatTemplate):
    """A model that answers through the chat template of its folder."""
