"""The offline corpus: English that every machine with Python has, its own documentation.

The docstrings of the standard library and of a few installed packages are read from the source files
(nothing is imported) and written once to a cache, in C4's layout. It is real prose about programs:
good for trying the whole path, not for a model that is to be used.
"""

import ast
import gzip
import hashlib
import json
import sys
import sysconfig
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from common.errors import UserError
from common.files import cache_folder, new_folder, turn

PACKAGES = ("numpy", "pandas", "datasets", "tokenizers", "lightning", "rich")
"""Installed packages whose documentation is read beside the standard library's."""

SHARDS = 4
SHORTEST = 200
"""Characters below which a docstring is no document."""


def sample_folder() -> Path:
    """The folder of the sample corpus, written on first use.

    Its name holds the versions it was made from: another Python or package gives another corpus.
    """
    versions = [sys.version.split()[0], *(f"{name} {_version(name)}" for name in PACKAGES)]
    digest = hashlib.blake2b("\n".join(versions).encode(), digest_size=6).hexdigest()
    folder = cache_folder() / f"sample-{digest}"
    with turn(folder):
        if not folder.exists():
            _write(folder)
    return folder / "en"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


def _write(folder: Path) -> None:
    files = list(_source_files())
    print(
        f"writing the sample corpus from the documentation in {len(files):,} Python files to {folder}", file=sys.stderr
    )
    seen: set[str] = set()
    documents: list[tuple[bytes, str, str]] = []
    for name, path in files:
        for text in _docstrings(path):
            key = hashlib.blake2b(text.encode(), digest_size=8).digest()
            if text not in seen:
                seen.add(text)
                documents.append((key, name, text))
    documents.sort()  # by hash: shuffled, and the same on every machine
    if len(documents) < 1000:
        raise UserError(
            f"the installed Python carries too little documentation for a sample ({len(documents)} docstrings)"
        )
    held = max(1, len(documents) // 100)
    with new_folder(folder) as temporary:
        (temporary / "en").mkdir()
        _write_shard(temporary / "en" / "c4-validation.00000-of-00001.json.gz", documents[:held])
        for shard in range(SHARDS):
            path = temporary / "en" / f"c4-train.{shard:05d}-of-{SHARDS:05d}.json.gz"
            _write_shard(path, documents[held + shard :: SHARDS])


def _write_shard(path: Path, documents: list[tuple[bytes, str, str]]) -> None:
    with gzip.open(path, "wt", encoding="utf-8", compresslevel=6) as file:
        for _, name, text in documents:
            file.write(json.dumps({"text": text, "timestamp": "", "url": name}, ensure_ascii=False) + "\n")


def _source_files() -> Iterator[tuple[str, Path]]:
    """Module-like names and paths of the files to read, in a fixed order."""
    standard = Path(sysconfig.get_path("stdlib"))
    installed = Path(sysconfig.get_path("purelib"))
    roots = [(standard, standard), *((installed, installed / name) for name in PACKAGES)]
    for base, root in roots:
        for path in sorted(root.rglob("*.py")):
            place = path.relative_to(base)
            if not {"site-packages", "test", "tests", "idlelib", "lib2to3"} & set(place.parts):
                yield place.as_posix(), path


def _docstrings(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return  # templates and files for other versions
    nodes: list[ast.AST] = [tree]
    while nodes:  # definitions within definitions; the statements of functions are not looked into
        node = nodes.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and len(text) >= SHORTEST:
                yield text
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                nodes += node.body
