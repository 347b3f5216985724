"""How root becomes a user that owns nothing, before it starts a box.

The limit on processes does not bind root, and a box that root makes keeps capabilities over the host or, in a
user namespace, the files that root owns.
"""

import os
import pwd
import secrets
import stat
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from common.errors import UserError
from scoring.sandbox import libc

LOWEST, HIGHEST = 100_000, 2**31 - 2

_CLONE_NEWNS = 0x20000
_MS_BIND, _MS_REC, _MS_PRIVATE = 0x1000, 0x4000, 0x40000


def become_unused_user(needed: Sequence[str]) -> None:
    """Give up root for good, with ``needed`` folders still within reach.

    A UserError says what stands in the way.
    """
    uid = unused_uid()
    show(needed)
    try:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    except OSError as error:
        raise UserError(f"root may not become user {uid} here ({error.strerror}); start as an ordinary user") from error


def unused_uid() -> int:
    """A uid of at least 100,000 that this system knows and that nobody has; also free as a gid, in practice."""
    known = [tuple(map(int, line.split())) for line in Path("/proc/self/uid_map").read_text().splitlines()]
    ranges = [range(max(first, LOWEST), min(first + count, HIGHEST)) for first, _, count in known]
    widest = max(ranges, key=len)
    if not widest:
        raise UserError("root of this container may not become another user; start as an ordinary user")
    while True:
        uid = secrets.choice(widest)
        if uid not in _owners_of_processes():
            try:
                pwd.getpwuid(uid)
            except KeyError:
                return uid


def _owners_of_processes() -> set[int]:
    owners = set()
    for name in os.listdir("/proc"):
        with suppress(OSError):
            owners.add(os.stat(f"/proc/{name}").st_uid)
    return owners


def show(needed: Sequence[str]) -> None:
    """Let other users reach folders that lie in a private one (an interpreter in root's home), for this process only.

    The process gets mounts of its own. There the private folder is covered by an empty one in which the needed
    folders are at the same place as before.
    """
    hidden = {folder: top for folder in needed if (top := _private_ancestor(folder))}
    if not hidden:
        return
    _call("unshare", _CLONE_NEWNS)
    _mount("none", "/", _MS_REC | _MS_PRIVATE)
    folders = {folder: os.open(folder, os.O_PATH) for folder in hidden}  # they stay within reach when covered
    for top in sorted(set(hidden.values())):
        _mount("tmpfs", top, 0)
    for folder, descriptor in folders.items():
        os.makedirs(folder, exist_ok=True)
        _mount(f"/proc/self/fd/{descriptor}", folder, _MS_BIND | _MS_REC)
        os.close(descriptor)


def _private_ancestor(folder: str) -> str | None:
    """The highest folder on the way to ``folder`` that others may not go through."""
    for ancestor in reversed(Path(folder).parents):
        if not ancestor.stat().st_mode & stat.S_IXOTH:
            return str(ancestor)
    return None


def _mount(source: str, target: str, flags: int) -> None:
    kind, options = (b"tmpfs", b"mode=755") if source == "tmpfs" else (None, None)
    _call("mount", source.encode(), os.fsencode(target), kind, flags, options)


def _call(name: str, *arguments: int | bytes | None) -> None:
    try:
        libc.call(name, *arguments)
    except OSError as error:
        raise UserError(
            f"root may not change its mounts here ({name}: {error.strerror}), and the interpreter lies in a folder "
            "that other users may not enter; use the system's Python, or start as an ordinary user"
        ) from error
