"""How the tasks ask: the turns of OpenCompass 0.3.1's prompts, joined for a base model or for a chat.

The demonstrations are not here: :mod:`scoring.competition.shots` reads them from where OpenCompass has them.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from scoring.competition.task import Row, Task, Turn

if TYPE_CHECKING:
    from scoring.competition.shots import Shots

Template = Callable[[list[Turn]], str]
"""Renders messages as the text of a chat, up to where the model answers."""


def prompt_of(task: Task, row: Row, shots: "Shots", template: Template | None = None) -> str:
    """The text that is sent: a chat that a template renders, or without one the form of base models."""
    return base_prompt(task, row, shots) if template is None else template(chat_messages(task, row, shots))


def base_prompt(task: Task, row: Row, shots: "Shots") -> str:
    """The text that a base model goes on from: the turns, a line break between two."""
    return "\n" * task.leading_newline + "\n".join(turn["content"] for turn in task.turns(row, shots))


def chat_messages(task: Task, row: Row, shots: "Shots") -> list[Turn]:
    """The conversation that a chat template takes.

    OpenCompass gives every round of a chat an empty turn of the system, which counts as the user's and is joined to
    what the user said: every message of the user ends with a line break.
    """
    return [
        turn | {"content": turn["content"] + "\n"} if turn["role"] == "user" else turn
        for turn in task.turns(row, shots)
    ]


def ask_commonsense_qa(row: Row, shots: "Shots") -> list[Turn]:
    """Seven reasoned demonstrations, then the question; its spaces are OpenCompass's."""
    choices = "\n".join(f"{letter}. {row[letter]}" for letter in "ABCDE")
    return [*shots.turns("commonsense_qa"), _user(f"Q:{row['question']}  Answer Choices: {choices}\nA:")]


def ask_gsm8k(row: Row, shots: "Shots") -> list[Turn]:
    """Four reasoned demonstrations, then the question."""
    return [*shots.turns("gsm8k"), _user(f"Question: {row['question']}\nLet's think step by step\nAnswer:")]


def ask_bbh(row: Row, shots: "Shots", subtask: str) -> list[Turn]:
    """One turn that holds the subtask's own instruction and three demonstrations before the question."""
    demonstrations = shots.demonstrations(subtask)
    return [
        _user(
            f"Follow the given examples and answer the question.\n{demonstrations}\n\n"
            f"Q: {row['input']}\nA: Let's think step by step."
        )
    ]


def ask_humaneval(row: Row, shots: "Shots") -> list[Turn]:
    """The head of a function to complete."""
    return [_user(f"Complete the following python code:\n{row['prompt']}")]


def ask_chid(row: Row, shots: "Shots") -> list[Turn]:
    """A text with a gap and seven idioms."""
    choices = "\n".join(f"{letter}. {row[letter]}" for letter in "ABCDEFG")
    letters = "，".join(f"”{letter}“" for letter in "ABCDEFG")
    return [_user(f"{row['content']}\n请选择______处所填的词\n{choices}\n请从{letters}中进行选择。答：")]


def ask_truthfulqa(row: Row, shots: "Shots") -> list[Turn]:
    """The question alone."""
    return [_user(row["question"])]


def _user(content: str) -> Turn:
    return {"role": "user", "content": content}
