"""What ``python -m export bench`` does: prefill and decoding on this machine, ours beside transformers."""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.console import Console
from common.errors import UserError
from common.files import gigabytes, write_json
from common.run_folder import processor
from common.settings import to_dict
from export.settings import BenchCommand, ProtocolSettings
from models.hf_config import read_values

FILE = "bench.json"
"""In the exported folder: what was measured."""

ROOT = Path(__file__).parents[1]

TORCH = {"torch fp32": "float32", "torch fp16": "float16", "torch bf16": "bfloat16"}
"""Transformers, as it is compared with."""


@dataclass(frozen=True)
class Spread:
    """Repeated measurements of one quantity."""

    median: float
    lower: float
    """A quarter of the measurements are below."""
    upper: float
    """A quarter of the measurements are above."""

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """The median and quartiles; of one value, three times that."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, lower, upper)

    def __str__(self) -> str:
        return f"{self.median:.1f} ({self.lower:.1f}-{self.upper:.1f})"


@dataclass(frozen=True)
class Prompt:
    """One length of prompt."""

    tokens: int
    prefill: Spread
    """Tokens a second."""
    decode: Spread
    """Tokens a second after this prompt."""
    first_token: Spread
    """Seconds until the first new token is known."""


@dataclass(frozen=True)
class Measurement:
    """One engine with one number of threads."""

    engine: str
    threads: int
    prompts: tuple[Prompt, ...]
    peak_memory: int
    """Bytes resident in the process at most."""
    bandwidth_share: float | None
    """Of the measured read bandwidth, what decoding after the first prompt reads of weights; None but for ours."""


def bench_command(command: BenchCommand) -> None:
    """Measure an exported folder, print a table, and write ``bench.json`` into it."""
    assert command.folder is not None
    folder, console = Path(command.folder), Console()
    exported = read_export(folder)
    console.settings("bench", to_dict(command))
    found = []
    for threads in command.threads:
        bandwidth = ask("bandwidth", folder, threads)
        console.say(f"{threads} threads: memory is read at {gigabytes(bandwidth)}/s")
        engines: list[tuple[str, dict[str, Any]]] = [("ours", {"engine": "library"})]
        if command.torch:
            context = {"compiled": False, "context": exported["context"]}
            engines += [(name, {"engine": "torch", "dtype": dtype} | context) for name, dtype in TORCH.items()]
        for name, request in engines:
            console.say(f"measuring {name}")
            answer = ask(request.pop("engine"), folder, threads, protocol(command) | request)
            read = read_by_decoding(folder, exported["dtype"]) if name == "ours" else None
            found.append(measurement(name, threads, answer, bandwidth, read))
            console.say(line(found[-1]))
    machine = f"{processor()}, {os.cpu_count()} cores"
    record = {"settings": to_dict(command), "processor": machine, "measurements": [asdict(one) for one in found]}
    write_json(folder / FILE, record)
    console.say(f"\nbench: {folder / FILE}\nnext: python -m export phone {folder}")


def read_export(folder: Path) -> dict[str, Any]:
    """The ``export.json`` of a folder; UserError where it is none with a host library."""
    try:
        exported = json.loads((folder / "export.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder} is no exported folder: its export.json cannot be read; python -m export MODEL makes one"
        ) from error
    if not list((folder / "lib").glob("host-*.so")):
        raise UserError(f"{folder} holds no library for this machine; export the model again with --target host")
    return dict(exported)


def protocol(settings: ProtocolSettings) -> dict[str, Any]:
    """The part of a request that says what is timed."""
    names = ("prompts", "new_tokens", "repeats", "warm_up")
    return {name: getattr(settings, name) for name in names}


def ask(engine: str, folder: Path, threads: int, request: dict[str, Any] | None = None) -> Any:
    """Have a process of its own measure with ``threads`` threads; returns its answer."""
    words = ["-m", "export.timing", json.dumps({"engine": engine, "folder": str(folder.absolute())} | (request or {}))]
    return run_child(words, threads)


def run_child(words: Sequence[str], threads: int) -> Any:
    """Run Python with these words and ``threads`` threads; returns the JSON of its last line.

    Raises:
        UserError: it failed, or was killed for its memory.
    """
    count = str(threads)
    environment = {"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "TVM_NUM_THREADS": count}
    done = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        said = done.stderr.strip().removeprefix("error: ")[-2000:]
        reason = "it was killed, most likely for its memory" if done.returncode == -9 else said
        raise UserError(f"a measurement failed: {reason}")
    return json.loads(done.stdout.splitlines()[-1])


def measurement(
    engine: str, threads: int, answer: dict[str, Any], bandwidth: float | None = None, read: int | None = None
) -> Measurement:
    """What a process has answered.

    Args:
        engine: its name.
        threads: that it had.
        answer: of :func:`export.timing.measure`.
        bandwidth: bytes a second.
        read: bytes of weights that a decoded token reads, where that is to be compared.
    """
    prompts = tuple(
        Prompt(run["tokens"], *(Spread.of(run[name]) for name in ("prefill", "decode", "first_token")))
        for run in answer["runs"]
    )
    share = None if bandwidth is None or read is None else prompts[0].decode.median * read / bandwidth
    return Measurement(engine, threads, prompts, answer["peak_memory"], share)


def read_by_decoding(folder: Path, dtype: str) -> int:
    """Bytes of weights that one decoded token reads: all but an embedding that is no head as well."""
    from export.shards import read_cache

    values = read_values(folder)
    total = int(read_cache(folder / "mlc")["metadata"]["ParamBytes"])
    if not values.get("tie_word_embeddings", False):
        total -= 2 * values["vocab_size"] * values["hidden_size"]
    return total * (2 if dtype == "f32" else 1)


def line(one: Measurement) -> str:
    """A measurement in a line."""
    prompts = "; ".join(f"{p.tokens:,}: prefill {p.prefill}, decode {p.decode} tok/s" for p in one.prompts)
    first = ", ".join(f"{1000 * p.first_token.median:.0f}" for p in one.prompts)
    share = "" if one.bandwidth_share is None else f"; {one.bandwidth_share:.0%} of the bandwidth"
    return (
        f"{one.engine}, {one.threads} threads: {prompts}; first token {first} ms; "
        f"{gigabytes(one.peak_memory)} at most{share}"
    )
