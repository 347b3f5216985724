"""Likelihood tasks that tell models apart long before they can answer a question. Imports nothing heavy."""

from dataclasses import dataclass


@dataclass(frozen=True)
class QuickTask:
    """What a task is, apart from its text."""

    name: str
    file: str
    """Of its rows in a data folder, gzipped or not."""
    hub: str
    """The dataset on the hub."""
    config: str | None
    """The part of that dataset, where it has several."""
    split: str
    rows: int
    """As published."""
    chance: float
    """The score (0-100) of guessing; BoolQ's more frequent answer would get 62.2."""
    metric: str
    """The one that papers report: acc, or acc_norm, which divides each likelihood by the bytes of the answer."""


TASKS = {
    task.name: task
    for task in (
        QuickTask(
            "hellaswag",
            "hellaswag_validation.jsonl",
            "Rowan/hellaswag",
            None,
            "validation",
            10_042,
            25.0,
            "acc_norm",
        ),
        QuickTask("piqa", "piqa_validation.jsonl", "baber/piqa", None, "validation", 1_838, 50.0, "acc"),
        QuickTask("arc_easy", "arc_easy_test.jsonl", "allenai/ai2_arc", "ARC-Easy", "test", 2_376, 25.0, "acc"),
        QuickTask(
            "arc_challenge",
            "arc_challenge_test.jsonl",
            "allenai/ai2_arc",
            "ARC-Challenge",
            "test",
            1_172,
            25.0,
            "acc_norm",
        ),
        QuickTask(
            "winogrande",
            "winogrande_xl_validation.jsonl",
            "allenai/winogrande",
            "winogrande_xl",
            "validation",
            1_267,
            50.0,
            "acc",
        ),
        QuickTask(
            "openbookqa",
            "openbookqa_validation.jsonl",
            "allenai/openbookqa",
            "main",
            "validation",
            500,
            25.0,
            "acc_norm",
        ),
        QuickTask("boolq", "boolq_validation.jsonl", "google/boolq", None, "validation", 3_270, 50.0, "acc"),
        QuickTask("lambada", "lambada_openai_test.jsonl", "EleutherAI/lambada_openai", None, "test", 5_153, 0.0, "acc"),
    )
}
"""In the order of the table."""
