"""The chat template of a tokenizer as MLC-LLM's ``conv_template``.

MLC-LLM runs no Jinja: it lays a conversation together from prefixes and separators. They are read off what the model's
own template renders, and are taken only where MLC-LLM's way of laying them together then gives the very same text.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

Turns = Sequence[tuple[str, str]]
"""(role, text) of a conversation."""

Render = Callable[[list[dict[str, str]], bool], str]
"""Gives the text of messages, with or without the prompt for an answer."""

SYSTEM, USER, ASSISTANT, TOOL = (f"{{{role}_message}}" for role in ("system", "user", "assistant", "tool"))
"""What MLC-LLM replaces by the message."""

_SYSTEM, _FIRST, _ANSWER, _SECOND = "Systemtext", "Firstquestion", "Firstanswer", "Secondquestion"
"""Texts by which the pieces between them are found."""

_MARK = re.compile(r"<\|[^|<>\s]+\|>")


class UnlikeError(Exception):
    """A template that MLC-LLM cannot follow."""


@dataclass(frozen=True)
class Conversation:
    """A ``conv_template``, but for the ids of tokens."""

    name: str
    system_template: str
    system_message: str
    """Of conversations that bring none."""
    user: str
    """Before a user's text."""
    assistant: str
    """Before the assistant's text, whether it is there or is to be written."""
    written: str
    """Between that and a text that is there."""
    awaited: str
    """Between that and a text that is to be written."""
    seps: tuple[str, ...]
    """After a user's text, and after the assistant's; one for both."""
    begins: bool
    """Whether the begin token opens it."""
    strips_reasoning: bool = False
    """Earlier answers are shown without what stands between <think> and </think>."""

    def prompt(self, turns: Turns, system: str | None = None) -> str:
        """A conversation as MLC-LLM lays it together, without the begin token."""
        text = self.system_template.replace(SYSTEM, self.system_message if system is None else system)
        for role, said in turns:
            text += self.user + said if role == "user" else self.assistant + self.written + said
            text += self.seps[-1 if role == "assistant" else 0]
        return text + self.assistant + self.awaited

    @property
    def marks(self) -> set[str]:
        """Everything in it that is spelled like a special token."""
        pieces = (self.system_template, self.user, self.assistant, self.written, self.awaited, *self.seps)
        return set(_MARK.findall("".join(pieces)))

    def as_json(self, *, begin: int | None, stop: Sequence[int]) -> dict[str, Any]:
        """The object in ``mlc-chat-config.json``.

        Args:
            begin: id of the begin token.
            stop: ids that end an answer.
        """
        found: dict[str, Any] = {
            "name": self.name,
            "system_template": self.system_template,
            "system_message": self.system_message,
            "system_prefix_token_ids": [begin],
            "add_role_after_system_message": True,
            "roles": {"user": self.user, "assistant": self.assistant},
            "role_templates": {"user": USER, "assistant": self.written + ASSISTANT, "tool": TOOL},
            "messages": [],
            "seps": list(self.seps),
            "role_content_sep": "",
            "role_empty_sep": self.awaited,
            "stop_str": [],
            "stop_token_ids": list(stop),
            "strip_reasoning_in_history": self.strips_reasoning,
            "function_string": "",
            "use_function_calling": False,
        }
        if begin is None or not self.begins:
            del found["system_prefix_token_ids"]
        return found


PLAIN = Conversation("LM", SYSTEM, "", "", "", "", "", ("",), begins=True)
"""MLC-LLM's own template of that name, for models without one: the text goes on."""


def conversation(template: str, render: Render, begin: str | None) -> Conversation:
    """What a chat template does, in MLC-LLM's terms.

    Args:
        template: its text.
        render: renders messages with it.
        begin: text of the begin token.

    Raises:
        UnlikeError: MLC-LLM's terms cannot say it.
    """
    try:
        head, middle, between, last = _parts(render, [_FIRST, _ANSWER, _SECOND], answer=True)
        _, after_user = _parts(render, [_FIRST], answer=False)
        *_, tail = _parts(render, [_FIRST, _ANSWER], answer=False)
    except UnlikeError:
        raise
    except Exception as error:  # a template may raise whatever it likes
        raise UnlikeError(str(error)) from error
    # Where the template does not ask for the begin token, a text that begins with it begins with a role.
    begin = begin if begin and "bos_token" in template and head.startswith(begin) else ""
    head = head.removeprefix(begin)
    if not (middle.startswith(after_user) and last.startswith(after_user)):
        raise UnlikeError("what follows a user's text differs")
    written, awaited = middle.removeprefix(after_user), last.removeprefix(after_user)
    alike = takewhile(lambda pair: pair[0] == pair[1], zip(written, awaited, strict=False))
    assistant = "".join(character for character, _ in alike)
    # What stands between an answer and the next question is the end of one and the beginning of the other; where it is
    # cut is seen from how a conversation begins, or else from how one ends.
    for user in (head, between.removeprefix(tail)):
        if not (head.endswith(user) and between.endswith(user)):
            continue
        system, message = _system(render, head.removesuffix(user), user, begin)
        found = Conversation(
            "palmtop",
            system,
            message,
            user,
            assistant,
            written.removeprefix(assistant),
            awaited.removeprefix(assistant),
            tuple(dict.fromkeys((after_user, between.removesuffix(user)))),
            bool(begin),
            strips_reasoning="</think>" in template,
        )
        if _same(found, render, begin):
            return found
    raise UnlikeError("its turns are not prefix, text and separator")


def _parts(render: Render, said: list[str], *, answer: bool) -> list[str]:
    """What is rendered around the turns of a user and the assistant in turn."""
    text = render(_messages(list(zip(("user", "assistant", "user"), said, strict=False))), answer)
    parts = re.split("|".join(said), text)
    if len(parts) != len(said) + 1:
        raise UnlikeError("it does not show every turn once")
    return parts


def _system(render: Render, default: str, user: str, begin: str) -> tuple[str, str]:
    """The system turn's template and text.

    A model whose template has no system turn of its own begins with the user's, so the template is the bare text: a
    prefix would always be there, also around nothing.
    """
    if not default:
        return SYSTEM, ""
    try:
        text = render(_messages([("system", _SYSTEM), ("user", _FIRST)]), False)
        before, after, _ = re.split(f"{_SYSTEM}|{_FIRST}", text)
    except Exception:  # it takes no system turn: the one that it always has is a constant
        return default, ""
    before, after = before.removeprefix(begin), after.removesuffix(user)
    if default.startswith(before) and default.endswith(after) and len(default) >= len(before) + len(after):
        return before + SYSTEM + after, default[len(before) : len(default) - len(after)]
    return default, ""


def _same(found: Conversation, render: Render, begin: str) -> bool:
    """Whether some conversations come out as the template renders them."""
    one = [("user", "What is a ferry?")]
    two = [*one, ("assistant", "A boat\n\nthat crosses."), ("user", "And a weir?")]
    same = all(begin + found.prompt(turns) == render(_messages(turns), True) for turns in (one, two))
    if found.system_message:
        system = "Be brief."
        same &= begin + found.prompt(two, system) == render(_messages([("system", system), *two]), True)
    return same


def _messages(turns: Turns) -> list[dict[str, str]]:
    """As chat templates take them."""
    return [{"role": role, "content": said} for role, said in turns]
