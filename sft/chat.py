"""``python -m sft chat MODEL``: talk with a model in the terminal, or answer the lines of a pipe."""

import io
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from common.console import Console
from common.errors import UserError
from common.settings import parse
from data.chat import Conversation
from models.folder import check_model
from sft.chat_settings import ChatSettings

if TYPE_CHECKING:
    from torch import Tensor

DESCRIPTION = """\
Talk with a model in the terminal. Lines that come through a pipe are answered one by one.

examples:
  python -m sft chat runs/my-chat/model
  echo 'What is the capital of France?' | python -m sft chat runs/my-chat/model --temperature 0
"""

HELP = """\
  /reset         forget the conversation; the system turn stays
  /system TEXT   forget the conversation and make TEXT the system turn; without TEXT there is none
  /help          this list
  /quit          leave, like Ctrl-D; Ctrl-C stops an answer
  A space before the / makes such a line a message."""


def chat_command(argv: list[str]) -> None:
    """Parse, load and talk until the user leaves."""
    settings = parse(ChatSettings, argv, prog="python -m sft chat", description=DESCRIPTION, positional="model")
    assistant = Assistant.load(settings)
    model, choice = assistant.model, f"temperature {settings.temperature:g}, top-p {settings.top_p:g}"
    for stream in (sys.stdin, sys.stdout):  # what the terminal's encoding does not know must not end the chat
        cast(io.TextIOWrapper, stream).reconfigure(errors="replace")
    rows = {
        "model": settings.model,
        "parameters": f"{model.num_parameters():,} ({type(model).__name__})",
        "device": f"{model.device.type}, {str(model.dtype).removeprefix('torch.')}",
        "context": f"{assistant.context:,} tokens, of which an answer takes at most {assistant.room:,}",
        "answers": choice if settings.temperature else "always the likeliest token",
        "commands": "/reset  /system TEXT  /help  /quit",
    }
    Console().table("chat", rows)
    interactive = sys.stdin.isatty()
    if interactive:
        with suppress(ImportError):  # not in every build of Python; lines are then edited as the terminal does it
            import readline  # noqa: F401  (gives input() editing and a history)
    history = History(assistant.encode, assistant.context, assistant.room, settings.system)
    talk(assistant, history, interactive=interactive)


@dataclass
class History:
    """The conversation as far as the model still sees it."""

    encode: Callable[[list[dict[str, str]]], list[int]]
    """Ids of messages and of the opening of an answer to them."""
    context: int
    """Tokens that the model can see."""
    room: int
    """How many of them are kept for the answer."""
    system: str | None = None
    turns: list[tuple[str, str]] = field(default_factory=list)
    """(question, answer), oldest first."""

    def ask(self, question: str) -> tuple[list[int], int]:
        """Ids that put a question after what was said, and how many of the oldest turns had to go to fit them in.

        Raises:
            UserError: the question is too long even alone; nothing is forgotten then.
        """
        for dropped in range(len(self.turns) + 1):
            ids = self.encode(self._messages(dropped, question))
            if len(ids) + self.room <= self.context:
                del self.turns[:dropped]
                return ids, dropped
        raise UserError(
            f"too long: {len(ids):,} tokens{' with the system turn' if self.system else ''}, where the context of "
            f"{self.context:,} has {self.context - self.room:,} beside an answer of up to {self.room:,}"
        )

    def _messages(self, dropped: int, question: str) -> list[dict[str, str]]:
        said = [("system", self.system)] if self.system else []
        for asked, answered in self.turns[dropped:]:
            said += [("user", asked), ("assistant", answered)]
        said.append(("user", question))
        # Bytes of a command line that are no UTF-8 become lone surrogates, at which tokenizers raise.
        clean = ((role, text.encode("utf-8", "replace").decode("utf-8")) for role, text in said)
        return Conversation(tuple(clean)).messages


class Streamer:
    """Takes tokens from ``generate`` and prints their text as soon as its characters are whole.

    transformers' TextStreamer prints no broken characters either, but keeps a word until the next space and
    Chinese punctuation or kana until the next ideograph, and loses a space of a line's indentation where the
    tokenizer is SentencePiece's.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.text = ""
        """All that was printed."""
        self._tokenizer = tokenizer
        self._ids: list[int] | None = None

    def put(self, value: "Tensor") -> None:
        """Take the next tokens; the first call brings the prompt, which is not printed."""
        if self._ids is None:
            self._ids = []
            return
        self._ids += value.tolist()
        text = self._tokenizer.decode(self._ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        new = text.rstrip("\ufffd")[len(self.text) :]  # bytes of a character that is still to come decode to U+FFFD
        self.text += new
        print(new, end="", flush=True)

    def end(self) -> None:
        """End the line; a character that was never completed stays unseen."""
        print(flush=True)


@dataclass
class Assistant:
    """A model with its tokenizer, and how it is to answer."""

    model: Any
    tokenizer: Any
    settings: ChatSettings

    @classmethod
    def load(cls, settings: ChatSettings) -> "Assistant":
        """Read a model folder; UserError says what is missing or damaged in it."""
        folder = Path(settings.model)
        check_model(folder)
        import torch
        from transformers import logging

        from scoring.loading import load, load_tokenizer

        logging.set_verbosity_error()
        if not load_tokenizer(folder).chat_template:  # the weights may take minutes to load
            raise UserError(f"{folder} has no chat template; fine-tune it first with `python -m sft {folder}`")
        cuda = settings.device != "cpu" and torch.cuda.is_available()
        bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        model, tokenizer = load(folder, settings.device, "bfloat16" if bf16 else "auto")
        if settings.seed is not None:
            torch.manual_seed(settings.seed)
        return cls(model, tokenizer, settings)

    @property
    def context(self) -> int:
        """Tokens that the model can see; practically all, for models that name no limit, such as Mamba."""
        return getattr(self.model.config, "max_position_embeddings", 2**30)

    @property
    def room(self) -> int:
        """Tokens of the longest answer."""
        return min(self.settings.max_tokens, self.context // 2)

    def encode(self, messages: list[dict[str, str]]) -> list[int]:
        """Ids of messages as the tokenizer's chat template writes them, and of an answer's opening."""
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        except TemplateError as error:  # some have no system turn
            raise UserError(f"the model's chat template refuses this conversation: {error}") from error

    def answer(self, ids: list[int], streamer: Streamer) -> None:
        """Give the tokens of an answer to a streamer, up to an end token or the longest answer."""
        import torch

        prompt = torch.tensor([ids], device=self.model.device)
        sampling = {"temperature": self.settings.temperature, "top_p": self.settings.top_p}
        self.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            pad_token_id=self.tokenizer.pad_token_id or 0,  # asked for, though one row needs no padding
            max_new_tokens=self.room,
            do_sample=self.settings.temperature > 0,
            streamer=streamer,
            **(sampling if self.settings.temperature else {}),
        )


def talk(assistant: Assistant, history: History, *, interactive: bool) -> None:
    """Read lines and answer them until the end of the input, ``/quit`` or Ctrl-C at the prompt."""
    while True:
        try:
            line = input("> " if interactive else "")
        except (EOFError, KeyboardInterrupt):
            print(end="\n" if interactive else "")
            return
        if line.rstrip() == "/quit":
            return
        try:
            if line.startswith("/"):
                _obey(line, history)
            elif line.strip():
                _reply(line.strip(), assistant, history, interactive)
        except UserError as error:
            print(f"error: {error}", flush=True)


def _obey(line: str, history: History) -> None:
    command, *text = line.split(maxsplit=1)
    if command in ("/reset", "/system"):
        history.turns.clear()
        if command == "/system":
            history.system = text[0] if text else None
        print(f"(a new conversation, {'with a' if history.system else 'without a'} system turn)", flush=True)
    elif command == "/help":
        print(HELP, flush=True)
    else:
        raise UserError(f"there is no command {command}; /help lists them")


def _reply(question: str, assistant: Assistant, history: History, interactive: bool) -> None:
    ids, dropped = history.ask(question)
    if dropped:
        print(f"(the context is full: forgot the oldest turns, {dropped} of {dropped + len(history.turns)})")
    streamer = Streamer(assistant.tokenizer)
    try:
        assistant.answer(ids, streamer)
    except KeyboardInterrupt:
        if not interactive:  # whoever stops a pipe means all of it
            raise
        streamer.end()
    if streamer.text:  # else it was stopped before its first word, and the question need not stay
        history.turns.append((question, streamer.text))
