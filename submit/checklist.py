"""What the competition's starting kit asks for, item by item: ``CHECKLIST.md`` and ``SHA256SUMS`` of a bundle."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from common.files import gigabytes, sha256, write_text

CHECKLIST = "CHECKLIST.md"
SUMS = "SHA256SUMS"


@dataclass(frozen=True)
class Item:
    """One thing that is asked for."""

    what: str
    """In the kit's words."""
    path: str | None = None
    """File or folder in the bundle; None where it is missing or does not apply."""
    note: str = ""
    """Where it comes from, or what is to be known of it."""
    command: str | None = None
    """What makes it, where it is missing."""
    applies: bool = True

    @property
    def there(self) -> bool:
        """Whether the bundle has it."""
        return self.path is not None


def write_checklist(out: Path, title: str, items: Sequence[Item], notes: Sequence[str]) -> None:
    """Write the checksums of everything, and the checklist with those of each item.

    Args:
        out: the bundle.
        title: of the checklist.
        items: what is asked for.
        notes: what whoever reads it must know.
    """
    sums = checksums(out)
    write_text(out / SUMS, "".join(f"{digest}  {name}\n" for name, digest in sums.items()))
    lines = [f"# {title}", "", *(f"- {note}" for note in notes), ""]
    lines += ["| asked for | here | size | SHA-256 | |", "| --- | --- | --- | --- | --- |"]
    missing = []
    for item in items:
        if item.path is not None:
            files = _of(sums, item.path)
            size = sum((out / name).stat().st_size for name in files)
            several = f", {len(files)} files" if (out / item.path).is_dir() else ""
            place = f"`{item.path}`"
            lines.append(f"| {item.what} | {place} | {gigabytes(size)}{several} | `{_digest(files)}` | {item.note} |")
        elif item.applies:
            missing.append(item)
            lines.append(f"| {item.what} | **missing** | | | {item.note} |")
        else:
            lines.append(f"| {item.what} | not applicable | | | {item.note} |")
    if missing:
        lines += ["", "## What is missing, and what makes it"]
        for item in missing:
            lines += ["", f"{item.what}:", "", "```bash", item.command or "", "```"]
    lines += [
        "",
        f"`{SUMS}` has the SHA-256 of every file: `sha256sum --check {SUMS}`. The one of a folder is that of its lines",
        f"there: `grep '  FOLDER/' {SUMS} | sha256sum`.",
    ]
    write_text(out / CHECKLIST, "\n".join(lines) + "\n")


def checksums(out: Path) -> dict[str, str]:
    """The SHA-256 of every file of a bundle by its name, but for the checklist and the sums themselves."""
    files = sorted(file for file in out.rglob("*") if file.is_file())
    names = {file.relative_to(out).as_posix(): file for file in files}
    return {name: sha256(file) for name, file in names.items() if name not in (CHECKLIST, SUMS)}


def check_sums(out: Path) -> int:
    """Compare a bundle with its own sums; returns how many files they name.

    Raises:
        UserError: a file is missing, changed, or not named.
    """
    lines = (out / SUMS).read_text(encoding="utf-8").splitlines()
    wanted = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    found = checksums(out)
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            how = "is not there" if name not in found else "is not in it" if name not in wanted else "has changed"
            raise UserError(f"{out / SUMS}: {name} {how}")
    return len(wanted)


def _of(sums: dict[str, str], path: str) -> dict[str, str]:
    """The sums of a file, or of the files in a folder."""
    return {name: digest for name, digest in sums.items() if name == path or name.startswith(f"{path}/")}


def _digest(files: dict[str, str]) -> str:
    """Of one file its own, of several that of their lines in the sums."""
    if len(files) == 1:
        return next(iter(files.values()))
    return hashlib.sha256("".join(f"{digest}  {name}\n" for name, digest in files.items()).encode()).hexdigest()
