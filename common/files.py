"""Files that are either whole or absent, even when the program is killed while it writes them."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from common.errors import UserError


def write_text(path: Path, text: str) -> None:
    """Replace ``path`` by ``text`` in one step (temporary file, fsync, rename)."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with readable_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """Like :func:`write_text`, as indented JSON with a final newline."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Fill a temporary folder that becomes ``path`` when the block ends without an exception.

    An existing folder at ``path`` is replaced; it stays untouched when the block fails. The
    temporary folder is a hidden sibling, so what a killed process left is never mistaken for the
    real one, and is removed by the next attempt. UserError where ``path`` is a file.
    """
    path = path.absolute()  # ``.`` has no name
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file; give the name of a folder")
    temporary = path.with_name(f".{path.name}.tmp")
    replaced = path.with_name(f".{path.name}.old")
    with readable_disk_errors(path):
        if replaced.exists() and not path.exists():  # killed between the two renames of replace_folder
            replaced.rename(path)
        empty_folder(temporary)
    try:
        with readable_disk_errors(path):
            yield temporary
            sync_tree(temporary)
            replace_folder(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def empty_folder(path: Path) -> None:
    """Make ``path`` an empty folder, whatever was there."""
    with readable_disk_errors(path):
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)


def replace_folder(temporary: Path, path: Path) -> None:
    """Give a folder, flushed to the disk, its name; one that has the name already is replaced."""
    replaced = path.with_name(f".{path.name}.old")
    sync(temporary)
    shutil.rmtree(replaced, ignore_errors=True)
    if path.exists():
        path.rename(replaced)
    temporary.rename(path)
    sync(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove what killed processes left of :func:`new_folder` and :func:`write_text` in ``folder``."""
    for leftover in folder.glob(".*"):
        name, _, ending = leftover.name[1:].rpartition(".")
        if ending == "old" and not (folder / name).exists():
            leftover.rename(folder / name)  # killed between the two renames
        elif ending in ("old", "removed") or (ending == "tmp" and leftover.is_dir()):
            shutil.rmtree(leftover, ignore_errors=True)
        elif ending == "tmp":
            leftover.unlink(missing_ok=True)


@contextmanager
def exclusive(folder: Path, what: str, *, keep: bool = False) -> Iterator[None]:
    """Make ``folder`` and be the only process in this block for it; UserError names ``what`` when another is.

    Folders that are made here go again when the block fails with nothing in them; ``keep`` leaves them, for what a
    user may put there by hand.
    """
    made = [] if keep else [one for one in (folder, *folder.parents) if not one.exists()]
    with readable_disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w", encoding="utf-8")  # noqa: SIM115  (closed below)
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{what} is in use by another process; wait for it or choose another folder") from error
        except OSError:
            pass  # a file system without locks
        try:
            yield
        except BaseException:
            with suppress(OSError):  # there is something in them, or the block has removed them
                if made and os.listdir(folder) == [".lock"]:
                    (folder / ".lock").unlink()
                for one in made:
                    one.rmdir()
            raise


@contextmanager
def turn(path: Path) -> Iterator[None]:
    """Wait until no other process is in this block for ``path``, a folder of a cache that the first one fills."""
    with readable_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open(path.with_name(f".{path.name}.lock"), "w", encoding="utf-8")  # noqa: SIM115  (closed below)
    with lock:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_tree(folder: Path) -> None:
    """Flush every file and folder below ``folder`` to the disk."""
    for root, _, names in os.walk(folder):
        for name in names:
            sync(Path(root) / name)
        sync(Path(root))


def sync(path: Path) -> None:
    """Flush one file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cache_folder() -> Path:
    """Where downloads and the sample corpus are kept: ``$PALMTOP_CACHE``, else ``~/.cache/palmtop``."""
    return Path(os.environ.get("PALMTOP_CACHE") or Path.home() / ".cache" / "palmtop")


def require_space(folder: Path, needed: int, purpose: str) -> None:
    """Raise a UserError when the disk under ``folder`` has less than ``needed`` bytes free."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"no room on the disk of {folder}: {purpose} needs {gigabytes(needed)}, "
            f"{gigabytes(free)} are free. Free some space or choose a folder on another disk."
        )


@contextmanager
def readable_disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk, a quota or a missing permission into a UserError that names ``path``."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.EISDIR:
            raise UserError(f"{path} is a folder; give the name of a file") from error
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"the disk is full while writing {path}; free some space and run again") from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.EIO):
            raise UserError(f"{path} cannot be written: {error.strerror}") from error
        raise


def gigabytes(count: float) -> str:
    """A number of bytes for people: ``1.5 GB``, ``12 MB``."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"
