"""The six tasks of the competition, as OpenCompass 0.3.1 asks and scores them."""

from scoring.competition.scores import group_score, programs_of, score_outputs, score_rows, task_extras, task_score
from scoring.competition.task import Row, Scored, Task, Turn
from scoring.competition.tasks import GROUPS, TASKS

__all__ = [
    "GROUPS",
    "TASKS",
    "Row",
    "Scored",
    "Task",
    "Turn",
    "group_score",
    "programs_of",
    "score_outputs",
    "score_rows",
    "task_extras",
    "task_score",
]
