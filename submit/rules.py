"""Whether a model's data stayed within the competition's rules, by what its ``palmtop.json`` says that it has seen."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from data.sources import is_c4
from sft.sources import HUB


@dataclass(frozen=True)
class Verdict:
    """What can be said of a model's data."""

    track: Literal[1, 2]
    """1 where the weights came from elsewhere and were compressed, 2 where they were trained from scratch."""
    sources: tuple[str, ...]
    """Everything that was read, stage by stage: ``pretrain: c4:en``."""
    outside: tuple[str, ...]
    """Sources that the track does not allow."""
    unknown: tuple[str, ...]
    """Sources of which nobody can tell: folders and files."""

    @property
    def text(self) -> str:
        """The verdict in a few words."""
        if self.outside:
            return f"data outside the rules of track {self.track}: {', '.join(self.outside)}"
        if self.unknown:
            return f"data that nobody can vouch for: {', '.join(self.unknown)}"
        return f"data within the rules of track {self.track}"

    @property
    def within(self) -> bool:
        """Whether every source is known to be allowed."""
        return not self.outside and not self.unknown


def judge(data: Sequence[Mapping[str, Any]]) -> Verdict | None:
    """Judge the ``data`` of a ``palmtop.json``; None where it says nothing.

    Track 1 allows C4 alone for all that is done to another's weights, track 2 C4 and both Alpacas. A file or folder may
    hold anything under any name, so it is neither allowed nor refused; one that ``python -m sft formats`` made says
    what it was made of.
    """
    if not data:
        return None
    track: Literal[1, 2] = 1 if any(one.get("stage") == "unknown" for one in data) else 2
    read = [(str(one.get("stage")), str(part["source"])) for one in data for part in one.get("sources") or ()]
    verdicts = {source: _allowed(stage, source, track) for stage, source in read}
    return Verdict(
        track,
        tuple(dict.fromkeys(f"{stage}: {source}" for stage, source in read)),
        tuple(source for source, allowed in verdicts.items() if allowed is False),
        tuple(source for source, allowed in verdicts.items() if allowed is None),
    )


def _allowed(stage: str, source: str, track: int) -> bool | None:
    """Whether a track allows a source; None where nobody can tell."""
    made_of = re.search(r" \(made of ([^)]*)\)$", source)
    if made_of:
        parts = [_allowed(stage, part, track) for part in made_of[1].split(", ")]
        return None if None in parts else all(parts)
    if is_c4(source):
        return True
    if source in HUB.values():
        return track == 2
    of_hub = stage == "sft" and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w-]*", source)
    return False if of_hub or source in ("sample", "palmtop's sample") else None
