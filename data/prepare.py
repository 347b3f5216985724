"""Write the tokens of a corpus once: ``python -m data prepare``.

Shards are tokenised in parallel, each into files of its own that appear only when they are whole, so a
killed run goes on where it stopped. The format is described in ``data/prepared.py``.
"""

import json
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from common import signals
from common.errors import UserError
from common.files import exclusive, gigabytes, new_folder, readable_disk_errors, require_space, sync, write_json
from data.prepared import BEGUN, BLOCK, MANIFEST, block_checksums
from data.sources import DamagedShardError, Shard, TextSource, held_out, lines, text_of
from data.tokenizer import Tokenizer

BATCH = 256
"""Documents that are tokenised at a time."""


@dataclass(frozen=True)
class Job:
    """One shard of text to be tokenised."""

    shard: Shard
    stem: str
    out: Path
    tokenizer: Path
    holds_out: bool
    """Held-out documents go into a validation shard of their own instead of training."""
    validation: bool
    skip_bad_shards: bool

    @property
    def stems(self) -> list[str]:
        """The names of its files: the shard's, and where documents are held out those of their own."""
        return [self.stem, *([self.stem.replace("train", "validation")] if self.holds_out else [])]


def prepare(
    source: TextSource, tokenizer: Tokenizer, out: Path, *, workers: int, skip_bad_shards: bool = False
) -> Iterator[dict[str, Any]]:
    """Tokenise every shard of ``source`` into ``out``; yields each finished shard's record.

    Raises:
        UserError: ``out`` holds something else, a shard is damaged, the disk is full.
    """
    if out.exists() and any(out.iterdir()) and not (out / BEGUN).exists():
        raise UserError(f"{out} is not empty and holds no prepared tokens; choose another --out")
    with exclusive(out, f"the folder {out}"):
        _claim(out, source, tokenizer)
        jobs = [
            Job(shard, stem, out, tokenizer.folder, source.holds_out, stem.startswith("validation"), skip_bad_shards)
            for stem, shard in _stems(source)
        ]
        todo = [job for job in jobs if not all(_record(out, stem).exists() for stem in job.stems)]
        for job in jobs:
            if job not in todo:
                yield json.loads(_record(out, job.stem).read_text())
        yield from _write_shards(todo, workers)
        _write_manifest(out, source, jobs)


def _stems(source: TextSource) -> Iterator[tuple[str, Shard]]:
    """Every shard of a source with the name of its files."""
    for split, shards in (("train", source.train), ("validation", source.validation)):
        for number, shard in enumerate(shards):
            yield f"{split}-{number:05d}", shard


def _record(out: Path, stem: str) -> Path:
    """The file whose presence says that a shard is done."""
    return out / f"{stem}.json"


def _write_shards(jobs: list[Job], workers: int) -> Iterator[dict[str, Any]]:
    if workers == 0:
        yield from map(_write_shard, jobs)
        return
    # Spawned rather than forked: the tokenizer's threads do not survive a fork.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_start_worker) as pool:
        running = [pool.submit(_write_shard, job) for job in jobs]
        try:
            for done in as_completed(running):
                yield done.result()
        except BrokenProcessPool as error:
            raise UserError(
                "a worker process was killed, perhaps for want of memory; run again with fewer --workers"
            ) from error
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _claim(out: Path, source: TextSource, tokenizer: Tokenizer) -> None:
    """Make ``out`` ours, or make sure that what it holds was begun with the same source and tokenizer."""
    mark = out / BEGUN
    wanted = {
        "source": source.name,
        "shards": [shard.name for shard in (*source.train, *source.validation)],
        "tokenizer": tokenizer.digest,
    }
    if mark.exists():
        begun = json.loads(mark.read_text())
        different = [name for name in wanted if begun.get(name) != wanted[name]]
        if different:
            raise UserError(f"{out} was begun with another {' and '.join(different)}; choose another --out")
        return
    with new_folder(out / "tokenizer") as folder:
        tokenizer.copy_to(folder)
    write_json(mark, wanted)


def _start_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signals.ignore()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _write_shard(job: Job) -> dict[str, Any]:
    """Tokenise one shard; returns its record, which is written last and makes it count as done."""
    tokenizer = Tokenizer(job.tokenizer)
    kept = _Writer(job.out, job.stem, tokenizer.dtype)
    aside = _Writer(job.out, job.stems[1], tokenizer.dtype) if job.holds_out else None
    damage = None
    reader = enumerate(lines(job.shard), 1)
    while True:
        texts: list[str] = []
        try:
            for number, line in islice(reader, BATCH):
                texts.append(text_of(line, job.shard, number))
        except DamagedShardError as error:
            if not job.skip_bad_shards:
                raise UserError(f"{error}. Fetch it again, or keep what is readable with --skip-bad-shards") from error
            damage = str(error)
        if not texts:
            break
        apart = [aside is not None and held_out(text) for text in texts]
        for text, ids, out in zip(texts, tokenizer.encode_documents(texts), apart, strict=True):
            kept.add(ids[:0] if out else ids, 0 if out else len(text.encode()))
            if out and aside is not None and len(ids):
                aside.add(ids, len(text.encode()))
        if damage:
            break
    if aside is not None:
        aside.close(job.shard.name, damage, with_text_bytes=True)
    return kept.close(job.shard.name, damage, with_text_bytes=job.validation)


class _Writer:
    """Collects documents and writes the files of one prepared shard."""

    def __init__(self, folder: Path, stem: str, dtype: str) -> None:
        self._folder, self._stem, self._dtype = folder, stem, dtype
        self._temporary = folder / f".{stem}.tokens.tmp"
        self._bounds, self._sizes = [0], [0]
        with readable_disk_errors(self._temporary):
            self._file = open(self._temporary, "wb")  # noqa: SIM115  (closed by close)

    def add(self, ids: np.ndarray[Any, Any], text_bytes: int) -> None:
        """Append one document."""
        with readable_disk_errors(self._temporary):
            self._file.write(ids.tobytes())
        self._bounds.append(self._bounds[-1] + len(ids))
        self._sizes.append(text_bytes)

    def close(self, name: str, damage: str | None, *, with_text_bytes: bool) -> dict[str, Any]:
        """Move the files into place, the JSON record last; returns the record."""
        with readable_disk_errors(self._temporary):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            index = {"bounds": np.array(self._bounds, dtype="<u8")}
            if with_text_bytes:
                index["text_bytes"] = np.array(self._sizes[1:], dtype="<u4")
            sums = {what: self._save_index(what, values) for what, values in index.items()}
        tokens = np.fromfile(self._temporary, dtype=self._dtype)
        os.replace(self._temporary, self._folder / f"{self._stem}.tokens")
        record = {
            "stem": self._stem,
            "name": name,
            "dtype": self._dtype,
            "documents": len(self._bounds) - 1,
            "tokens": len(tokens),
            "text_bytes": sum(self._sizes),
            "damage": damage,
            "block": BLOCK,
            "checksums": block_checksums(tokens),
            "index_checksums": sums,
        }
        write_json(_record(self._folder, self._stem), record)
        return record

    def _save_index(self, what: str, values: np.ndarray[Any, Any]) -> str:
        """Write an index file; returns its checksum."""
        path = self._folder / f"{self._stem}.{what}.npy"
        np.save(path, values)
        sync(path)
        return xxhash.xxh3_64_hexdigest(path.read_bytes())


def _write_manifest(out: Path, source: TextSource, jobs: list[Job]) -> None:
    """List all shards; its presence says that the folder is complete."""
    shards: dict[str, list[dict[str, Any]]] = {"train": [], "validation": []}
    for job in jobs:
        for stem in job.stems:
            record = json.loads(_record(out, stem).read_text())
            shards[stem.partition("-")[0]].append(record)
    totals = {name: sum(record[name] for record in shards["train"]) for name in ("documents", "tokens", "text_bytes")}
    write_json(out / MANIFEST, {"format": 1, "source": source.name, "totals": totals, **shards})


def check_space(source: TextSource, tokenizer: Tokenizer, out: Path) -> None:
    """Refuse to start when the disk under ``out`` cannot hold the tokens that are still to be written.

    Tokens of two bytes take about as much room as the gzipped text they come from.
    """
    missing = sum(shard.size for stem, shard in _stems(source) if not _record(out, stem).exists())
    needed = missing * np.dtype(tokenizer.dtype).itemsize // 2
    require_space(out.absolute(), needed, f"preparing {source.name} ({gigabytes(missing)} of shards)")
