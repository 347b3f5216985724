"""A row as its dataset has it, to what a likelihood task asks: a context, choices and which of them is right.

The forms are those of lm-evaluation-harness, zero-shot, so that figures can be compared with what it gives.
"""

import re
from collections.abc import Callable
from typing import Any

Row = dict[str, Any]


def hellaswag(row: Row) -> Row:
    """The ending of a caption or of a WikiHow article."""
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return _question(_without_marks(context), list(map(_without_marks, row["endings"])), int(row["label"]))


def _without_marks(text: str) -> str:
    """Text without the marks that WikiHow's articles kept, such as [header] and [step]."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def piqa(row: Row) -> Row:
    """The way to reach a goal."""
    return _question(f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], int(row["label"]))


def arc(row: Row) -> Row:
    """A school examination's question, as published, or with its query written out already."""
    if "query" in row:
        return _question(row["query"], row["choices"], row["gold"])
    return _question(f"Question: {row['question']}\nAnswer:", *_labelled(row))


def openbookqa(row: Row) -> Row:
    """The end of a sentence of elementary science."""
    return _question(row["question_stem"], *_labelled(row))


def boolq(row: Row) -> Row:
    """A question about a passage. SuperGLUE's copy of the passages begins with their titles, BoolQ's own does not."""
    context = f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:"
    return _question(context, ["no", "yes"], int(row["answer"]))


def winogrande(row: Row) -> Row:
    """Which of two contexts makes the rest of the sentence likelier: the choices are the contexts here."""
    before, _, after = row["sentence"].partition("_")
    contexts = [before + row["option1"], before + row["option2"]]
    return {"contexts": contexts, "gold": int(row["answer"]) - 1, "continuation": after.strip()}


def lambada(row: Row) -> Row:
    """The last word of a passage."""
    context, _, word = row["text"].rpartition(" ")
    return {"context": context, "continuation": " " + word}


def _question(context: str, choices: list[str], gold: int) -> Row:
    return {"context": context, "choices": choices, "gold": gold}


def _labelled(row: Row) -> tuple[list[str], int]:
    """Choices as the Allen Institute publishes them, and which of them is the answer."""
    return row["choices"]["text"], row["choices"]["label"].index(row["answerKey"].strip())


FORMS: dict[str, Callable[[Row], Row]] = {
    "hellaswag": hellaswag,
    "piqa": piqa,
    "arc_easy": arc,
    "arc_challenge": arc,
    "winogrande": winogrande,
    "openbookqa": openbookqa,
    "boolq": boolq,
    "lambada": lambada,
}
"""The form of each task."""
