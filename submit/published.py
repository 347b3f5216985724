"""What others have published of this competition, as data: to rank against, and to check a scorer with.

Scores are as OpenCompass 0.3.1 gives them, 0 to 100; ``TruthfulQA``, which it gives as bleu_acc from 0 to 1, is times
100 here, as in our own results. None of the sources has a throughput on a phone or a memory that could be compared.
"""

from dataclasses import dataclass
from typing import Literal

TASKS = ("commonsense_qa", "bbh", "gsm8k", "humaneval", "chid", "truthfulqa")
"""In the order of the tables below."""

KIT = "starting kit's README"  # TianjinYellow/EdgeDeviceLLMCompetition-Starting-Kit
SRIYA = "sriyachakravarthy's submission"
NICS_1, NICS_2 = "NICSEffalg, Probe100 Track1", "NICSEffalg, Probe100 Track2"
NG = "TeamNG's submission (ggjy)"
TINYTRON = "Tinytron's README"


@dataclass(frozen=True)
class Published:
    """A line of somebody's table."""

    name: str
    scores: tuple[float, ...]
    """Of :data:`TASKS`, as published."""
    source: str
    parameters: float | None = None
    """As the table or the model's name says; None where neither does."""
    track: Literal[1, 2] | None = None
    """Which track it was entered in; None for a model that was no entry, or only a part of one."""
    part_of: str | None = None
    """The entry of track 1 whose three models it is one of."""
    note: str = ""


# fmt: off
PUBLISHED = (
    #                                                   CSQA    BBH  GSM8K     HE   CHID   TQA
    Published("Llama-3.1-8B-Instruct",               (72.89, 67.92, 84.38, 68.29, 69.43, 0.28), KIT, 8.0e9),
    Published("Qwen2-7B-Instruct",                   (33.58, 64.09, 81.12, 78.05, 81.72, 0.23), KIT, 7.6e9),
    Published("phi-2, whole",                        (65.68, 59.4, 61.56, 31.1, 12.29, 0.18), SRIYA, 2.8e9,
              part_of="sriyachakravarthy"),
    Published("Llama-3.1-8B, depth-pruned",          (22.11, 7.87, 1.9, 0.61, 13.59, 0.18), SRIYA,
              part_of="sriyachakravarthy"),
    Published("Qwen2-7B, depth-pruned",              (0, 1.84, 0.83, 0, 0.55, 0), SRIYA, part_of="sriyachakravarthy"),
    Published("NICSEffalg",                          (26.51, 28.12, 21.38, 12.60, 11.59, 0.173), NICS_1, track=1,
              note="shared the second place of its track"),
    Published("nGPT 800M (NICSEffalg)",              (8.93, 16.80, 2.43, 0.00, 3.75, 0.15), NICS_2, 0.8e9, track=2,
              note="second of its track"),
    Published("GPT-2, 12 layers (Team NG)",          (0, 0.85, 1.36, 0, 13.09, 0.1), NG, track=2,
              note="third of its track"),
    Published("Llama-3.1-8B, Tinytron 3.8B",         (72.40, 44.47, 63.31, 40.24, 63.64, 0.29), TINYTRON, 3.8e9,
              part_of="Tinytron"),
    Published("Qwen2-7B, Tinytron 3.9B",             (64.37, 44.57, 58.23, 37.80, 74.48, 0.28), TINYTRON, 3.9e9,
              part_of="Tinytron"),
    Published("Phi-2, Tinytron 2.9B",                (47.09, 41.84, 59.44, 49.39, 34.87, 0.23), TINYTRON, 2.9e9,
              part_of="Tinytron"),
    Published("Cauchy-3B-preview (Tinytron)",        (22.52, 19.08, 2.12, 2.44, 11.64, 0.19), TINYTRON, 3.0e9, track=2,
              note="taken to be the winner of its track"),
    Published("Llama-3.2-1B-Instruct",               (40.29, 25.59, 47.23, 40.85, 33.47, 0.23), TINYTRON, 1.2e9),
    Published("Llama-3.2-3B-Instruct",               (49.63, 49.55, 77.33, 58.54, 50.00, 0.27), TINYTRON, 3.2e9),
)
# fmt: on


def scores_of(one: Published) -> dict[str, float | None]:
    """Scores by task, all of 0 to 100."""
    *others, truthful = one.scores
    return dict(zip(TASKS, [*others, 100 * truthful], strict=True))
