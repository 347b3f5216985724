"""Fine-tuning: conversations, a model folder, train's own loop."""

import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from common.console import Console
from common.files import new_folder
from common.run_folder import RunFolder
from models import budget
from models.foreign import Architecture
from models.hf_config import with_rope_at_top
from sft.dataset import Dataset, read_dataset, show_conversations
from sft.evaluate import Evaluator
from sft.packing import ConversationRows, rows_in
from sft.rendering import Renderer, stops_of
from sft.settings import SftCommand, SftSettings, resolve, row_length, run_name
from train.device import choose_precision
from train.launch import Place
from train.optimizer import make_optimizers
from train.records import generation_config, own_data, seen_before, stored_generation
from train.resume import adopt_stored
from train.settings import run_path
from train.stage import Stage, known, open_stage
from train.student import Student
from train.teacher import Teacher, check_vocabulary

EPOCHS = 3.0
"""By default, as Alpaca's own recipe has it."""


def finetune(settings: SftSettings, place: Place) -> signal.Signals | None:
    """Fine-tune a model folder; returns the signal that stopped the run, or None when it is finished.

    Args:
        settings: as given; resolved here.
        place: of this process in its job. Every rank calls this with the same settings.

    Raises:
        UserError: anything that the user can put right.
    """
    run = RunFolder(run_path(run_name(settings)), writes=place.rank == 0)
    settings = adopt_stored(settings, run)
    folder = Path(known(settings.model))
    architecture = Architecture.of(folder)
    renderer, seq_len = Renderer(folder), row_length(settings, architecture.shape)
    check_vocabulary(folder, architecture, renderer.tokenizer)
    generation = _generation(folder, renderer)
    teacher = None if settings.teacher is None else Teacher.of(Path(settings.teacher))
    if teacher is not None:
        teacher.check(renderer.tokenizer, seq_len)
    dataset = read_dataset(settings, renderer, seq_len, Console(rank=place.rank))
    rows = None
    if settings.epochs is not None or settings.tokens is None:
        rows = rows_in(dataset.mixture(seq_len, settings.seed), settings.epochs or EPOCHS)
    own = architecture.own is not None
    settings = resolve(settings, architecture.shape, own=own, rows=rows, world=place.world_size)
    settings = replace(settings, precision=choose_precision(settings, place))
    student = Student(architecture, settings.lora)
    taken = 0 if teacher is None else teacher.bytes(settings.precision)
    with open_stage(
        settings, architecture.shape, place, run, init=settings.model, trainable=student.trainable, taken=taken
    ) as stage:
        return _finetune(stage, student, teacher, renderer, dataset, generation)


def _finetune(
    stage: Stage,
    student: Student,
    teacher: Teacher | None,
    renderer: Renderer,
    dataset: Dataset,
    generation: dict[str, Any],
) -> signal.Signals | None:
    settings, run, job, architecture = stage.settings, stage.run, stage.job, student.architecture
    assert isinstance(settings, SftSettings)
    folder, seq_len = Path(known(settings.model)), known(settings.seq_len)
    fingerprints = dataset.fingerprints
    stage.check_data(fingerprints)
    adapters = student.adapters(stage, known(settings.model))
    if run.writes and not stage.state:
        student.require_space(run, stage.settings)
        with new_folder(run.tokenizer) as temporary:
            renderer.write(temporary)
    job.barrier()

    # Model
    engine = stage.engine(
        build=lambda: student.build(stage),
        values=student.first_values(architecture.read(folder), settings.seed),
        make_optimizers=lambda raw: make_optimizers(raw, settings.optimizer, settings.precision),
    )
    distillation = None
    if teacher is not None:
        distillation = teacher.distillation(renderer.tokenizer, settings.distill, stage.device, settings.precision)

    # What the loop calls
    taken = stage.state["loader"]["rows"] if stage.state else 0
    mixture = dataset.mixture(seq_len, settings.seed)
    batches = ConversationRows(mixture, rank=job.rank, world_size=job.world_size, row=taken)
    held_out = {
        language: dataset.held_out_batch(language, seq_len, settings.eval.tokens) for language in dataset.held_out
    }
    evaluate = Evaluator(stage, settings, held_out, renderer, engine.model, distillation)
    taught = f", and the teacher {settings.teacher}" if settings.teacher else ""
    shares = ", ".join(f"{source.name} {source.weight:.0%}" for source in dataset.sources)
    stopped = stage.train(
        engine,
        batches,
        distillation or likelihood,
        evaluate,
        evaluate_every=settings.eval.every,
        evaluate_first=bool(settings.eval.every),
        config=with_rope_at_top(architecture.values),
        fingerprints=fingerprints,
        generation=generation,
        record={
            "stage": "sft",
            "parent": settings.model,
            "teacher": settings.teacher,
            "data": _data_seen(stage, dataset),
            "conversations": dataset.record(),
        },
        lora=adapters,
        header={
            "model": f"{folder}, {architecture.values['architectures'][0]}",
            "parameters": student.described,
            "data": shares + taught,
        },
        flops_per_token=None if adapters else budget.flops_per_token(architecture.shape, seq_len),
    )
    if stopped is None:
        stage.console.say(f"talk:  python -m sft chat {run.model}")
    return stopped


def likelihood(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The summed negative log-likelihood of the answers, as loss and as figure."""
    loss, nll = model(batch["inputs"], batch["positions"], batch["targets"])
    return loss, nll


def show_data(command: SftCommand) -> None:
    """Read the data as a run would, and print what is learned of it."""
    assert command.show is not None
    folder, console = Path(known(command.model)), Console()
    renderer, seq_len = Renderer(folder), row_length(command, Architecture.of(folder).shape)
    show_conversations(read_dataset(command, renderer, seq_len, console), renderer, command.show, console)


def _generation(folder: Path, renderer: Renderer) -> dict[str, Any]:
    """The folder's ``generation_config.json``, that also stops where an answer ends."""
    before, tokenizer = stored_generation(folder), renderer.tokenizer
    stops = stops_of(before, renderer.stops)
    return before | generation_config(tokenizer.begin, stops, tokenizer.pad)


def _data_seen(stage: Stage, dataset: Dataset) -> list[dict[str, Any]]:
    """All data that the weights have seen: the parent's, the teacher's, and this run's own."""
    settings = stage.settings
    assert isinstance(settings, SftSettings)
    parents = [Path(folder) for folder in (settings.model, settings.teacher) if folder is not None]
    weights = [source.weight for source in dataset.sources]
    return [*seen_before(parents), own_data("sft", [source.origin for source in dataset.sources], weights)]
