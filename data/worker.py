"""The worker processes' side of the loader, apart because it imports torch."""

import os
from collections.abc import Iterator
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from common import signals
from data.loader import Order, worker_rows
from data.streams import Position


class RowDataset(IterableDataset[Any]):
    """Groups of rows of one rank, as :func:`data.loader.worker_rows` makes them."""

    def __init__(
        self, order: Order, positions: dict[int, Position], rows: int, rank: int, world_size: int, workers: int
    ) -> None:
        self._arguments = (order, positions, rows, rank, world_size, workers)

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        assert info is not None
        yield from worker_rows(*self._arguments, info.id)


def start_worker(worker: int) -> None:
    """Run first in each worker process: one core each, and signals are the training process's to answer."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signals.ignore()
