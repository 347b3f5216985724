"""The canonical streams: the order of the data, whatever runs it.

The corpus is dealt into S streams. Row k of a run is row k div S of stream k mod S. Which documents a
stream holds depends on the data, the seed and S alone, never on the number of devices or workers;
those only decide who reads which streams. A stream's state is four numbers, its :class:`Position`.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass
from typing import Protocol

import numpy as np

from common.errors import UserError
from data.packing import Array, cut_rows, one_a_row
from data.prepared import PreparedShard, PreparedSource
from data.sources import Corpus, DamagedShardError, Shard, TextSource, held_out, lines, text_of

READ_AHEAD = 8
"""Documents that a stream tokenises at a time."""

WINDOW = 2**16
"""Prepared tokens that a stream looks up at a time."""

Encode = Callable[[list[str]], list[Array]]
"""Texts to token ids with begin and end; an empty text to no ids."""


@dataclass(frozen=True)
class Part:
    """Documents number phase, phase + stride, phase + 2·stride, … of a shard."""

    shard: int
    phase: int
    stride: int


@dataclass(frozen=True)
class Position:
    """The next token that a stream will give."""

    epoch: int = 0
    part: int = 0
    """Index among the stream's parts."""
    document: int = 0
    """Index among the part's documents."""
    token: int = 0
    """Index among the document's tokens."""

    def to_list(self) -> list[int]:
        """As four plain numbers, for JSON."""
        return list(astuple(self))


@dataclass(frozen=True)
class Plan:
    """What one stream holds: a source and its parts, in order."""

    source: int
    parts: tuple[Part, ...]


def make_plans(corpus: Corpus, streams: int, seed: int) -> list[Plan]:
    """Deal a corpus into streams.

    The sources share the streams by weight. The shards of a source, shuffled by the seed, are dealt to
    its streams in turn; where there are fewer shards than streams, the documents of each shard are
    dealt in turn to that shard's streams.

    Raises:
        UserError: a source's weight is too small to get a stream.
    """
    owners = share_streams(corpus.weights, streams)
    for number, source in enumerate(corpus.sources):
        if number not in owners:
            share = corpus.weights[number]
            raise UserError(
                f"{source.name} has a share of {share:.2%}, less than one of {streams} streams; "
                f"use --loader.streams {2 ** int(np.ceil(np.log2(1 / share)))} or a larger weight"
            )
    hands: list[Iterator[list[Part]]] = []
    for number, source in enumerate(corpus.sources):
        order = _shuffled([shard.name for shard in source.train], seed)
        hands.append(iter(_deal(order, owners.count(number))))
    return [Plan(owner, tuple(next(hands[owner]))) for owner in owners]


def share_streams(weights: Sequence[float], streams: int) -> list[int]:
    """The source of every stream: each time the one that is furthest behind its share."""
    given = [0] * len(weights)
    owners = []
    for count in range(1, streams + 1):
        owner = max(range(len(weights)), key=lambda source: (weights[source] * count - given[source], -source))
        given[owner] += 1
        owners.append(owner)
    return owners


def _shuffled(names: list[str], seed: int) -> list[int]:
    """Indices in an order drawn by the seed, the same on every machine and version."""

    def key(index: int) -> bytes:
        return hashlib.blake2b(f"{seed} {names[index]}".encode()).digest()

    return sorted(range(len(names)), key=key)


def _deal(shards: list[int], streams: int) -> list[list[Part]]:
    count = len(shards)
    if count >= streams:
        return [[Part(shard, 0, 1) for shard in shards[stream::streams]] for stream in range(streams)]
    sharing = [len(range(number, streams, count)) for number in range(count)]
    return [[Part(shards[s % count], s // count, sharing[s % count])] for s in range(streams)]


class Stream(Protocol):
    """A canonical stream that can be read from any position."""

    @property
    def position(self) -> Position:
        """The first token of the next row."""

    def take(self, rows: int) -> Array:
        """The next rows, (rows, T + 1) token ids; the next call starts with the last token of this one."""


class TextStream:
    """A stream whose documents are read and tokenised as they are needed."""

    def __init__(
        self, plan: Plan, stream: int, position: Position, readers: "ShardReaders", encode: Encode, seq_len: int
    ) -> None:
        self._plan, self._stream, self._readers, self._encode, self._seq_len = plan, stream, readers, encode, seq_len
        self._reading = Position(position.epoch, position.part, position.document)
        self._ahead: deque[tuple[Position, Array]] = deque()
        self._token = position.token
        self._tokens_ahead = -position.token
        self._read_from_start = position == Position(position.epoch)
        self._epoch_tokens = 0

    @property
    def position(self) -> Position:
        """The first token of the next row."""
        at = self._ahead[0][0] if self._ahead else self._reading
        return Position(at.epoch, at.part, at.document, self._token)

    def take(self, rows: int) -> Array:
        """The next rows, (rows, T + 1) token ids."""
        advance = rows * self._seq_len
        while self._tokens_ahead < advance + 1:
            self._read()
        tokens = np.concatenate([document for _, document in self._ahead])
        tokens = tokens[self._token : self._token + advance + 1]
        self._token += advance
        self._tokens_ahead -= advance
        while self._token >= len(self._ahead[0][1]):
            self._token -= len(self._ahead.popleft()[1])
        return cut_rows(tokens, self._seq_len)

    def _read(self) -> None:
        """Tokenise a few more documents, going on to the next part or epoch where one ends."""
        batch: list[tuple[Position, str]] = []
        while len(batch) < READ_AHEAD:
            found = self._readers.next_text(self._stream, self._plan, self._reading)
            if found is None:
                break
            document, text = found
            at = Position(self._reading.epoch, self._reading.part, document)
            self._reading = Position(at.epoch, at.part, document + 1)
            batch.append((at, text))
        encoded = self._encode([text for _, text in batch])
        self._ahead.extend((at, tokens) for (at, _), tokens in zip(batch, encoded, strict=True))
        count = sum(map(len, encoded))
        self._tokens_ahead += count
        self._epoch_tokens += count
        if len(batch) < READ_AHEAD:
            self._next_part()

    def _next_part(self) -> None:
        epoch, part = self._reading.epoch, self._reading.part + 1
        if part == len(self._plan.parts):
            if self._read_from_start and self._epoch_tokens == 0:
                raise _empty_stream(self._stream)
            epoch, part = epoch + 1, 0
            self._read_from_start, self._epoch_tokens = True, 0
        self._reading = Position(epoch, part)


class PaddedTextStream(TextStream):
    """A :class:`TextStream` whose rows are a document each (:func:`data.packing.one_a_row`)."""

    def __init__(
        self,
        plan: Plan,
        stream: int,
        position: Position,
        readers: "ShardReaders",
        encode: Encode,
        seq_len: int,
        end: int,
    ) -> None:
        super().__init__(plan, stream, position, readers, encode, seq_len)
        self._end = end

    def take(self, rows: int) -> Array:
        """The next rows, (rows, T + 1) token ids; the next call starts with the document after this one's last."""
        documents: list[Array] = []
        while len(documents) < rows:
            while not self._ahead:
                self._read()
            _, tokens = self._ahead.popleft()
            if len(tokens):
                documents.append(tokens)
        return one_a_row(documents, self._seq_len, self._end)


def _empty_stream(stream: int) -> UserError:
    return UserError(
        f"stream {stream} gets no documents: the corpus has too few for so many streams; "
        "use fewer, such as --loader.streams 8"
    )


class ShardReaders:
    """Reads the text shards of some streams, each shard once for all of them.

    Where documents of a shard are dealt to several streams, one pass over the file serves those of them
    that are read here: a line that belongs to another waits, unparsed, in that one's queue.
    """

    def __init__(
        self, corpus: Corpus, plans: dict[int, Plan], positions: dict[int, Position], skip_bad_shards: bool
    ) -> None:
        """Serve the streams ``plans``, which stand at ``positions``."""
        self._corpus, self._plans, self._skip = corpus, plans, skip_bad_shards
        self._next = {stream: positions.get(stream, Position()) for stream in plans}
        self._passes: dict[tuple[int, int, int], _Pass] = {}
        self.bad_shards: set[str] = set()
        """Names of the damaged shards that were passed over."""

    def next_text(self, stream: int, plan: Plan, reading: Position) -> tuple[int, str] | None:
        """The stream's next document at or after ``reading`` in its part: (index, text), or None at its end."""
        part = plan.parts[reading.part]
        source = self._corpus.sources[plan.source]
        assert isinstance(source, TextSource)
        self._next[stream] = reading
        key = (plan.source, part.shard, reading.epoch)
        if key not in self._passes:
            self._passes[key] = _Pass(source.train[part.shard], part.stride, self._waiting(key, part.stride))
        shard = source.train[part.shard]
        while True:
            found = self._line(self._passes[key], part.phase)
            if found is None:
                self._leave(key, part.phase)
                return None
            document, line = found
            text = text_of(line, shard, document * part.stride + part.phase + 1)
            if not (source.holds_out and held_out(text)):
                return document, text

    def _waiting(self, key: tuple[int, int, int], stride: int) -> dict[int, int]:
        """Phases that this pass serves, each with the first document that its stream still wants."""
        source, shard, epoch = key
        wanted = {}
        for stream, plan in self._plans.items():
            for number, part in enumerate(plan.parts):
                at = self._next[stream]
                if (plan.source, part.shard) == (source, shard) and (at.epoch, at.part) <= (epoch, number):
                    wanted[part.phase] = at.document if (at.epoch, at.part) == (epoch, number) else 0
        return wanted

    def _line(self, shard_pass: "_Pass", phase: int) -> tuple[int, bytes] | None:
        try:
            return shard_pass.next(phase)
        except DamagedShardError as error:
            if not self._skip:
                raise UserError(f"{error}. Fetch it again, or pass over it with --skip-bad-shards") from error
            self.bad_shards.add(shard_pass.shard.name)
            return None

    def _leave(self, key: tuple[int, int, int], phase: int) -> None:
        if self._passes[key].leave(phase):
            del self._passes[key]


class _Pass:
    """One reading of a shard from its start, for the phases that want its lines."""

    def __init__(self, shard: Shard, stride: int, first: dict[int, int]) -> None:
        self.shard = shard
        self._stride, self._first = stride, first
        self._lines = enumerate(lines(shard))
        self._queues: dict[int, deque[tuple[int, bytes]]] = {phase: deque() for phase in first}
        self._damage: DamagedShardError | None = None

    def next(self, phase: int) -> tuple[int, bytes] | None:
        """The next (document, line) of a phase, or None at the end of the shard."""
        queue = self._queues[phase]
        while not queue:
            if self._damage is not None:
                raise self._damage
            try:
                number, line = next(self._lines, (-1, b""))
            except DamagedShardError as error:
                self._damage = error
                continue
            if number < 0:
                return None
            document, owner = divmod(number, self._stride)
            if document >= self._first.get(owner, number + 1):
                self._queues[owner].append((document, line))
        return queue.popleft()

    def leave(self, phase: int) -> bool:
        """Forget a phase that has read to the end; True when nobody is left."""
        del self._queues[phase], self._first[phase]
        return not self._queues


class PreparedStream:
    """A stream over prepared tokens: the same rows as :class:`TextStream`, by slices of a memory map."""

    def __init__(self, source: PreparedSource, plan: Plan, stream: int, position: Position, seq_len: int) -> None:
        self._source, self._plan, self._stream, self._seq_len = source, plan, stream, seq_len
        self._epoch, self._index = position.epoch, position.part
        self._part = _PreparedPart(source.train[plan.parts[self._index].shard], plan.parts[self._index])
        self._offset = self._part.offset(position)

    @property
    def position(self) -> Position:
        """The first token of the next row."""
        document, token = self._part.locate(self._offset)
        return Position(self._epoch, self._index, document, token)

    def take(self, rows: int) -> Array:
        """The next rows, (rows, T + 1) token ids."""
        need = rows * self._seq_len + 1
        pieces: list[Array] = []
        empty_parts = 0
        while need:
            piece = self._part.read(self._offset, need)
            pieces.append(piece)
            need -= len(piece)
            self._offset += len(piece)
            if need:
                empty_parts = 0 if len(piece) else empty_parts + 1
                if empty_parts > len(self._plan.parts):
                    raise _empty_stream(self._stream)
                self._next_part()
        self._offset -= 1
        return cut_rows(pieces[0] if len(pieces) == 1 else np.concatenate(pieces), self._seq_len)

    def _next_part(self) -> None:
        self._index += 1
        if self._index == len(self._plan.parts):
            self._epoch, self._index = self._epoch + 1, 0
        if len(self._plan.parts) > 1:
            part = self._plan.parts[self._index]
            self._part = _PreparedPart(self._source.train[part.shard], part)
        self._offset = 0


class PaddedPreparedStream(PreparedStream):
    """A :class:`PreparedStream` with the same rows as :class:`PaddedTextStream`."""

    def __init__(
        self, source: PreparedSource, plan: Plan, stream: int, position: Position, seq_len: int, end: int
    ) -> None:
        super().__init__(source, plan, stream, position, seq_len)
        self._end = end

    def take(self, rows: int) -> Array:
        """The next rows, (rows, T + 1) token ids."""
        documents: list[Array] = []
        empty_parts = 0
        while len(documents) < rows:
            stop = self._part.document_end(self._offset)
            if stop is None:
                empty_parts += 1
                if empty_parts > len(self._plan.parts):
                    raise _empty_stream(self._stream)
                self._next_part()
                continue
            empty_parts = 0
            documents.append(self._part.read(self._offset, min(self._seq_len, stop - self._offset)))
            self._offset = stop
        return one_a_row(documents, self._seq_len, self._end)


class _PreparedPart:
    """The documents of a part as one run of tokens."""

    def __init__(self, shard: PreparedShard, part: Part) -> None:
        self._shard, self._stride = shard, part.stride
        bounds = shard.bounds()
        self._starts = bounds[:-1][part.phase :: part.stride].astype(np.int64)
        lengths = (bounds[1:] - bounds[:-1])[part.phase :: part.stride].astype(np.int64)
        self._ends = np.cumsum(lengths)
        self._size = int(self._ends[-1]) if len(lengths) else 0
        self._window, self._window_start = np.empty(0, dtype=shard.dtype), 0

    def offset(self, position: Position) -> int:
        before = int(self._ends[position.document - 1]) if position.document else 0
        return before + position.token

    def locate(self, offset: int) -> tuple[int, int]:
        """Document and token of an offset into the run."""
        document = int(np.searchsorted(self._ends, offset, side="right"))
        return document, offset - (int(self._ends[document - 1]) if document else 0)

    def document_end(self, offset: int) -> int | None:
        """The offset behind the document that an offset into the run is in; None at the end of the run."""
        return int(self._ends[self.locate(offset)[0]]) if offset < self._size else None

    def read(self, offset: int, count: int) -> Array:
        """At most ``count`` tokens from ``offset`` on; fewer where the part ends."""
        stop = min(offset + count, self._size)
        if not self._window_start <= offset <= stop <= self._window_start + len(self._window):
            self._window = self._look_up(offset, min(max(stop, offset + WINDOW), self._size))
            self._window_start = offset
        return self._window[offset - self._window_start : stop - self._window_start]

    def _look_up(self, offset: int, stop: int) -> Array:
        """Tokens ``offset`` to ``stop`` of the run."""
        if stop <= offset:
            return np.empty(0, dtype=self._shard.dtype)
        first, token = self.locate(offset)
        last, _ = self.locate(stop - 1)
        if self._stride == 1:
            start = int(self._starts[first]) + token
            return self._shard.tokens(start, start + stop - offset)
        run_start = int(self._starts[first])
        last_start = int(self._ends[last - 1]) if last else 0
        run = self._shard.tokens(run_start, int(self._starts[last]) + stop - last_start)
        starts = self._starts[first : last + 1] - run_start
        lengths = np.diff(self._ends[first : last + 1], prepend=int(self._ends[first - 1]) if first else 0)
        wanted = [run[start : start + length] for start, length in zip(starts.tolist(), lengths.tolist(), strict=True)]
        return np.concatenate(wanted)[token : token + stop - offset]
