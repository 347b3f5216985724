"""Rows of the run, in order, for one process of the training job.

The loader hands out this rank's share of the next rows and knows, for the rows it has handed out and no
others, where each of its streams stands: worker processes send the position with every row, so what
they have prepared ahead is never counted. There is no state to be saved in the workers.
"""

import multiprocessing
import os
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from data.packing import Array, Layout
from data.sources import Corpus, TextSource
from data.streams import (
    PaddedPreparedStream,
    PaddedTextStream,
    Plan,
    Position,
    PreparedStream,
    ShardReaders,
    Stream,
    TextStream,
    make_plans,
)
from data.tokenizer import Tokenizer

GROUP = 8
"""Rows that a worker process sends at a time."""


@dataclass(frozen=True)
class Order:
    """Everything that decides the order of the rows."""

    corpus: Corpus
    tokenizer: Path
    """Folder of the tokenizer."""
    seq_len: int
    streams: int
    seed: int
    skip_bad_shards: bool = False
    layout: Layout = "packed"


class StreamGroup:
    """Some of the canonical streams, read in this process."""

    def __init__(self, order: Order, owned: list[int], positions: dict[int, Position]) -> None:
        plans = make_plans(order.corpus, order.streams, order.seed)
        self._order, self._positions = order, positions
        self._plans: dict[int, Plan] = {stream: plans[stream] for stream in owned}
        self._readers = ShardReaders(order.corpus, self._plans, positions, order.skip_bad_shards)
        self._tokenizer = Tokenizer(order.tokenizer)
        self._streams: dict[int, Stream] = {}

    def take(self, stream: int, rows: int) -> Array:
        """The next rows of a stream, (rows, T + 1)."""
        if stream not in self._streams:
            self._streams[stream] = self._open(stream)
        return self._streams[stream].take(rows)

    def position(self, stream: int) -> Position:
        """Where a stream stands."""
        if stream in self._streams:
            return self._streams[stream].position
        return self._positions.get(stream, Position())

    @property
    def positions(self) -> dict[int, Position]:
        """Where the streams stand that have been read, here or before."""
        return self._positions | {number: stream.position for number, stream in self._streams.items()}

    @property
    def bad_shards(self) -> set[str]:
        """Names of the damaged shards that were passed over."""
        return self._readers.bad_shards

    def _open(self, stream: int) -> Stream:
        plan, position = self._plans[stream], self._positions.get(stream, Position())
        source = self._order.corpus.sources[plan.source]
        encode, seq_len, end = self._tokenizer.encode_documents, self._order.seq_len, self._tokenizer.end
        if self._order.layout == "padded":
            if isinstance(source, TextSource):
                return PaddedTextStream(plan, stream, position, self._readers, encode, seq_len, end)
            return PaddedPreparedStream(source, plan, stream, position, seq_len, end)
        if isinstance(source, TextSource):
            return TextStream(plan, stream, position, self._readers, encode, seq_len)
        return PreparedStream(source, plan, stream, position, seq_len)


class Loader:
    """This rank's rows, from any point of the run on.

    Args:
        order: what decides the rows.
        workers: processes that read ahead; 0 reads in this process, when rows are asked for.
        rank: which of ``world_size`` processes this is.
        world_size: how many processes share the rows of each batch evenly.
        state: what :meth:`state` gave, merged over all ranks; None starts at the beginning.

    Raises:
        UserError: the streams cannot be shared evenly among ranks and workers.
    """

    def __init__(
        self,
        order: Order,
        *,
        workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        state: dict[str, Any] | None = None,
    ) -> None:
        if order.streams % (world_size * max(workers, 1)):
            raise UserError(
                f"{order.streams} streams cannot be shared evenly by {world_size} devices with {max(workers, 1)} "
                "workers each; make --loader.streams a multiple of devices × workers, or change --loader.workers"
            )
        self._order, self._workers, self._rank, self._world = order, workers, rank, world_size
        self._rows = 0 if state is None else state["rows"]
        stored = {} if state is None else state["positions"]
        self._positions = {int(stream): Position(*numbers) for stream, numbers in stored.items()}
        self.bad_shards: set[str] = set(() if state is None else state.get("bad_shards", ()))
        """Names of the damaged shards that the run has passed over so far."""
        self._group: StreamGroup | None = None
        self._ahead: _WorkerRows | None = None
        if workers:
            self._ahead = _WorkerRows(order, dict(self._positions), self._rows, rank, world_size, workers)
        else:
            owned = list(range(rank, order.streams, world_size))
            self._group = StreamGroup(order, owned, dict(self._positions))

    @property
    def rows(self) -> int:
        """Rows of the run handed out so far, over all ranks."""
        return self._rows

    def take(self, rows: int) -> Array:
        """This rank's share of the next ``rows`` rows of the run: (rows / world_size, T + 1) token ids."""
        if rows % self._world:
            raise UserError(f"{rows} rows a batch cannot be shared evenly by {self._world} devices")
        first = self._rows + (self._rank - self._rows) % self._world
        mine = range(first, self._rows + rows, self._world)
        taken = self._take_here(mine) if self._group is not None else self._take_ahead(mine)
        self._rows += rows
        return taken

    def state(self) -> dict[str, Any]:
        """Rows handed out and the positions of this rank's streams, as plain values for JSON."""
        positions = self._positions if self._group is None else self._group.positions
        own = {stream: at for stream, at in sorted(positions.items()) if stream % self._world == self._rank}
        positions_list = {str(stream): at.to_list() for stream, at in own.items()}
        return {"rows": self._rows, "positions": positions_list, "bad_shards": sorted(self.bad_shards)}

    def close(self) -> None:
        """End the worker processes."""
        if self._ahead is not None:
            self._ahead.close()

    def _take_here(self, mine: range) -> Array:
        assert self._group is not None
        period = self._order.streams // self._world  # this rank's streams take turns
        out: Array | None = None
        for place in range(min(period, len(mine))):
            own = len(range(place, len(mine), period))
            rows = self._group.take(mine[place] % self._order.streams, own)
            if out is None:
                out = np.empty((len(mine), rows.shape[1]), dtype=rows.dtype)
            out[place::period] = rows
        self.bad_shards |= self._group.bad_shards
        assert out is not None
        return out

    def _take_ahead(self, mine: range) -> Array:
        assert self._ahead is not None
        rows = []
        for row in mine:
            tokens, position = self._ahead.next()
            self._positions[row % self._order.streams] = position
            rows.append(tokens)
        self.bad_shards |= self._ahead.bad_shards
        return np.stack(rows)


def merge_states(states: list[dict[str, Any]]) -> dict[str, Any]:
    """The state of the whole run from those of all its ranks; empty from none."""
    if not states:
        return {"rows": 0, "positions": {}, "bad_shards": []}
    positions = {stream: at for state in states for stream, at in state["positions"].items()}
    return {
        "rows": states[0]["rows"],
        "positions": dict(sorted(positions.items(), key=lambda item: int(item[0]))),
        "bad_shards": sorted({name for state in states for name in state["bad_shards"]}),
    }


@dataclass(frozen=True)
class _Group:
    """What a worker sends: rows with the positions after each, or what went wrong."""

    rows: Array
    positions: list[Position]
    bad_shards: set[str]
    error: str = ""


class _WorkerRows:
    """Rows made ahead by worker processes, handed out in the order of the run."""

    def __init__(
        self, order: Order, positions: dict[int, Position], rows: int, rank: int, world_size: int, workers: int
    ) -> None:
        from torch.utils.data import DataLoader

        from data.worker import RowDataset, start_worker

        self._queues: list[deque[tuple[Array, Position]]] = [deque() for _ in range(workers)]
        self._turn = 0
        self.bad_shards: set[str] = set()
        loader = DataLoader(
            RowDataset(order, positions, rows, rank, world_size, workers),
            batch_size=None,
            num_workers=workers,
            multiprocessing_context=_worker_server(),
            worker_init_fn=start_worker,
            prefetch_factor=4,
            collate_fn=_as_it_is,
        )
        self._iterator: Any = iter(loader)

    def next(self) -> tuple[Array, Position]:
        """The next row of this rank and the position of its stream after it."""
        queue = self._queues[self._turn]
        if not queue:
            # The data loader gives groups from the workers in turn, which is the order they are needed in.
            group: _Group = next(self._iterator)
            if group.error:
                raise UserError(group.error)
            queue.extend(zip(group.rows, group.positions, strict=True))
            self.bad_shards |= group.bad_shards
        self._turn = (self._turn + 1) % len(self._queues)
        return queue.popleft()

    def close(self) -> None:
        """End the worker processes."""
        self._iterator._shutdown_workers()


def _as_it_is(group: Any) -> Any:
    return group


def worker_rows(
    order: Order, positions: dict[int, Position], rows: int, rank: int, world_size: int, workers: int, worker: int
) -> Iterator[_Group]:
    """What worker number ``worker`` of a rank sends, for ever: every ``workers``-th row of the rank."""
    first = rows + (rank - rows) % world_size + worker * world_size
    step = workers * world_size
    owned = sorted({row % order.streams for row in range(first, first + step * order.streams, step)})
    try:
        group = StreamGroup(order, owned, positions)
        for start in count(first, step * GROUP):
            taken, after = [], []
            for row in range(start, start + step * GROUP, step):
                stream = row % order.streams
                taken.append(group.take(stream, 1)[0])
                after.append(group.position(stream))
            yield _Group(np.stack(taken), after, set(group.bad_shards))
    except UserError as error:
        yield _Group(np.empty((0, 0)), [], set(), str(error))


def _worker_server() -> Any:
    """The multiprocessing context whose server process forks the workers.

    The server is started while nothing runs in it: neither the training process's threads nor its CUDA
    context get into the workers, and the imports are paid once.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["data.worker_server"])
    # The server imports by the path alone, so that a folder called data where the command was typed is
    # not taken for ours.
    before = {name: os.environ.get(name) for name in ("PYTHONPATH", "PYTHONSAFEPATH")}
    root = str(Path(__file__).resolve().parent.parent)
    os.environ["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [before["PYTHONPATH"]])])
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    return context
