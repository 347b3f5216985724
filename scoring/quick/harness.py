"""The quick tasks as lm-evaluation-harness takes them: their YAML files, and where their rows come from."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager

from scoring.quick.rows import read_rows

YAML = Path(__file__).parent / "tasks"


def load(names: Sequence[str], data: Path | None) -> Any:
    """Tasks with their rows, as ``lm_eval.evaluator.evaluate`` takes them.

    Args:
        names: of :data:`scoring.quick.TASKS`.
        data: the folder with their files; None fetches them from the hub.

    Raises:
        UserError: rows cannot be read.
    """
    folder = {} if data is None else {"data": str(data)}
    return TaskManager(include_path=YAML, include_defaults=False, metadata=folder).load(list(names))


class RowsTask(ConfigurableTask):
    """A task whose rows are read by :mod:`scoring.quick.rows`.

    Args:
        config: the contents of its YAML file; ``metadata`` may name the data folder.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config={name: value for name, value in config.items() if name != "class"})

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **options: Any) -> None:
        """Read the rows."""
        data = self.config.metadata.get("data")
        rows = read_rows(self.config.task, Path(data) if data else None)
        self.dataset = {self.config.test_split: datasets.Dataset.from_list(rows)}
