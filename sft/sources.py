"""Where conversations come from: Alpaca, Chinese Alpaca, files of their shape, chat messages.

Rows in the fields that occur in the wild become :class:`data.chat.Conversation`; what cannot be learned from
(an empty answer, a copy, a row that is no conversation) is left out and counted.
"""

import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import xxhash

from common.errors import UserError
from data.chat import Conversation
from data.settings import Mix

HUB = {"alpaca": "tatsu-lab/alpaca", "alpaca_zh": "silk-road/alpaca-data-gpt4-chinese"}
"""Names that ``--data`` knows, and their repositories on the hub."""

FIELDS = {
    "instruction": ("instruction_zh", "zh_instruction", "instruction"),
    "input": ("input_zh", "zh_input", "input"),
    "output": ("output_zh", "zh_output", "output"),
}
"""What a row says, and the fields that say it, the first that is there: Chinese sets often carry the English too."""

NO_INPUT = re.compile(r"""[\s"'“”‘’.。_-]*|\W*(no ?input|n/a|不适用|无输入)\W*""", re.IGNORECASE)
"""What stands in an input that is none; Alpaca has some 500 of these."""

_BROKEN = re.compile(r"[\ud800-\udfff]")
"""Half of a surrogate pair, which some JSON files have: it is no character and has no UTF-8."""

HELD_OUT = 40
"""One conversation in so many is held out."""


@dataclass(frozen=True)
class Source:
    """The conversations of one part of the mix."""

    name: str
    """As it stands in ``--data``."""
    origin: str
    """Where it was read from, for the record."""
    weight: float
    """Its share of the conversations that are trained on."""
    train: list[Conversation]
    held_out: list[Conversation]
    dropped: Counter[str] = field(default_factory=Counter)
    """Reason to number of rows left out."""


Filter = Callable[[Sequence[Conversation]], Sequence[str | None]]
"""Conversations to the reason why each is left out, or None."""


def open_sources(mix: Mix, filters: Sequence[Filter] = ()) -> list[Source]:
    """Read every source of a mix; copies of a conversation stay in the first source that has it.

    Args:
        mix: names of :data:`HUB`, ``sample``, files (JSON or JSON lines, also gzipped) or ``ORG/NAME`` on the hub.
        filters: what else leaves conversations out, in order.

    Raises:
        UserError: a source is not there, cannot be read or holds nothing to train on.
    """
    seen: set[bytes] = set()
    return [_source(name, weight, seen, filters) for name, weight in mix.parts]


def _source(name: str, weight: float, seen: set[bytes], filters: Sequence[Filter]) -> Source:
    rows, origin = _rows(name)
    dropped: Counter[str] = Counter()
    kept: list[Conversation] = []
    for row in rows:
        found = conversation_of(row)
        if isinstance(found, str):
            dropped[found] += 1
            continue
        key = _digest(json.dumps(found.turns, ensure_ascii=False))
        if key in seen:
            dropped["duplicate"] += 1
            continue
        seen.add(key)
        kept.append(found)
    for filtered in filters:
        reasons = filtered(kept)
        dropped.update(reason for reason in reasons if reason is not None)
        kept = [one for one, reason in zip(kept, reasons, strict=True) if reason is None]
    if not kept:
        why = ", ".join(f"{count:,} {reason}" for reason, count in dropped.most_common()) or "it is empty"
        fields = ", ".join(rows[0]) if rows and isinstance(rows[0], dict) else "none"
        raise UserError(
            f"{name} holds nothing to train on: {why}. A row needs instruction, input and output, or messages; "
            f"the first one's fields are {fields}"
        )
    held = [is_held_out(one) for one in kept]
    return Source(
        name,
        origin,
        weight,
        [one for one, out in zip(kept, held, strict=True) if not out],
        [one for one, out in zip(kept, held, strict=True) if out],
        dropped,
    )


def is_held_out(conversation: Conversation) -> bool:
    """Whether a conversation is kept for validation, whatever it is mixed with.

    Decided by a hash of all but the answers, so that one question with several answers falls on one side.
    """
    asked = [turn for turn in conversation.turns if turn[0] != "assistant"]
    return int.from_bytes(_digest(json.dumps(asked, ensure_ascii=False)), "big") % HELD_OUT == 0


def _digest(text: str) -> bytes:
    return xxhash.xxh3_64(text.encode(errors="surrogatepass")).digest()


def conversation_of(row: Any) -> Conversation | str:
    """A row as a conversation, or why it is none.

    ``messages`` (role, content) are taken as they are, up to the assistant's last turn. Else the instruction, and
    under it, after an empty line, the input if there is one, is the user's turn, and the output the assistant's.
    """
    if not isinstance(row, dict):
        return "no conversation"
    if "messages" in row:
        return _of_messages(row["messages"])
    instruction, given, output = (_first(row, names) for names in FIELDS.values())
    if not isinstance(instruction, str) or not isinstance(output, str) or not isinstance(given or "", str):
        return "no conversation"
    if _BROKEN.search(instruction + output + (given or "")):
        return "broken characters"
    if not output.strip():
        return "empty answer"
    if not instruction.strip():
        return "empty question"
    given = given or ""
    asked = instruction.strip() if NO_INPUT.fullmatch(given) else f"{instruction.strip()}\n\n{given.strip()}"
    return Conversation((("user", asked), ("assistant", output.strip())))


def _first(row: dict[str, Any], names: tuple[str, ...]) -> Any:
    return next((row[name] for name in names if name in row), None)


def _of_messages(messages: Any) -> Conversation | str:
    turns: list[tuple[str, str]] = []
    for message in messages if isinstance(messages, list) else [None]:
        role = message.get("role") if isinstance(message, dict) else None
        text = message.get("content") if isinstance(message, dict) else None
        if role not in ("system", "user", "assistant") or not isinstance(text, str):
            return "no conversation"
        if _BROKEN.search(text):
            return "broken characters"
        if role == "system" and turns:
            return "no conversation"
        turns.append((role, text.strip()))
    while turns and turns[-1][0] != "assistant":
        turns.pop()  # nothing is learned from a question without an answer
    if not turns:
        return "empty answer"
    if next((role for role, _ in turns if role != "system"), None) != "user":
        return "empty question"  # it begins with an answer
    if not all(text for _, text in turns):
        return "empty answer" if any(not text for role, text in turns if role == "assistant") else "empty question"
    return Conversation(tuple(turns))


def _rows(name: str) -> tuple[list[Any], str]:
    """The rows of a source, and where they were read from."""
    if Path(name).expanduser().is_file():
        rows = _read(Path(name).expanduser())
        return rows, name + _derived_from(rows)
    if Path(name).expanduser().is_dir():
        raise UserError(f"{name} is a folder; give a JSON or JSON lines file in it")
    if name == "sample":
        return _read(Path(__file__).with_name("sample.json")), "palmtop's sample"
    if name in HUB:
        return _from_hub(HUB[name]), HUB[name]
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) and not Path(name).suffix:
        return _from_hub(name), name
    raise UserError(
        f"{name} is no file, and none of {', '.join([*HUB, 'sample'])}; give a JSON or JSON lines file, or ORG/NAME "
        "of a data set on the hub"
    )


def _derived_from(rows: list[Any]) -> str:
    """What the rows say that they were made of, as those of ``python -m sft formats`` do."""
    made_of = {origin for row in rows if isinstance(row, dict) for origin in row.get("derived_from") or ()}
    return f" (made of {', '.join(sorted(made_of))})" if made_of else ""


def _read(path: Path) -> list[Any]:
    """The rows of a JSON list or of JSON lines, gzipped or not."""
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    try:
        if text.lstrip().startswith("["):
            return cast(list[Any], json.loads(text))
    except ValueError as error:
        raise UserError(f"{path} is no valid JSON: {error}") from error
    rows = []
    for number, line in enumerate(text.split("\n"), 1):  # nothing else ends a line of JSON
        try:
            if line.strip():
                rows.append(json.loads(line))
        except ValueError as error:
            raise UserError(f"line {number} of {path} is no valid JSON: {error}") from error
    return rows


def _from_hub(repo: str) -> list[Any]:
    """The training rows of a data set on the hub, kept in datasets' cache."""
    import datasets

    try:
        found = datasets.load_dataset(repo, split="train")
    except Exception as error:  # of many kinds: no network, no such set, no such split, rate limits
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"{repo} cannot be had from the hub: {first}. Without a network give files in its place: "
            "--data alpaca_data.json.gz=1,alpaca_zh.json=1"
        ) from error
    return list(found)
