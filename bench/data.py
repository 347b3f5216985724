"""Speed of the data: streamed rows against bare tokenising, prepared tokens, resuming, memory.

    python bench/data.py                              # the offline sample, or real text where there is some
    python bench/data.py --data DIR --workers 4       # a folder in C4's layout

What is compared takes turns and medians are shown, so that a machine that is busy with other things slows
both sides alike. Starting processes and the first rows are no part of the rates; resuming shows them apart.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import cycle, islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import tokenizers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout that is not installed

from common.command import run_command
from data.loader import Loader, Order
from data.packing import make_batch
from data.prepare import prepare
from data.prepared import PreparedSource
from data.settings import Mix
from data.sources import Corpus, Shard, TextSource, lines, open_source
from data.streams import make_plans
from data.tokenizer import Tokenizer, sample_texts, train_tokenizer

REAL_TEXT = Path(__file__).resolve().parents[2] / "shared" / "datasets" / "wikipedia-en-2014"
VOCAB = 32_768
TEXT_BYTES = 20_000_000
"""Text that the tokenizer is trained on, that is encoded from memory, and that is prepared."""

STREAMS, SEQ_LEN, BATCH_ROWS = 64, 2048, 512
PREPARED_TARGET = 100e6
"""Tokens/s of one process."""


@dataclass(frozen=True)
class Setting:
    """What all measurements share."""

    source: TextSource
    tokenizer: Tokenizer
    texts: list[str]
    cache: Path
    rounds: int
    seconds: float
    """Of each side in each round."""

    @property
    def order(self) -> Order:
        """Rows streamed from the text."""
        return Order(Corpus((self.source,), (1.0,)), self.tokenizer.folder, SEQ_LEN, STREAMS, seed=0)


def open_setting(name: str, rounds: int, seconds: float) -> Setting:
    """Open the data; the tokenizer is trained once and kept with other temporary files."""
    corpus = Corpus.open(Mix.parse(name))
    source = corpus.sources[0]
    assert isinstance(source, TextSource), "give text, not prepared tokens"
    texts = list(sample_texts(corpus, TEXT_BYTES))
    cache = Path(tempfile.gettempdir()) / f"palmtop-bench-{hashlib.blake2b(name.encode(), digest_size=6).hexdigest()}"
    folder = cache / "tokenizer"
    tokenizer = Tokenizer(folder) if folder.exists() else train_tokenizer(texts, VOCAB, folder)
    return Setting(source, tokenizer, texts, cache, rounds, seconds)


def tokens_per_second(loader: Loader, rows: int, seconds: float) -> float:
    """Speed of taking batches of ``rows`` for a while."""
    taken, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        taken += loader.take(rows)[:, 1:].size
    return taken / (time.perf_counter() - start)


# --- streamed text against bare tokenising


def encode_on_request(pipe: Connection, tokenizer: Path, texts: list[str], threads: int) -> None:
    """Tokenise texts from memory, for as many seconds as the pipe asks; answers tokens/s; ends at 0."""
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    backend = tokenizers.Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    endless = cycle(texts)
    while seconds := pipe.recv():
        tokens, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            tokens += sum(map(len, backend.encode_batch(list(islice(endless, 128)), add_special_tokens=False)))
        pipe.send(tokens / (time.perf_counter() - start))


def streamed(setting: Setting, workers: int) -> Iterator[str]:
    """Lines about streaming with workers, one core each, against encode_batch on as many threads."""
    ours, theirs = multiprocessing.Pipe()
    arguments = (theirs, setting.tokenizer.folder, setting.texts, workers)
    bare = multiprocessing.get_context("spawn").Process(target=encode_on_request, args=arguments)
    bare.start()
    loader = Loader(setting.order, workers=workers)
    speeds: dict[str, list[float]] = {"bare": [], "streamed": []}
    loader.take(STREAMS)
    for number in range(setting.rounds + 1):
        ours.send(setting.seconds)
        bare_speed = ours.recv()
        loader.take(8 * STREAMS)  # what the workers made ahead while the other side was measured
        speed = tokens_per_second(loader, 16, setting.seconds)
        if number:  # the first round fills the tokenizers' caches of words
            speeds["bare"].append(bare_speed)
            speeds["streamed"].append(speed)
    ours.send(0)
    bare.join()
    megabytes = [resident(process.pid) / 1e6 for process in loader._ahead._iterator._workers]  # type: ignore[union-attr]
    loader.close()
    bare_speed = statistics.median(speeds["bare"])
    speed = statistics.median(speeds["streamed"])
    ratio = statistics.median(s / b for b, s in zip(speeds["bare"], speeds["streamed"], strict=True))
    yield row(f"encode_batch, text in memory, {workers} threads", f"{bare_speed:,.0f} tokens/s")
    yield row(f"Loader, {workers} workers of one thread", f"{speed:,.0f} tokens/s", f"{ratio:.2f}", ">= 0.90")
    yield row("memory of a worker", f"{max(megabytes):,.0f} MB")


def resident(pid: int | None) -> float:
    """Bytes of memory that a process has; NaN where there is no /proc."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:
        return float("nan")
    return pages * os.sysconf("SC_PAGE_SIZE")


# --- prepared tokens


def prepared(setting: Setting) -> Iterator[str]:
    """Lines about prepared tokens in this process."""
    for shards in (STREAMS, 4):
        source = prepared_source(setting, shards)
        dealt = "whole shards to streams" if shards >= STREAMS else "documents in turn to streams"
        for seq_len in (2048, 256):
            order = Order(Corpus((source,), (1.0,)), setting.tokenizer.folder, seq_len, STREAMS, seed=0)
            loader, end = Loader(order), setting.tokenizer.end
            takes, batches = [], []
            for number in range(1 + max(5, setting.rounds) * 2048 // seq_len):
                start = time.perf_counter()
                rows = loader.take(BATCH_ROWS)
                taken = time.perf_counter()
                make_batch(rows, end)
                if number:
                    takes.append(taken - start)
                    batches.append(time.perf_counter() - start)
            tokens = BATCH_ROWS * seq_len
            take, both = (tokens / statistics.median(seconds) for seconds in (takes, batches))
            yield row(f"T={seq_len}, {dealt}: take", f"{take / 1e6:,.0f}M tokens/s")
            ratio = both / PREPARED_TARGET
            yield row(
                f"T={seq_len}, {dealt}: take and make_batch", f"{both / 1e6:,.0f}M tokens/s", f"{ratio:.2f}", ">= 1"
            )


def prepared_source(setting: Setting, shards: int) -> PreparedSource:
    """The texts as prepared tokens in so many shards."""
    text, out = (setting.cache / f"{what}-{shards}" for what in ("text", "prepared"))
    if not (out / "manifest.json").exists():
        text.mkdir(parents=True, exist_ok=True)
        for number in range(shards):
            records = [json.dumps({"text": one}) for one in setting.texts[number::shards]]
            (text / f"train.{number:05d}.jsonl").write_text("\n".join(records), encoding="utf-8")
        source = open_source(str(text))
        assert isinstance(source, TextSource)
        list(prepare(source, setting.tokenizer, out, workers=os.cpu_count() or 1))
    return PreparedSource.open(out)


# --- resuming


@dataclass(frozen=True)
class Point:
    """A place in the epoch: the loader's state there, and how many lines of each shard it lies behind."""

    state: dict[str, Any]
    reading: dict[Shard, dict[int, int]]
    """Of each shard, the lines that each of its streams has behind it."""


def random_point(setting: Setting, documents: dict[str, int], rng: random.Random) -> Point:
    """All streams at about the same random share of their documents."""
    share = rng.uniform(0.1, 0.9)
    positions: dict[str, list[int]] = {}
    reading: dict[Shard, dict[int, int]] = {}
    for stream, plan in enumerate(make_plans(setting.order.corpus, STREAMS, 0)):
        number = int(share * len(plan.parts))
        part = plan.parts[number]
        shard = setting.source.train[part.shard]
        within = share * len(plan.parts) - number
        document = int(within * rng.uniform(0.97, 1) * documents[shard.name] / part.stride)
        positions[str(stream)] = [0, number, document, 0]
        reading.setdefault(shard, {})[stream] = document * part.stride + part.phase
    return Point({"rows": 0, "positions": positions}, reading)


def decompress(shards: list[tuple[Shard, int]]) -> None:
    """Read so many lines of each shard and do nothing with them."""
    for shard, count in shards:
        for _ in islice(lines(shard), count):
            pass


def resuming(setting: Setting, workers: int) -> Iterator[str]:
    """Lines about the time to the first batch at a random point of the epoch."""
    documents = {shard.name: sum(1 for _ in lines(shard)) for shard in setting.source.train}
    rng = random.Random(0)
    for count in (0, workers):
        fresh, later, bare = [], [], []
        for _ in range(setting.rounds):
            point = random_point(setting, documents, rng)
            fresh.append(first_batch(setting, count, None))
            later.append(first_batch(setting, count, point.state))
            bare.append(bare_decompression(point, max(count, 1)))
        extra = [resumed - started for resumed, started in zip(later, fresh, strict=True)]
        ratio = statistics.median(one / other for one, other in zip(extra, bare, strict=True))
        yield row(f"first batch of a new run, {count} workers", f"{statistics.median(fresh):.2f} s")
        yield row(f"first batch in mid-epoch, {count} workers", f"{statistics.median(later):.2f} s")
        yield row("   more than a new run takes", f"{statistics.median(extra):.2f} s", f"{ratio:.2f}", "<= 1.00")
        yield row("   bare decompression up to there", f"{statistics.median(bare):.2f} s")


def first_batch(setting: Setting, workers: int, state: dict[str, Any] | None) -> float:
    """Seconds from nothing to one row of every stream."""
    start = time.perf_counter()
    loader = Loader(setting.order, workers=workers, state=state)
    loader.take(STREAMS)
    seconds = time.perf_counter() - start
    loader.close()
    return seconds


def bare_decompression(point: Point, processes: int) -> float:
    """Seconds to decompress, in so many processes, what each worker has to read to get to its streams."""
    jobs: list[list[tuple[Shard, int]]] = []
    for worker in range(processes):
        own = [
            (shard, max((at for stream, at in streams.items() if stream % processes == worker), default=0))
            for shard, streams in point.reading.items()
        ]
        jobs.append([(shard, count) for shard, count in own if count])
    with ProcessPoolExecutor(processes, multiprocessing.get_context("fork")) as pool:
        list(pool.map(abs, range(processes)))  # the processes are there
        start = time.perf_counter()
        list(pool.map(decompress, jobs))
        return time.perf_counter() - start


def row(what: str, value: str, ratio: str = "", target: str = "") -> str:
    """A line of the table."""
    return f"{what:<58} {value:>20} {ratio:>7} {target:>8}"


def machine() -> str:
    """What the numbers depend on."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")]
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    name = names[0] if names else platform.processor()
    return (
        f"{name}, {os.cpu_count()} cores{load}, Python {platform.python_version()}, tokenizers {tokenizers.__version__}"
    )


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=str(REAL_TEXT) if REAL_TEXT.exists() else "sample")
    parser.add_argument("--workers", type=int, default=1, help="worker processes, and threads of encode_batch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each side in each round")
    parser.add_argument("--only", nargs="+", choices=("streamed", "prepared", "resuming"), help="some parts")
    args = parser.parse_args()
    setting = open_setting(args.data, args.rounds, args.seconds)
    print(machine())
    size = sum(len(text.encode()) for text in setting.texts) / 1e6
    print(f"{setting.source.name}: {len(setting.source.train)} shards; vocabulary {setting.tokenizer.vocab_size:,}; ")
    print(f"{size:.0f} MB in memory; T={SEQ_LEN}, {STREAMS} streams, {args.rounds} rounds\n")
    print(row("", "median", "ratio", "target"))
    parts: dict[str, Callable[[], Iterator[str]]] = {
        "streamed": lambda: streamed(setting, args.workers),
        "prepared": lambda: prepared(setting),
        "resuming": lambda: resuming(setting, args.workers),
    }
    for name, part in parts.items():
        if args.only is None or name in args.only:
            for line in part():
                print(line, flush=True)


if __name__ == "__main__":
    run_command(main)
