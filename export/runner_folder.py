"""What runs a library on a phone, without Android's own build tools: our runner, TVM's runtime and a C library.

Android's loader knows nothing of glibc, so a loader of glibc's own comes along and starts the runner:
``./ld-linux-aarch64.so.1 --library-path . ./runner``. Works from /data/local/tmp, where adb's shell may run programs.
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from common.errors import UserError
from common.files import cache_folder, new_folder

START = "./ld-linux-aarch64.so.1 --library-path . ./runner"
"""Starts the runner, in its folder."""

COMPILER = "aarch64-linux-gnu-g++"
"""Debian's g++-aarch64-linux-gnu; its C library is the one that comes along."""

SOURCE = Path(__file__).parent / "runner" / "runner.cc"

WHEELS = {
    "apache-tvm==0.27.0.post1": "4acfdb7653e4e1ba7a707bdf2833db72eb8fda7d04d99141f2a4e1da43171fb7",
    "apache-tvm-ffi==0.1.15.post2": "13efa12e3b81add67e40a2b5453203421af55827bd9cecc1fac56efd6e614282",
}
"""PyPI's wheels for aarch64 and their sha256, of the version that compiles the libraries."""

RUNTIME = ("tvm/lib/libtvm_runtime.so", "tvm_ffi/lib/libtvm_ffi.so")
"""What is taken from the wheels, besides headers."""

SYSTEM = """
ld-linux-aarch64.so.1 libc.so.6 libm.so.6 libdl.so.2 libpthread.so.0 libstdc++.so.6 libgcc_s.so.1
""".split()
"""What the runtime needs of a Linux system."""


def runner_folder() -> Path:
    """A folder with all but the libraries and weights of a model: 11 MB. Made once, then taken from the cache.

    Raises:
        UserError: no compiler for aarch64, or the wheels cannot be had.
    """
    compiler = shutil.which(COMPILER)
    if compiler is None:
        raise UserError(f"{COMPILER} is needed to build the phone's runner (Debian: apt install g++-aarch64-linux-gnu)")
    folder = cache_folder() / "runner" / _key(compiler)
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with new_folder(folder) as temporary, tempfile.TemporaryDirectory() as wheels:
            _fetch(Path(wheels))
            _compile(compiler, Path(wheels), temporary / "runner")
            for name in RUNTIME:
                shutil.copy(Path(wheels, name), temporary)
            for name in SYSTEM:
                shutil.copy(_system_file(compiler, name), temporary)
    return folder


def _key(compiler: str) -> str:
    """A name for all that decides what is in the folder."""
    version = _output([compiler, "--version"], "the compiler does not run")
    content = [SOURCE.read_text(encoding="utf-8"), Path(__file__).read_text(encoding="utf-8"), version]
    return hashlib.sha256("\0".join(content).encode()).hexdigest()[:16]


def _fetch(folder: Path) -> None:
    """Download the wheels and unpack headers and runtime into ``folder``."""
    pins = folder / "requirements.txt"
    pins.write_text("".join(f"{name} --hash=sha256:{digest}\n" for name, digest in WHEELS.items()), encoding="utf-8")
    # The tags are those of the pinned files, whatever Python runs here: only C++ is taken out of them.
    tags = "--platform manylinux_2_28_aarch64 --python-version 3.11 --implementation cp --abi cp311 --abi none".split()
    words = ["download", "--quiet", "--no-deps", "--only-binary=:all:", "--require-hashes", *tags]
    pip = [sys.executable, "-m", "pip", *words, "--dest", str(folder), "-r", str(pins)]
    _output(pip, f"the runtime for phones ({', '.join(WHEELS)}, for aarch64) cannot be downloaded")
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name in RUNTIME or name.startswith("tvm_ffi/include/")]
            archive.extractall(folder, names)


def _compile(compiler: str, wheels: Path, out: Path) -> None:
    libraries = [str(wheels / name) for name in RUNTIME]
    # TVM's functions are found by name at run time: without --no-as-needed the linker would leave its library out.
    words = ["-std=c++17", "-O2", "-s", "-I", str(wheels / "tvm_ffi" / "include"), "-Wl,--no-as-needed", *libraries]
    _output([compiler, str(SOURCE), *words, "-o", str(out)], "the phone's runner does not compile")


def _system_file(compiler: str, name: str) -> Path:
    """Where the compiler's system has a library."""
    found = Path(_output([compiler, f"-print-file-name={name}"], f"{name} is not found").strip())
    if not found.is_absolute():
        raise UserError(f"{COMPILER} has no {name} (Debian: apt install libc6-arm64-cross libstdc++6-arm64-cross)")
    return found


def _output(command: list[str], otherwise: str) -> str:
    """What a program prints; a UserError that begins with ``otherwise`` where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{otherwise}: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout
