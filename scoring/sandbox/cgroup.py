"""A control group for a runner and the box it watches, where this process may make one.

It is a child of the group that this process is in, so whatever bounds the process bounds the box too.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

MEMORY_BYTES = 5 << 28
"""1.25 GiB: the address space of one process, what it may keep in /tmp and /dev/shm, and bubblewrap."""

PROCESSES = 16
"""The runner and bubblewrap have three; the limit inside the box is lower and counts what the program starts alone."""

_VERSION_1 = {"memory": {"memory.limit_in_bytes": MEMORY_BYTES}, "pids": {"pids.max": PROCESSES}}
_VERSION_2 = {"memory.max": MEMORY_BYTES, "memory.swap.max": 0, "pids.max": PROCESSES}

_NAME = "palmtop-sandbox"


@contextmanager
def groups(number: int) -> Iterator[list[str]]:
    """Make the groups of box ``number`` and remove them afterwards; the ``cgroup.procs`` to enter them by.

    None are made without permission, and under version 2 none where memory and pids are not handed down to children.
    """
    made = []
    for parent, limits in _parents():
        _sweep(parent)
        folder = parent / f"{_NAME}-{os.getpid()}-{number}"
        try:
            folder.mkdir()
            for name, value in limits.items():
                (folder / name).write_text(str(value))
            made.append(folder)
        except OSError:
            _remove(folder)
    try:
        yield [str(folder / "cgroup.procs") for folder in made]
    finally:
        for folder in made:
            _remove(folder)


def _parents() -> Iterator[tuple[Path, dict[str, int]]]:
    """The groups of this process that limit memory or processes, and the limits to set in a child."""
    try:
        memberships = Path("/proc/self/cgroup").read_text().splitlines()
        mounts = [line.split(" - ") for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    except OSError:
        return
    for membership in memberships:
        hierarchy, controllers, group = membership.split(":", 2)
        unified = hierarchy == "0" and not controllers
        for place, what in mounts:
            kind, _, options = what.split(" ")[:3]
            if kind != ("cgroup2" if unified else "cgroup"):
                continue
            root, mountpoint = place.split(" ")[3:5]
            if not Path(group).is_relative_to(root):  # the mount shows another part of the tree
                continue
            parent = Path(mountpoint) / Path(group).relative_to(root)
            if unified:
                yield parent, _VERSION_2
            for controller in set(controllers.split(",")) & set(options.split(",")) & set(_VERSION_1):
                yield parent, _VERSION_1[controller]


def _sweep(parent: Path) -> None:
    """Remove what killed processes left."""
    with suppress(OSError):
        for folder in parent.glob(f"{_NAME}-*-*"):
            if not Path("/proc", folder.name.split("-")[2]).exists():
                _remove(folder)


def _remove(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()
