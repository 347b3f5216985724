"""Fine-tuning: conversations, a model folder, train's own loop."""

import json
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.console import Console
from common.errors import UserError
from common.files import new_folder, require_space
from common.run_folder import RunFolder
from data.tokenizer import Tokenizer
from models import budget
from models.foreign import Architecture, Foreign
from models.hf_config import with_rope_at_top
from models.transformer import Transformer
from sft.dataset import Dataset, read_dataset, show_conversations
from sft.evaluate import Evaluator
from sft.packing import ConversationRows, rows_in
from sft.rendering import Renderer, stops_of
from sft.settings import SftCommand, SftSettings, resolve, row_length, run_name
from train import lora
from train.device import choose_precision, compiles
from train.distill import Distillation
from train.engine import Values, fill, materialise
from train.launch import Place
from train.model_folder import data_seen, generation_config, own_data
from train.optimizer import make_optimizers
from train.resume import adopt_stored
from train.settings import run_path
from train.stage import Stage, known, open_stage

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
    _check_vocabulary(folder, architecture, renderer.tokenizer)
    generation = _generation(folder, renderer)
    teacher_bytes = _check_teacher(Path(settings.teacher), renderer.tokenizer) if settings.teacher else 0
    dataset = read_dataset(settings, renderer, seq_len, Console(rank=place.rank))
    rows = None
    if settings.epochs is not None or settings.tokens is None:
        rows = rows_in(dataset.mixture(seq_len, settings.seed), settings.epochs or EPOCHS)
    own = architecture.own is not None
    settings = resolve(settings, architecture.shape, own=own, rows=rows, world=place.world_size)
    settings = replace(settings, precision=choose_precision(settings, place))
    trainable = _trainable(architecture, settings)
    taken = teacher_bytes // 2 if settings.precision == "bf16" else teacher_bytes
    with open_stage(
        settings, architecture.shape, place, run, init=settings.model, trainable=trainable, taken=taken
    ) as stage:
        return _finetune(stage, architecture, renderer, dataset, generation)


def _finetune(
    stage: Stage, architecture: Architecture, renderer: Renderer, dataset: Dataset, generation: dict[str, Any]
) -> signal.Signals | None:
    settings, run, job = stage.settings, stage.run, stage.job
    assert isinstance(settings, SftSettings)
    folder, seq_len = Path(known(settings.model)), known(settings.seq_len)
    fingerprints = dataset.fingerprints
    stage.check_data(fingerprints)
    adapters = None
    if settings.lora.rank is not None:
        digest = job.broadcast(lora.digest_of(folder) if job.rank == 0 else "")
        if stage.state:
            lora.check_base(folder, stage.state["lora"]["digest"])
        scale = known(settings.lora.alpha) / settings.lora.rank
        adapters = {"base": str(folder.absolute()), "digest": digest, "scale": scale}
    if run.writes and not stage.state:
        count = budget.parameters(architecture.shape).total
        require_space(run.path, 4 * count + 12 * 5 * (_trainable(architecture, settings) or count), "this run")
        with new_folder(run.tokenizer) as temporary:
            renderer.write(temporary)
    job.barrier()

    # Model
    engine = stage.engine(
        build=partial(_build, architecture, stage),
        values=_first_values(architecture, settings),
        make_optimizers=lambda raw: make_optimizers(raw, settings.optimizer, settings.precision),
    )
    distillation = None
    if settings.teacher is not None:
        teacher = load_teacher(Path(settings.teacher), stage.device, settings.precision)
        distillation = Distillation(teacher, settings.distill.weight, settings.distill.temperature)

    # What the loop calls
    taken = stage.state["loader"]["rows"] if stage.state else 0
    mixture = dataset.mixture(seq_len, settings.seed)
    batches = ConversationRows(mixture, rank=job.rank, world_size=job.world_size, row=taken)
    held_out = {
        language: dataset.held_out_batch(language, seq_len, settings.eval.tokens) for language in dataset.held_out
    }
    evaluate = Evaluator(stage, settings, held_out, renderer, engine.model, distillation)
    parameters = sum(parameter.numel() for parameter in engine.raw.parameters())
    trained = sum(parameter.numel() for parameter in engine.raw.parameters() if parameter.requires_grad)
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
            "parameters": f"{parameters:,}" + (f", {trained:,} of them trained" if trained < parameters else ""),
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


def load_teacher(folder: Path, device: torch.device, precision: str) -> Transformer | Foreign:
    """A model to learn from, frozen, its weights in the run's precision."""
    architecture = Architecture.of(folder)
    with torch.device("meta"):
        teacher = architecture.build()
    for parameter in teacher.parameters():  # not the rotary table, which bf16 would spoil
        parameter.data = parameter.data.to(torch.bfloat16 if precision == "bf16" else torch.float32)
    materialise(teacher, device)
    fill(teacher, architecture.read(folder))
    return teacher.eval().requires_grad_(False)


def _check_teacher(folder: Path, tokenizer: Tokenizer) -> int:
    """The bytes of a teacher's weights in fp32.

    Raises:
        UserError: it is no model folder, or has another tokenizer than the student: its distribution would be over
            other tokens.
    """
    architecture, theirs = Architecture.of(folder), Tokenizer(folder)
    if theirs.vocabulary != tokenizer.vocabulary:
        raise UserError(
            f"the teacher {folder} has another tokenizer than the model in {tokenizer.folder}; a teacher and its "
            "student must share theirs"
        )
    _check_vocabulary(folder, architecture, theirs)
    return 4 * budget.parameters(architecture.shape).total


def _check_vocabulary(folder: Path, architecture: Architecture, tokenizer: Tokenizer) -> None:
    if tokenizer.vocab_size > architecture.shape.vocab:
        raise UserError(
            f"the tokenizer in {folder} has {tokenizer.vocab_size:,} tokens, more than the "
            f"{architecture.shape.vocab:,} rows of the model's embedding; these weights need their own"
        )


def _build(architecture: Architecture, stage: Stage) -> Transformer | Foreign:
    """The model without weights."""
    settings = stage.settings
    assert isinstance(settings, SftSettings)
    raw = architecture.build()
    if settings.lora.rank is not None:
        frozen = torch.bfloat16 if settings.precision == "bf16" else torch.float32
        lora.add_adapters(raw, settings.lora.rank, known(settings.lora.alpha), frozen)
    if compiles(settings, stage.device):
        raw.compile_parts()
    raw.checkpointing = stage.fit.checkpointing
    return raw


def _first_values(architecture: Architecture, settings: SftSettings) -> Values:
    """The weights of the model folder, and of adapters their first ones."""
    read = architecture.read(Path(known(settings.model)))
    return read if settings.lora.rank is None else lora.first_values(read, settings.seed)


def _trainable(architecture: Architecture, settings: SftSettings) -> int | None:
    """How many parameters are trained; None: all."""
    if settings.lora.rank is None:
        return None
    with torch.device("meta"):
        model = architecture.build()
        lora.add_adapters(model, settings.lora.rank, 1, torch.float32)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _generation(folder: Path, renderer: Renderer) -> dict[str, Any]:
    """The folder's ``generation_config.json``, that also stops where an answer ends."""
    file, tokenizer = folder / "generation_config.json", renderer.tokenizer
    try:
        before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    except ValueError as error:
        raise UserError(f"{file} cannot be read: {error}; put it right, or remove it") from error
    stops = stops_of(before, renderer.stops)
    return before | generation_config(tokenizer.begin, stops, tokenizer.pad)


def _data_seen(stage: Stage, dataset: Dataset) -> list[dict[str, Any]]:
    """All data that the weights have seen: the parent's, the teacher's, and this run's own."""
    settings = stage.settings
    assert isinstance(settings, SftSettings)
    parents = [known(settings.model), *([settings.teacher] if settings.teacher else [])]
    before = [entry for parent in parents for entry in data_seen(Path(parent))]
    weights = [source.weight for source in dataset.sources]
    return [*before, own_data("sft", [source.origin for source in dataset.sources], weights)]
