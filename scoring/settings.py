"""What ``python -m scoring`` can be told. Imports nothing heavy: ``--help`` reads this module."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.errors import UserError
from common.settings import Count, option

SUITES = ("competition", "quick", "c4", "sample")


@dataclass
class EngineSettings:
    """What the model runs in."""

    engine: Literal["transformers", "vllm", "opencompass"] = "transformers"
    """transformers; vllm, where it is installed; or opencompass 0.3.1 itself, in an environment of its own."""
    opencompass_python: str | None = None
    """With --engine opencompass: the Python interpreter that has it."""
    form: Literal["auto", "base", "chat"] = "auto"
    """Prompts as plain text or through the chat template. auto: chat for models that were fine-tuned on
    conversations, and for others' that have a template."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: float16 on cuda, as OpenCompass has it, float32 on cpu."""
    batch_size: int | None = None
    """Prompts in a batch. Default: 16 on a CPU, 64 on a GPU."""
    max_seq_len: int | None = None
    """Tokens that prompts are cut to, from the left. Default: the model's context."""
    max_out_len: int = 1024
    """Most new tokens of commonsense_qa, chid and truthfulqa; the other tasks have 512 of their own."""
    early_stop: bool = True
    """End an answer where nothing that follows can change its score."""
    unsafe_code_execution: bool = False
    """Run the programs of HumanEval without the sandbox: they can do whatever you can."""


@dataclass
class ScoreSettings(EngineSettings):
    """Score a model folder."""

    suite: str | None = None
    """competition, quick (likelihood tasks), c4 (perplexity) or sample (offline, a few items); several with commas.
    Default: competition, without --tasks."""
    only: str | None = None
    """Of the competition or the sample only these of commonsense_qa, bbh, gsm8k, humaneval, chid and truthfulqa, with
    commas; then there is no mean."""
    tasks: str | None = None
    """Tasks of lm-evaluation-harness by their names there, with commas."""
    data: str | None = None
    """Folder of evaluation data as published, or OpenCompass's. Default: the hub."""
    text: str = "c4"
    """Held-out text of the c4 suite: c4, sample, or a folder in C4's layout."""
    text_tokens: Count = option(Count(10_000_000))
    """How much of it."""
    limit: int | None = None
    """Score only so many rows of a task, drawn by --seed; of --tasks the first ones."""
    seed: int = 0
    """Of the draw, and of the intervals."""
    speed: bool = True
    """Measure throughput, prefill, decode and memory too."""
    out: str | None = None
    """Folder of the results. Default: scores/ beside a run's model, else under scores/ here."""

    def __post_init__(self) -> None:
        for name in ("limit", "batch_size", "max_seq_len", "max_out_len"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
        unknown = [name for name in words(self.suite) if name not in SUITES]
        if unknown:
            raise ValueError(f"--suite {unknown[0]} is no suite; there are {', '.join(SUITES)}")
        if {"competition", "sample"} <= set(self.suites):
            raise ValueError("the sample is the competition on other data: score one of them at a time")
        if self.only is not None and not {"competition", "sample"} & set(self.suites):
            raise ValueError("--only names tasks of the suites competition and sample")
        if (self.engine == "opencompass") != (self.opencompass_python is not None):
            raise ValueError("--engine opencompass and --opencompass-python PATH belong together")
        if self.engine == "opencompass" and (self.limit or self.only or "sample" in self.suites):
            raise ValueError("OpenCompass scores whole data sets, all of them: leave --limit, --only and sample out")

    @property
    def suites(self) -> list[str]:
        """The suites to run, in their order."""
        asked = words(self.suite) or ([] if self.tasks else ["competition"])
        return [name for name in SUITES if name in asked]


@dataclass
class ScoreCommand(ScoreSettings):
    """What the command takes."""

    model: str = ""
    """The model folder."""


@dataclass
class PromptsSettings:
    """Write every prompt of the competition as it would be sent."""

    suite: Literal["competition", "sample"] = "competition"
    """Which."""
    data: str | None = None
    """Folder of evaluation data. Default: the hub."""
    out: str = "prompts.jsonl"
    """Lines of task, row and prompt."""
    template_of: str | None = None
    """A model folder or tokenizer whose chat template renders the prompts. Default: as base models get them."""
    limit: int | None = None
    """Only so many rows of a task, drawn by --seed."""
    seed: int = 0
    """Of the draw."""


@dataclass
class RescoreSettings:
    """Score answers made elsewhere."""

    suite: Literal["competition", "sample"] = "competition"
    """Which."""
    answers: str = ""
    """JSON lines of task, row and output."""
    data: str | None = None
    """Folder of evaluation data. Default: the hub."""
    out: str | None = None
    """The lines with extracted and correct. Default: NAME.scored.jsonl beside them; the summary in .json."""
    unsafe_code_execution: bool = False
    """Run the programs of HumanEval without the sandbox."""


def words(text: str | None) -> list[str]:
    """Names separated by commas."""
    return [word.strip() for word in (text or "").split(",") if word.strip()]


def data_folder(data: str | None, flag: str = "--data") -> Path | None:
    """The folder of evaluation data that a flag names; UserError where there is none."""
    if data is not None and not Path(data).is_dir():
        raise UserError(f"{flag} {data} is no folder")
    return None if data is None else Path(data)


def out_folder(model: Path, settings: ScoreSettings) -> Path:
    """Where the results go: one folder for each way of scoring a model."""
    if settings.out is not None:
        return Path(settings.out)
    model = model.absolute()
    of_run = model.name == "model" and (model.parent / "config.yaml").exists()
    above = model.parent / "scores" if of_run else Path("scores") / model.name
    parts = [*settings.suites, *words(settings.only), *words(settings.tasks)]
    if settings.engine != "transformers":
        parts.append(settings.engine)
    if settings.form != "auto":
        parts.append(settings.form)
    if settings.limit is not None:
        parts.append(f"limit{settings.limit}")
    return above / "-".join(parts)


def fine_tuned(folder: Path) -> bool | None:
    """Whether a model folder of ours has been fine-tuned on conversations; None where it does not tell."""
    try:
        stages = [part["stage"] for part in json.loads((folder / "palmtop.json").read_text(encoding="utf-8"))["data"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return None if "unknown" in stages and "sft" not in stages else "sft" in stages
