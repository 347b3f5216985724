"""The run folder: what a run leaves so that it explains itself.

``config.yaml`` holds every resolved setting, ``env.json`` versions and hardware, ``metrics.jsonl`` a line
for each step, evaluation and start.
"""

import importlib.metadata
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from common.files import exclusive, readable_disk_errors, sweep, write_json, write_text

PACKAGES = ("torch", "lightning", "transformers", "tokenizers", "datasets", "numpy", "safetensors", "deepspeed", "peft")

COMMIT_FILE = "COMMIT"
"""In a copy of the code: the commit it was copied from."""


class RunFolder:
    """A run's folder and its metrics.

    Args:
        path: the folder.
        writes: whether this process writes to it: rank 0 does, the others read.
    """

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        self.path, self.writes = path, writes
        self._pending: list[str] = []
        self._events: Any = None

    @property
    def config(self) -> Path:
        """The resolved settings."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """One JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        """What the model wrote, one JSON object a line."""
        return self.path / "samples.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def tokenizer(self) -> Path:
        """Folder of the run's tokenizer."""
        return self.path / "tokenizer"

    @property
    def model(self) -> Path:
        """The model folder of the last good state."""
        return self.path / "model"

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """A block in which no other process can claim the folder; leftovers of killed ones are removed."""
        if not self.writes:
            yield
            return
        with exclusive(self.path, f"the run {self.path}"):
            if self.config.exists():  # never in a folder that is something else
                sweep(self.path)
                sweep(self.checkpoints)
            yield

    def begin(self, settings_yaml: str) -> None:
        """Write the settings and the environment."""
        if not self.writes:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.config, settings_yaml)
        write_json(self.path / "env.json", environment())

    def start_metrics(self, step: int, tokens: int, *, tensorboard: bool) -> None:
        """Note that training starts after ``step``, and open the TensorBoard events."""
        if tensorboard and self.writes:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(self.path), purge_step=step + 1)
        self.log({"event": "start", "step": step, "tokens": tokens, "time": time.time()})
        self.flush()

    def close(self) -> None:
        """Write what is queued and close the events."""
        self.flush()
        if self._events is not None:
            self._events.close()

    def log(self, record: dict[str, Any]) -> None:
        """Queue a line for ``metrics.jsonl``; its numbers go to TensorBoard too. JSON has no NaN: it becomes null."""
        for name, value in record.items():
            if isinstance(value, float) and not math.isfinite(value):
                record = record | {name: None}
            elif self._events is not None and name not in ("step", "tokens", "event", "time"):
                self._events.add_scalar(name if "/" in name else f"train/{name}", value, record["step"])
        self._pending.append(json.dumps(record, ensure_ascii=False))

    def flush(self) -> None:
        """Write the queued lines."""
        if self._pending and self.writes:
            with readable_disk_errors(self.metrics), open(self.metrics, "a", encoding="utf-8") as file:
                file.write("\n".join(self._pending) + "\n")
        self._pending.clear()

    def log_samples(self, samples: Iterable[dict[str, Any]]) -> None:
        """Append what the model wrote to ``samples.jsonl``."""
        lines = [json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples]
        if lines and self.writes:
            with readable_disk_errors(self.samples), open(self.samples, "a", encoding="utf-8") as file:
                file.writelines(lines)

    def rewind(self, step: int) -> None:
        """Drop metrics and samples beyond ``step``: the run goes on from there and writes them again."""
        for path in (self.metrics, self.samples) if self.writes else ():
            kept = [line for line, record in _records(path) if record.get("step", 0) <= step]
            if path.exists():
                write_text(path, "".join(line + "\n" for line in kept))

    def has_steps(self) -> bool:
        """Whether the metrics hold any training step."""
        return any("loss" in record for _, record in _records(self.metrics))

    def evaluated(self, step: int) -> bool:
        """Whether the metrics hold an evaluation of ``step``."""
        return any(record.get("step") == step and "val/loss" in record for _, record in _records(self.metrics))


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The whole lines of a JSON lines file, if there is one; the last may have been cut, in the middle of a character
    even."""
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else ():
        with suppress(ValueError):
            yield line, json.loads(line)


def environment() -> dict[str, Any]:
    """Versions, hardware and the commit; nothing of the user's environment variables but SLURM's job."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "command": command(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": processor(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "packages": versions,
        "git": git_commit(),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
    }


def command() -> str:
    """The command as it was typed, near enough: ``python -m sft MODEL`` for a package's door."""
    door = Path(sys.argv[0])
    program = ["-m", door.parent.name] if door.name == "__main__.py" else [door.name]
    return shlex.join(["python", *program, *sys.argv[1:]])


def git_commit() -> str | None:
    """The checkout's commit, ``-dirty`` when files differ from it, or None outside a checkout.

    A copy of the code has it in :data:`COMMIT_FILE`; the checkout that the copy may lie in has moved on.
    """
    here = Path(__file__).parent
    recorded = here.parent / COMMIT_FILE
    if recorded.exists():
        return recorded.read_text(encoding="utf-8").strip() or None
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return described.stdout.strip() or None


def processor() -> str:
    """The name of the machine's processor."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
