"""Conversations as token ids, with what of them is learned.

The tokenizer's own chat template writes the text. It is encoded in pieces, cut where the assistant begins and where
its stop token ends, just as it will be met when the model answers: the prompt alone, then token by token. So the
words of a question never change which tokens are trained: those of the answer, and the stop token.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from common.files import write_json
from data.chat import PLAIN_TEMPLATE, Conversation
from data.packing import Array
from data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Rendered:
    """A conversation's tokens."""

    ids: Array
    """(L) token ids."""
    trained: Array
    """(L) whether each is learned."""

    @property
    def length(self) -> int:
        """Positions that it takes in a row: the last token is only predicted."""
        return len(self.ids) - 1


Piece = tuple[str, bool]
"""A stretch of text and whether it is learned."""


class Renderer:
    """Turns conversations into tokens by the chat template of a tokenizer.

    Args:
        folder: with the tokenizer; one without a chat template gets :data:`data.chat.PLAIN_TEMPLATE`.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        self.tokenizer = Tokenizer(folder)
        _ = self.tokenizer.end  # says so now when there is no end token
        try:
            self._theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise UserError(f"the tokenizer in {folder} cannot be read: {error}") from error
        if not self._theirs.chat_template:
            self._theirs.chat_template = PLAIN_TEMPLATE
        self._check_pieces()

    @cached_property
    def stop(self) -> int:
        """Id of the token that ends an answer: the first special one after it in the template, else the end token."""
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        closing = self._text(turns).rpartition("b")[2]
        special = set(self._special.values())
        found = (id for id in self._encode([closing])[0].tolist() if id in special)
        return next(found, self.tokenizer.end)

    @property
    def stops(self) -> list[int]:
        """What a model that writes it has ended with: the stop token and the tokenizer's end token."""
        return list(dict.fromkeys([self.stop, self.tokenizer.end]))

    def render(self, conversations: Sequence[Conversation]) -> list[Rendered | None]:
        """The tokens of conversations without :meth:`misfits`; None where the template refuses one."""
        pieces = [self._pieces(one) for one in conversations]
        encoded = iter(self._encode([text for one in pieces for text, _ in one]))
        return [self._join([(next(encoded), learned) for _, learned in one]) if one else None for one in pieces]

    def prompt(self, messages: list[dict[str, str]]) -> list[int]:
        """The tokens after which the model answers; UserError when the template refuses the messages."""
        from jinja2 import TemplateError

        try:
            return self._encode([self._text(messages, answer=True)])[0].tolist()
        except (TemplateError, ValueError) as error:
            raise UserError(f"the chat template of {self.tokenizer.folder} refuses a question: {error}") from error

    def misfits(self, conversations: Sequence[Conversation]) -> list[str | None]:
        """Why each conversation cannot be rendered, or None: text that spells a special token would become one."""
        pattern = re.compile("|".join(map(re.escape, self._special)))
        return ["special token in the text" if pattern.search(one.text) else None for one in conversations]

    def write(self, folder: Path) -> None:
        """The tokenizer's files, the chat template inside ``tokenizer_config.json`` where every reader looks."""
        self.tokenizer.copy_to(folder)
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        config = folder / "tokenizer_config.json"
        values = json.loads(config.read_text(encoding="utf-8"))
        write_json(config, values | {"chat_template": self._theirs.chat_template})

    @cached_property
    def _special(self) -> dict[str, int]:
        added = self._theirs.backend_tokenizer.get_added_tokens_decoder()
        return {token.content: id for id, token in added.items() if token.special}

    @cached_property
    def _stop_text(self) -> str:
        return next(text for text, id in self._special.items() if id == self.stop)

    def _text(self, messages: list[dict[str, str]], *, answer: bool = False) -> str:
        return str(self._theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer))

    def _pieces(self, conversation: Conversation) -> list[Piece]:
        """The text of a conversation, in turn what is given and what is learned; nothing where the template refuses it.

        Where a template shows earlier turns otherwise than it did when they were the last (a reasoning model's, whose
        thoughts are then left out), only the last answer is learned.
        """
        from jinja2 import TemplateError

        messages = conversation.messages
        answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        pieces: list[Piece] = []
        done = ""
        try:
            texts = [(self._text(messages[:n], answer=True), self._text(messages[: n + 1])) for n in answers]
        except (TemplateError, ValueError):  # such as one without a system turn
            return []
        for prompt, whole in texts:
            if not (prompt.startswith(done) and whole.startswith(prompt)):
                return self._last_answer(messages[: answers[-1] + 1])
            answer = self._until_stop(whole[len(prompt) :])
            pieces += [(prompt[len(done) :], False), (answer, True)]
            done = prompt + answer
        return pieces

    def _last_answer(self, messages: list[dict[str, str]]) -> list[Piece]:
        prompt, whole = self._text(messages[:-1], answer=True), self._text(messages)
        answer = whole[len(prompt) :] if whole.startswith(prompt) else messages[-1]["content"]
        return [(prompt, False), (self._until_stop(answer), True)]

    def _check_pieces(self) -> None:
        """UserError when text in pieces becomes other tokens than in one, as SentencePiece's tokenizers begin every
        text with a space: what is trained would not be what is met."""
        pieces = self._pieces(Conversation((("user", "Say red."), ("assistant", "Red."))))
        ids = np.concatenate(self._encode([text for text, _ in pieces]))
        whole = self._encode(["".join(text for text, _ in pieces)])[0]
        if ids.tolist() != whole.tolist():
            raise UserError(
                f"the tokenizer in {self.tokenizer.folder} encodes a conversation otherwise than its turns one by one "
                "(SentencePiece's do); tokenizers of bytes, such as Llama-3's, Qwen's or Phi's, are taken"
            )

    def _until_stop(self, answer: str) -> str:
        """An answer up to its stop token, which is added where the template has none."""
        return answer.partition(self._stop_text)[0] + self._stop_text

    def _encode(self, texts: list[str]) -> list[Array]:
        encoded = self._theirs.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(one.ids, dtype=self.tokenizer.dtype) for one in encoded]

    def _join(self, pieces: list[tuple[Array, bool]]) -> Rendered:
        trained = [np.full(len(ids), learned) for ids, learned in pieces]
        return Rendered(np.concatenate([ids for ids, _ in pieces]), np.concatenate(trained))


def show(rendered: Rendered, tokenizer: Tokenizer) -> str:
    """A conversation's tokens with bars between them, those that are learned behind ``+``, the others behind ``-``.

    Tokens that are a character only together, as Chinese ones may be, stand together with their number.
    """
    changes = np.flatnonzero(np.diff(rendered.trained)) + 1
    lines = []
    for ids, learned in zip(np.split(rendered.ids, changes), np.split(rendered.trained, changes), strict=True):
        lines.append(f"{'+' if learned[0] else '-'} {'|'.join(_spelled(ids.tolist(), tokenizer))}")
    return "\n".join(lines)


def _spelled(ids: list[int], tokenizer: Tokenizer) -> Iterator[str]:
    group: list[int] = []
    for id in ids:
        group.append(id)
        text = tokenizer.decode(group, special=True)
        if "\ufffd" not in text or len(group) == 4:  # no character has more bytes
            yield text.replace("\n", "\\n") + (f"⟨{len(group)}⟩" if len(group) > 1 else "")
            group = []
    if group:
        yield f"⟨{len(group)}⟩"


def stops_of(generation: dict[str, Any], stops: list[int]) -> list[int]:
    """The ids that end an answer, and those that a folder's ``generation_config.json`` has already."""
    before = generation.get("eos_token_id")
    return list(
        dict.fromkeys([*stops, *(before if isinstance(before, list) else [before] if before is not None else [])])
    )
