"""The files of a dataset on the Hugging Face hub, read from their first byte on while they are fetched.

Whole shards are dealt to the streams of a run, so a run opens many large files at once and reads each
of them slowly. A shard is therefore fetched in ranges, as far as it is read, and what came is kept:
``<cache>/hub/<repository>/<commit>/<name>.part`` holds a prefix of the file and loses the suffix when it
is whole. Nothing is fetched twice, by whichever process and however the last run ended.

``datasets`` says which files belong to a config and a split; huggingface_hub's client fetches them, with
its retries (dropped connections, timeouts, HTTP 408, 429 and 5xx) and the waits that the hub asks for.
"""

import errno
import fcntl
import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

from common.errors import UserError
from common.files import cache_folder, readable_disk_errors, require_space, sync, write_json

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

FIRST_RANGE = 2**20
"""Bytes of the first request for a shard; each following request asks for twice as many."""

LARGEST_RANGE = 2**24
"""Bytes that a request asks for at most."""

_BUFFER = 2**17
_CONFIGS_NAMED = 20


@dataclass(frozen=True)
class HubShard:
    """A file of a dataset repository at one commit."""

    url: str
    """``hf://datasets/allenai/c4@<commit>/en/c4-train.00000-of-01024.json.gz``."""
    name: str
    """The path inside the repository."""
    size: int
    """Bytes."""

    @property
    def where(self) -> str:
        """Its place in the cache."""
        return str(self._cached)

    @property
    def identity(self) -> str:
        """Its url, which names the commit."""
        return self.url

    def open(self) -> BinaryIO:
        """Read the file as it is stored (still compressed), from its start; not seekable.

        What the cache lacks is fetched when reading gets there.

        Raises:
            UserError: here and in every read: the hub fails in spite of retries, the disk is full or
                cannot be written, the file in the cache has the wrong size.
        """
        whole = self._cached
        if not whole.exists():
            with readable_disk_errors(whole):
                whole.parent.mkdir(parents=True, exist_ok=True)
            with _locked(whole):
                if (_size(_part(whole)) or 0) >= self.size:
                    _complete(whole, self.size)  # the process that fetched the last range was killed before this
                if not whole.exists():
                    descriptor = os.open(_part(whole), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
                    return cast(BinaryIO, io.BufferedReader(_Reader(self, whole, descriptor), _BUFFER))
        _require_size(whole, self.size)
        return open(whole, "rb")

    @property
    def _origin(self) -> tuple[str, str]:
        """The repository and the commit."""
        repo, _, commit = self.url.removeprefix("hf://datasets/").removesuffix("/" + self.name).partition("@")
        return repo, commit

    @property
    def _cached(self) -> Path:
        repo, commit = self._origin
        return cache_folder() / "hub" / repo.replace("/", "--") / commit / self.name


def resolve(repo: str, config: str | None) -> dict[str, list[HubShard]]:
    """The files of a dataset, at the commit that ``main`` had when this machine first asked.

    The answer is kept in the cache, as ``<config>.json`` beside the shards: a run that goes on later
    reads the same commit, and needs no hub for what has been fetched. Delete that file to ask again.

    Args:
        repo: the repository, ``allenai/c4``.
        config: the subset, ``en``; None where the dataset has only one.

    Returns:
        The shards of each split, sorted by name.

    Raises:
        UserError: the hub is out of reach, the dataset is unknown or gated, the config is unknown.
    """
    kept = cache_folder() / "hub" / repo.replace("/", "--") / f"{config or 'default'}.json"
    if not kept.exists():
        splits = _ask(repo, config)
        write_json(kept, {split: [asdict(shard) for shard in shards] for split, shards in splits.items()})
    stored = json.loads(kept.read_text(encoding="utf-8"))
    return {split: [HubShard(**shard) for shard in shards] for split, shards in stored.items()}


def _ask(repo: str, config: str | None) -> dict[str, list[HubShard]]:
    from huggingface_hub import HfApi, HfFileSystem
    from huggingface_hub.constants import HF_HUB_ETAG_TIMEOUT

    with _readable_hub_errors(repo):
        # Naming the commit also spares a call to the dataset viewer, whose answer nobody needs here.
        commit = HfApi().dataset_info(repo, timeout=HF_HUB_ETAG_TIMEOUT).sha
        splits = _data_files(repo, str(commit), config)
        root = f"hf://datasets/{repo}@{commit}/"
        outside = [url for urls in splits.values() for url in urls if not url.startswith(root)]
        if outside or not any(splits.values()):
            raise UserError(f"{repo} cannot be streamed: " + (f"{outside[0]} is elsewhere" if outside else "no files"))
        # The file system that datasets has just listed the same folders with: it answers from memory.
        hub = HfFileSystem()
        folders = {url.rpartition("/")[0] for urls in splits.values() for url in urls}
        entries = [entry for folder in folders for entry in hub.ls(folder, detail=True)]
    sizes = {f"hf://{entry['name']}": entry["size"] for entry in entries if isinstance(entry, dict)}
    return {
        split: [HubShard(url, url.removeprefix(root), sizes[url]) for url in sorted(urls)]
        for split, urls in splits.items()
    }


def _data_files(repo: str, commit: str, config: str | None) -> dict[str, list[str]]:
    """The urls of each split."""
    import datasets

    remote = f"hf://datasets/{repo}"  # never a local folder that happens to have the repository's name
    try:
        builder = datasets.load_dataset_builder(remote, config, revision=commit)
    except ValueError as error:
        names = datasets.get_dataset_config_names(remote, revision=commit)
        if config in names:
            raise
        raise UserError(_which_config(repo, config, names)) from error
    return {str(split): list(urls) for split, urls in (builder.config.data_files or {}).items()}


def _which_config(repo: str, config: str | None, names: list[str]) -> str:
    """Say which configs there are, those that look most like ``config`` first."""
    near = sorted(names, key=lambda name: -SequenceMatcher(None, config or "", name).ratio())
    listed = ", ".join(near[:_CONFIGS_NAMED])
    more = f" and {len(near) - _CONFIGS_NAMED} more" if len(near) > _CONFIGS_NAMED else ""
    problem = f"{repo} has no config {config!r}" if config else f"{repo} has several configs and none was named"
    return f"{problem}; it has {listed}{more}"


@contextmanager
def _readable_hub_errors(repo: str) -> Iterator[None]:
    """Turn what goes wrong while asking the hub about ``repo`` into a UserError."""
    from huggingface_hub.constants import HF_HOME
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

    try:
        with readable_disk_errors(Path(HF_HOME)):
            yield
    except (httpx.HTTPError, ConnectionError, FileNotFoundError, HFValidationError) as error:
        raise UserError(_explanation(repo, error)) from error


def _explanation(repo: str, error: Exception) -> str:
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    # datasets reports a gated repository as a missing one, and only its text tells them apart.
    if isinstance(error, GatedRepoError) or "is a gated dataset" in str(error):
        return f"{repo} is gated: ask for access on its page on the hub, then log in with `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return f"the hub has no dataset {repo}, or it is private: check the name, or log in with `hf auth login`"
    if isinstance(error, HFValidationError):
        return f"{repo!r} cannot be the name of a dataset on the hub; names look like allenai/c4"
    if isinstance(error, FileNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
        return f"{repo} has no data files that can be read: {_first_line(error)}"
    return (
        f"the Hugging Face hub cannot be reached for {repo} ({_reason(error)}). Check the network, or give "
        "a local folder: --data DIR, with files in C4's layout (c4-train.00000-of-01024.json.gz, ...)"
    )


class _Reader(io.RawIOBase):
    """The bytes of a shard that is not whole yet, from its start.

    Reads and writes go through one descriptor, so they meet the same file even when another process
    gives it its final name. A range is written at its own offset: whatever happens, and to however many
    processes, a byte of the cache is never anything but that byte of the shard.
    """

    def __init__(self, shard: HubShard, whole: Path, descriptor: int) -> None:
        super().__init__()
        self._shard = shard
        self._whole = whole
        self._position = 0
        self._descriptor = descriptor

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        if self._missing():
            self._fetch()
        count = os.preadv(self._descriptor, [buffer], self._position)
        self._position += count
        return count

    def close(self) -> None:
        if not self.closed:
            os.close(self._descriptor)
        super().close()

    def _missing(self) -> bool:
        return self._position < self._shard.size and os.fstat(self._descriptor).st_size <= self._position

    def _fetch(self) -> None:
        """Have one more range on the disk, be it that another process brought it meanwhile."""
        with _locked(self._whole):
            if not self._missing():
                return
            start = os.fstat(self._descriptor).st_size
            end = min(self._shard.size, start + min(start + FIRST_RANGE, LARGEST_RANGE))
            require_space(self._whole.parent, end - start, f"the next part of {self._shard.name} (in $PALMTOP_CACHE)")
            content = memoryview(_download(self._shard, start, end))
            while content:
                written = os.pwrite(self._descriptor, content, start)
                content, start = content[written:], start + written
            if end == self._shard.size:
                _complete(self._whole, self._shard.size)


def _download(shard: HubShard, start: int, end: int) -> bytes:
    """The bytes ``start`` to ``end`` (exclusive) of a shard, all of them.

    Raises:
        UserError: five retries did not help, the hub refuses, or it sends something else.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.constants import HF_HUB_DOWNLOAD_TIMEOUT
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        build_hf_headers,
        hf_raise_for_status,
        http_backoff,
        httpx,
    )

    repo, commit = shard._origin
    # Compression on the way would make lengths and offsets those of something else.
    headers = build_hf_headers() | {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
    try:
        url = hf_hub_url(repo, shard.name, repo_type="dataset", revision=commit)
        response = http_backoff("GET", url, headers=headers, timeout=HF_HUB_DOWNLOAD_TIMEOUT)
        hf_raise_for_status(response)
    except (httpx.HTTPError, ConnectionError) as error:
        raise UserError(_failure(shard, start, _reason(error))) from error
    sent = response.headers.get("Content-Range", f"bytes 0-{len(response.content) - 1}/")
    if len(response.content) != end - start or not sent.startswith(f"bytes {start}-{end - 1}/"):
        wrong = f"asked for {end - start} bytes from there, got {len(response.content)} ({sent})"
        raise UserError(_failure(shard, start, wrong))
    return response.content


def _failure(shard: HubShard, start: int, reason: str) -> str:
    return (
        f"{shard.url} cannot be fetched from byte {start} of {shard.size} on: {reason}. "
        "What was fetched is kept; run the same command again to go on"
    )


@contextmanager
def _locked(whole: Path) -> Iterator[None]:
    """Be the only process, on any machine that shares the disk, that changes this shard; disk errors are readable."""
    with readable_disk_errors(whole), open(_lock(whole), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            raise UserError(f"the disk of {whole.parent} has no file locks; set PALMTOP_CACHE to another") from error
        yield


def _complete(whole: Path, size: int) -> None:
    """Give a shard that was fetched to its end its final name; the caller holds the lock."""
    _require_size(_part(whole), size)
    sync(_part(whole))
    os.replace(_part(whole), whole)
    # Whoever still waits for this lock will find the whole file and write nothing.
    _lock(whole).unlink(missing_ok=True)


def _require_size(path: Path, size: int) -> None:
    found = _size(path)
    if found != size:
        raise UserError(
            f"{path} is damaged: it has {found or 0} bytes where the hub has {size}. Delete it and run again"
        )


def _size(path: Path) -> int | None:
    """Bytes of a file, None when there is none."""
    return path.stat().st_size if path.exists() else None


def _part(whole: Path) -> Path:
    return whole.with_name(whole.name + ".part")


def _lock(whole: Path) -> Path:
    return whole.with_name(whole.name + ".lock")


def _reason(error: Exception) -> str:
    """What went wrong on the way to the hub, in a few words."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    response = getattr(error, "response", None)
    if response is not None:
        return f"HTTP {response.status_code} {response.reason_phrase}"
    return "HF_HUB_OFFLINE is set" if isinstance(error, OfflineModeIsEnabled) else _first_line(error)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]
