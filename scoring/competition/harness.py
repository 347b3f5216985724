"""The tasks of the competition as lm-evaluation-harness takes them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from scoring.competition.data import choose_rows, read_rows
from scoring.competition.prompts import prompt_of
from scoring.competition.scores import score_rows
from scoring.competition.shots import Shots, read_shots
from scoring.competition.task import Row
from scoring.competition.tasks import TASKS

YAML = Path(__file__).parent / "lm_eval"

MAX_NEW_TOKENS = 1024
"""The starting kit's --max-out-len, for tasks without a length of their own."""

SCORE = "score"
"""The metric's name, 0-100."""

_EXTRAS = ("bleu_max", "bleu_diff")


def load(
    names: Sequence[str],
    data: Path | None,
    *,
    limit: int | None = None,
    seed: int = 0,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> Any:
    """Tasks with their rows, as ``lm_eval.evaluator.evaluate`` takes them.

    Chats are asked for there, with ``apply_chat_template``: the model's own template renders OpenCompass's messages.

    Args:
        names: of :data:`scoring.competition.TASKS`.
        data: folder of data; None: the hub.
        limit: rows of a task, drawn by ``seed``; None: all. Not to be given to ``evaluate`` as well.
        seed: of the draw.
        max_new_tokens: of tasks without a length of their own.

    Raises:
        UserError: rows or demonstrations cannot be read.
    """
    asked = {"data": str(data) if data else None, "limit": limit, "seed": seed, "max_new_tokens": max_new_tokens}
    manager = TaskManager(include_path=YAML, include_defaults=False, metadata=asked)
    return manager.load([_subtask(name) if TASKS[name].group == "bbh" else name for name in names])


def _subtask(name: str) -> dict[str, Any]:
    return load_yaml(YAML / "bbh.yaml", resolve_func=True) | {"task": name}


@dataclass(frozen=True)
class Answered:
    """What a model wrote for a task."""

    numbers: list[int]
    """Of the rows, in the published file from 0."""
    rows: list[Row]
    outputs: list[str]


def answered(results: Mapping[str, Any]) -> dict[str, Answered]:
    """The outputs in what ``evaluate`` gives (with ``log_samples``), by task, to be scored at once."""
    found = {}
    for name, samples in results["samples"].items():
        docs = [sample["doc"] for sample in samples]
        outputs = [sample["resps"][0][0] for sample in samples]
        found[name] = Answered([doc["row"] for doc in docs], [doc["fields"] for doc in docs], outputs)
    return found


class CompetitionTask(ConfigurableTask):
    """A task of :data:`scoring.competition.TASKS`.

    Its documents are ``{"task", "row", "fields"}``: which task and row it is, and the row itself.

    Args:
        config: the contents of its YAML file, with what :func:`load` was asked for in ``metadata``.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self.task = TASKS[config["task"]]
        super().__init__(config={name: value for name, value in config.items() if name != "class"})

    @cached_property
    def _shots(self) -> Shots:
        return read_shots(self._data)

    @property
    def _data(self) -> Path | None:
        data = self.config.metadata.get("data")
        return Path(data) if data else None

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **options: Any) -> None:
        """Read the rows, and draw some where there is a limit."""
        asked, rows = self.config.metadata, read_rows(self.task, self._data)
        numbers = choose_rows(self.task.name, len(rows), asked.get("limit"), asked.get("seed", 0))
        docs = [{"task": self.task.name, "row": number, "fields": rows[number]} for number in numbers]
        self.dataset = {self.config.test_split: datasets.Dataset.from_list(docs)}

    def doc_to_text(self, doc: dict[str, Any], doc_to_text: Any = None) -> str:
        """The prompt of a base model."""
        return prompt_of(self.task, doc["fields"], self._shots)

    def doc_to_target(self, doc: Mapping[str, Any], doc_to_target: Any = None) -> str:
        """The right answer."""
        return self.task.gold(doc["fields"])

    def fewshot_context(
        self,
        doc: dict[str, Any],
        *args: Any,
        apply_chat_template: bool = False,
        chat_template: Callable[..., str] | None = None,
        **options: Any,
    ) -> str:
        """The whole prompt, demonstrations and all."""
        return prompt_of(self.task, doc["fields"], self._shots, chat_template if apply_chat_template else None)

    def construct_requests(self, doc: dict[str, Any], ctx: str, **options: Any) -> Instance:
        """One request, as long as the task's answers may be."""
        request = super().construct_requests(doc, ctx, **options)
        length = self.task.max_new_tokens or self.config.metadata.get("max_new_tokens", MAX_NEW_TOKENS)
        request.arguments[1]["max_gen_toks"] = length
        return request

    def process_results(self, doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
        """The figures of one output; none where it does not count or its program is still to be run."""
        (scored,) = score_rows(self.task, [doc["fields"]], [results[0]])
        return {} if scored.value is None else {SCORE: scored.value, **scored.extras}

    def aggregation(self) -> dict[str, Callable[[list[float]], float]]:
        """Means."""
        return dict.fromkeys((SCORE, *_EXTRAS), mean)

    def higher_is_better(self) -> dict[str, bool]:
        """Always."""
        return dict.fromkeys((SCORE, *_EXTRAS), True)
