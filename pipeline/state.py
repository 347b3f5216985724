"""What of a recipe is done: a record of every stage, and digests of what it read.

A stage is done when its command, with the settings that it has now, has ended well on inputs with the contents that
they have now, and what it made is there. Neither times of files nor the version of the code count.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from common.errors import UserError
from common.files import readable_disk_errors, write_json
from pipeline.stages import Task, inputs

FOLDER = "pipeline"
"""In a recipe's folder: the stages' records and logs."""


@dataclass(frozen=True)
class Status:
    """Where a stage stands."""

    key: str
    """Digest of its command and all that it reads, now."""
    record: dict[str, Any]
    """Of its last start; empty before the first."""
    done: bool
    changed: bool
    """It has been started on other inputs, or by another command."""

    @property
    def seconds(self) -> float:
        """What it took, the last time."""
        return float(self.record.get("seconds", 0.0))


class State:
    """The records of a recipe's stages.

    Args:
        folder: the recipe's.
        every: all its stages.
    """

    def __init__(self, folder: Path, every: Sequence[Task]) -> None:
        self.folder, self.every = folder, every
        self._digests = _Digests(folder / FOLDER / "digests.json")

    def of(self, task: Task) -> Status:
        """Where a stage stands; what it reads must be there."""
        key, record = self._key(task), self.record(task)
        same = record.get("key") == key
        done = same and record.get("state") == "done" and task.place.result.exists()
        return Status(key, record, done, bool(record) and not same)

    def record(self, task: Task) -> dict[str, Any]:
        """What is noted of a stage's last start."""
        try:
            record = json.loads(self._path(task).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return record if isinstance(record, dict) else {}

    def begin(self, task: Task) -> Path | None:
        """Note that a stage starts. What an earlier start on other inputs left is set aside first.

        Returns:
            Where that lies now, if there was any.
        """
        status = self.of(task)
        aside = self._set_aside(task) if status.changed else None
        began = {"state": "begun", "key": status.key, "command": task.words, "shown": task.shown, "began": time.time()}
        write_json(self._path(task), began)
        return aside

    def finish(self, task: Task) -> float:
        """Note that a stage has ended well; returns the seconds since it was begun.

        Raises:
            UserError: what it should have made is not there.
        """
        if not task.place.result.exists():
            raise UserError(f"stage {task.name} ended without {task.place.result}; see its log {self.log(task)}")
        record = self.record(task)
        seconds = time.time() - record["began"]
        write_json(self._path(task), record | {"state": "done", "seconds": seconds})
        return float(seconds)

    def log(self, task: Task) -> Path:
        """Where a stage's output goes when it runs here."""
        return self.folder / FOLDER / f"{task.name}.log"

    def _path(self, task: Task) -> Path:
        return self.folder / FOLDER / f"{task.name}.json"

    def _key(self, task: Task) -> str:
        read = {
            name: self._digests.of(path, parts, inside)
            for name, (path, parts, inside) in inputs(task, self.every).items()
        }
        return xxhash.xxh3_128_hexdigest(json.dumps([task.words, read], sort_keys=True).encode())

    def _set_aside(self, task: Task) -> Path | None:
        """Move away what the command would go on with; nothing is deleted, for it may have cost days."""
        whole = task.place.whole
        if whole is None or not whole.exists():
            return None
        earlier = self.folder / "replaced"
        with readable_disk_errors(earlier):
            earlier.mkdir(parents=True, exist_ok=True)
            number = 1 + sum(1 for _ in earlier.glob(f"{task.name}-*"))
            aside = earlier / f"{task.name}-{number}"
            whole.rename(aside)
        return aside


class _Digests:
    """Digests of files and folders; a file whose size and time have not changed is not read again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, list[Any]] = {}
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
            self._known = known if isinstance(known, dict) else {}
        except (OSError, ValueError):
            pass

    def of(self, path: Path, parts: Sequence[str], without: Sequence[Path]) -> str:
        """The digest of a file, or of the names and contents of the files in a folder.

        Args:
            path: the file or folder.
            parts: of the folder only these; all where there are none.
            without: not these.
        """
        if not path.exists():
            raise UserError(f"{path} is not there")
        roots = [path / part for part in parts] if parts else [path]
        files = [file for root in roots for file in ([root] if root.is_file() else sorted(root.rglob("*")))]
        digest = xxhash.xxh3_128()
        for file in files:
            own = [file, *file.parents]
            hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
            if file.is_file() and not hidden and not any(one in own for one in without):
                digest.update(f"{file.relative_to(path)}\n{self._of_file(file)}\n".encode())
        return digest.hexdigest()

    def _of_file(self, file: Path) -> str:
        stat, name = file.stat(), str(file.absolute())
        known = self._known.get(name)
        if known is not None and known[:2] == [stat.st_size, stat.st_mtime_ns]:
            return str(known[2])
        digest = xxhash.xxh3_128()
        with open(file, "rb") as stream:
            while chunk := stream.read(2**24):
                digest.update(chunk)
        self._known[name] = [stat.st_size, stat.st_mtime_ns, digest.hexdigest()]
        write_json(self._path, self._known)
        return digest.hexdigest()
