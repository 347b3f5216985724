"""The answers of a run in a file that grows by one line with each, so that a killed run goes on where it was.

``NAME.jsonl`` holds lines of ``{"task", "row", "output"}``, which ``python -m scoring rescore`` takes as they are;
``NAME.plan.json`` beside it says what was asked of which model, and in which batches.
"""

import fcntl
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import xxhash

from common.errors import UserError
from common.files import readable_disk_errors, write_json
from scoring.batches import Plan, from_json, to_json
from scoring.requests import Key, Request


class Answers:
    """The answers so far, and the place for those to come. Use it as a context.

    Args:
        path: ``NAME.jsonl``; made where there is none.
        asked: all but the prompts that decides the answers, as plain JSON values.

    Raises:
        UserError: another process is writing the file, it is damaged, or it answers something else.
    """

    def __init__(self, path: Path, asked: dict[str, Any]) -> None:
        self.path, self._asked = path, asked
        self._header = path.with_suffix(".plan.json")
        self.outputs: dict[Key, str] = {}
        """The answers, by task and row."""
        with readable_disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: IO[bytes] = open(path, "a+b")  # noqa: SIM115  (closed by close)
        try:
            self._lock()
            self._begun = self._read_header()
            self._read()
        except BaseException:
            self.close()
            raise

    def begin(self, requests: Sequence[Request], make: Callable[[], Plan]) -> Plan:
        """The batches that these requests were begun in, or at first those of ``make``, which are kept.

        Raises:
            UserError: the answers are to other prompts.
        """
        prompts = _digest(requests)
        if self._begun is None:
            self._begun = {"asked": self._asked, "prompts": prompts, "plan": to_json(make())}
            write_json(self._header, self._begun)
        if self._begun["prompts"] != prompts or not self.outputs.keys() <= {request.key for request in requests}:
            raise self._other("other prompts: the tasks, rows, data or demonstrations differ")
        return from_json(self._begun["plan"])

    def keep(self, request: Request, output: str) -> None:
        """Write an answer down; once this returns, a killed program does not lose it."""
        line = {"task": request.task, "row": request.row, "output": output}
        with readable_disk_errors(self.path):
            # Lone surrogates, which some tokenizers decode broken bytes to, are no UTF-8: ASCII holds all.
            self._file.write(json.dumps(line).encode("ascii") + b"\n")
            self._file.flush()
        self.outputs[request.key] = output

    def close(self) -> None:
        """Let others have the file."""
        self._file.close()

    def __enter__(self) -> "Answers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{self.path} is being written by another process; wait for it") from error
        except OSError:
            pass  # a file system without locks

    def _read_header(self) -> dict[str, Any] | None:
        if not self._header.exists():
            return None
        try:
            header: dict[str, Any] = json.loads(self._header.read_text(encoding="utf-8"))
            asked, _ = dict(header["asked"]), (header["prompts"], from_json(header["plan"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self._header} is damaged ({type(error).__name__}: {error}); remove it and {self.path} to begin anew"
            ) from error
        names = [name for name in {**asked, **self._asked} if asked.get(name) != self._asked.get(name)]
        if names:
            raise self._other("; ".join(f"{name} {asked.get(name)!r}, now {self._asked.get(name)!r}" for name in names))
        return header

    def _read(self) -> None:
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):  # the program was killed while it wrote the last line
            self._file.truncate(whole)
            self._file.seek(0, os.SEEK_END)
        for number, line in enumerate(content[:whole].splitlines(), 1):
            key, output = self._parse(number, line)
            if key in self.outputs:
                raise self._damaged(number, f"there is another answer to row {key[1]} of {key[0]}")
            self.outputs[key] = output
        if self.outputs and self._begun is None:
            raise UserError(f"{self.path} has lost its {self._header.name}; remove it to begin anew")

    def _parse(self, number: int, line: bytes) -> tuple[Key, str]:
        try:
            value = json.loads(line)
            task, row, output = value["task"], value["row"], value["output"]
        except (ValueError, KeyError, TypeError) as error:
            raise self._damaged(number, f"{type(error).__name__}: {error}") from error
        if not (isinstance(task, str) and isinstance(row, int) and isinstance(output, str)):
            raise self._damaged(number, "task, row or output is of another type")
        return (task, row), output

    def _damaged(self, number: int, what: str) -> UserError:
        return UserError(
            f"line {number} of {self.path} is damaged ({what}). Remove that line to have it answered again, or the "
            "file to begin anew; nothing was changed"
        )

    def _other(self, what: str) -> UserError:
        return UserError(
            f"{self.path} holds answers to something else ({what}). Ask the same, choose another folder, or remove it "
            f"and {self._header.name} to begin anew"
        )


def _digest(requests: Sequence[Request]) -> str:
    """A hash of everything that is asked, in whatever order."""
    asked = sorted((request.task, request.row, request.prompt, request.max_new_tokens) for request in requests)
    return xxhash.xxh3_128_hexdigest(json.dumps(asked).encode())
