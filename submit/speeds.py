"""How fast a run's model is: on a phone, exported on this machine, and in transformers on this machine."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from submit.ranking import Throughput
from submit.run import Run


@dataclass(frozen=True)
class Speed:
    """Prefill and decoding as one program measured them."""

    where: str
    """The device."""
    engine: str
    """What ran the model, with its threads."""
    prompt: int
    """Tokens of the prompt."""
    prefill: Mapping[str, float]
    """``median``, ``lower`` and ``upper``, tokens a second."""
    decode: Mapping[str, float]
    peak_memory: int | None
    """Bytes at most in use."""
    phone: bool = False

    @property
    def throughput(self) -> Throughput:
        """Decoding, as the leaderboard takes it."""
        return Throughput(self.decode["median"], f"{self.where}, {self.engine}", self.phone)


def speeds(run: Run) -> list[Speed]:
    """Everything that was measured of a run, the phone first. An emulated phone has no speed and is left out."""
    return [*_phone(run), *_bench(run), *_scoring(run)]


def phone_model(run: Run) -> str:
    """The phone that ``phone.json`` is of; empty where there is none or an emulated one."""
    found = run.results("phone.json")
    return "" if not found or found["emulated"] else str(found["device"]["model"])


def _phone(run: Run) -> list[Speed]:
    found = run.results("phone.json")
    if not found or found["emulated"]:
        return []
    engine = f"palmtop {found['dtype']}, {found['threads']} threads"
    return _by_prompt(phone_model(run), engine, found["measurement"], phone=True)


def _bench(run: Run) -> list[Speed]:
    found = run.results("bench.json")
    return [
        speed
        for one in found.get("measurements") or ()
        for speed in _by_prompt(found["processor"], f"{_engine(one['engine'])}, {one['threads']} threads", one)
    ]


def _by_prompt(where: str, engine: str, measurement: Mapping[str, Any], *, phone: bool = False) -> list[Speed]:
    """What export/bench.py calls a measurement, for each length of prompt."""
    peak = measurement["peak_memory"]
    return [
        Speed(where, engine, one["tokens"], one["prefill"], one["decode"], peak, phone)
        for one in measurement["prompts"]
    ]


def _engine(name: str) -> str:
    return "palmtop's library" if name == "ours" else name


def _scoring(run: Run) -> list[Speed]:
    """Of the first score that has them, of the model as it is now: transformers."""
    for score in run.scores:
        found: Any = score.found.get("speed")
        if found and not score.stale:
            engine = f"transformers {found['dtype']}"
            return [
                Speed(
                    found["device"], engine, found["prompt_tokens"], found["prefill"], found["decode"],
                    found["peak_memory"],
                )
            ]  # fmt: skip
    return []
