"""Run folders as training, scoring, pruning and export leave them, without having run."""

import json
import math
from contextlib import suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

from common.files import write_json, write_text
from common.settings import Count, to_yaml
from export.phone import phone_command
from export.settings import PhoneCommand
from models.hf_config import to_config
from models.sizes import size
from scoring.results import TaskResult, means
from scoring.score import empty_score
from scoring.settings import ScoreSettings
from sft.settings import SftSettings
from tests.export.fake_adb import PROPERTIES, Phone
from train.settings import TrainSettings

SIX = ("commonsense_qa", "bbh", "gsm8k", "humaneval", "chid", "truthfulqa")
C4 = [{"stage": "pretrain", "sources": [{"source": "c4:en", "weight": 1.0}]}]
FOREIGN = [{"stage": "unknown", "from": "phi-2"}]


def write_run(
    path: Path,
    *,
    steps: int = 30,
    data: list[dict[str, Any]] | None = None,
    parent: Path | None = None,
    teacher: Path | None = None,
    model: bool = True,
) -> Path:
    """A run of ``steps`` steps of 1,000 tokens, with a restart, a skipped step and a loss that is no number."""
    budget = Count(40_000)
    settings: Any = TrainSettings(size="tiny", tokens=budget)
    if teacher is not None:
        settings = TrainSettings(init=str(parent), teacher=str(teacher), tokens=budget)
    elif parent is not None:
        settings = SftSettings(model=str(parent), tokens=budget)
    write_text(path / "config.yaml", to_yaml(settings))
    write_json(path / "env.json", {"command": f"python train.py --run {path.name}", "packages": {"torch": "2.13"}})
    lines: list[dict[str, Any]] = [{"event": "start", "step": 0, "tokens": 0, "time": 1.0}]
    for step in range(1, steps + 1):
        loss = None if step == 7 else 3 + 5 * math.exp(-step / 8)
        line = {"step": step, "tokens": 1000 * step, "loss": loss, "lr": 1e-3, "grad_norm": 1.5, "tokens_per_s": 500.0}
        lines.append(line | ({"skipped": 1} if step == 7 else {}))
        if step % 10 == 0:
            lines.append({"step": step, "tokens": 1000 * step, "val/loss": 3.5, "val/bpb": 1.25 - step / 1000})
            lines.append({"event": "ranks", "step": step, "peak_memory_bytes": 5e8, "rank_seconds": 0.1})
        if step == 20:
            lines.append({"event": "start", "step": 20, "tokens": 20_000, "time": 2.0})
    write_text(path / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 31, "tok')
    samples = [
        {"step": step, "prompt": "Who <b>?", "text": f"<script>alert({step})</script> 中文"} for step in (10, 20)
    ]
    write_text(path / "samples.jsonl", "".join(json.dumps(line) + "\n" for line in samples))
    if model:
        write_model(path / "model", data=C4 if data is None else data)
    return path


def write_model(folder: Path, *, data: list[dict[str, Any]], **record: Any) -> Path:
    """A model folder without weights."""
    write_json(folder / "config.json", to_config(size("tiny").config, bos=1, eos=2, pad=0))
    write_json(folder / "palmtop.json", {"stage": "pretrain", "data": data, "command": "python train.py"} | record)
    return folder


def write_scores(
    run: Path, scores: tuple[float | None, ...], name: str = "competition", marks: tuple[str, ...] = ()
) -> Path:
    """A score of the six tasks, or of the first of them; None: one that could not be run."""
    results = [
        TaskResult(task, score, None if score is None else (score - 1, score + 1), 20.0, 8)
        for task, score in zip(SIX, scores, strict=False)
    ]
    found = empty_score(run / "model", ScoreSettings(suite="competition", max_out_len=64), "chat")
    found.marks, found.competition = list(marks), results
    if not found.missing:
        found.means = means([score for score in scores if score is not None])
    spread = {"median": 50.0, "lower": 49.0, "upper": 51.0}
    found.speed = {
        "device": "a CPU, 2 threads", "dtype": "float32", "forward_tokens": 256, "forward_seconds": spread,
        "prompt_tokens": 192, "new_tokens": 64, "prefill": spread, "decode": spread, "peak_memory": 600_000_000,
        "peak_memory_of": "resident", "notes": [], "throughput": 0.02,
    }  # fmt: skip
    found.write(run / "scores" / name)
    return run


def write_phone(run: Path, decode: float, *, emulated: bool = False, peak: int = 10**9) -> None:
    """What ``python -m export phone`` leaves in a run, with other figures."""
    found = json.loads(_measured(emulated))
    if not emulated:
        found["measurement"]["peak_memory"] = peak
        found["measurement"]["prompts"][0]["decode"] = {"median": decode, "lower": decode - 1, "upper": decode + 1}
    write_json(run / "export" / "phone.json", found)


@cache
def _measured(emulated: bool) -> str:
    """The command's ``phone.json`` of a stand-in for a phone, which takes seconds to answer."""
    with TemporaryDirectory() as name:
        folder, phone = Path(name) / "export", Phone(Path(name) / "device")
        library = {"target": "android-cpu", "file": "lib/android-cpu-1-armv8.so"}
        for file in (folder / "runner" / "runner", folder / library["file"], folder / "mlc" / "tensor-cache.json"):
            write_text(file, file.name)
        memory = {"weights": 1000, "cache": 1000}
        write_json(folder / "export.json", {"libraries": [library], "memory": memory, "dtype": "f16", "model": {}})
        runs = [{"tokens": 64, "prefill": [90.0], "decode": [9.0], "first_token": [0.1]}]
        said = {"library": "armv8", "context": 64, "threads": 4, "load_seconds": 0.5, "peak_memory": 10**9}
        phone.behave(
            properties=PROPERTIES | {"ro.product.model": "Phone 9", "ro.kernel.qemu": f"{emulated:d}"},
            answer=json.dumps(said | {"runs": runs, "arm": True}),
        )
        with patch("export.phone.runner_folder", lambda: folder / "runner"), suppress(SystemExit):
            phone_command(PhoneCommand(folder=str(folder), adb=str(phone.adb)))
        return (folder / "phone.json").read_text(encoding="utf-8")
