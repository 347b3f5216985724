"""A model folder to learn from beside the data: whether it can teach, what it takes, and its weights."""

from dataclasses import dataclass
from pathlib import Path

import torch

from common.errors import UserError
from data.tokenizer import Tokenizer
from models import budget
from models.foreign import Architecture, Foreign
from models.transformer import Transformer
from train.distill import Distillation
from train.engine import fill, materialise
from train.learning import DistillSettings


@dataclass(frozen=True)
class Teacher:
    """A teacher, not yet in memory."""

    folder: Path
    architecture: Architecture

    @classmethod
    def of(cls, folder: Path) -> "Teacher":
        """The model in a folder; UserError when it is none that can be run here."""
        return cls(folder, Architecture.of(folder))

    def bytes(self, precision: str) -> int:
        """What its weights take of every device."""
        return (2 if precision == "bf16" else 4) * budget.parameters(self.architecture.shape).total

    def check(self, tokenizer: Tokenizer, seq_len: int) -> None:
        """UserError when it knows other tokens than its student, or no rows so long."""
        check_vocabulary(self.folder, self.architecture, Tokenizer(self.folder))
        self.ids_of(tokenizer)
        context = self.architecture.shape.context
        if seq_len > context:
            raise UserError(
                f"rows of {seq_len} tokens are longer than the teacher's context of {context}; use --seq-len {context}"
            )

    def ids_of(self, tokenizer: Tokenizer) -> torch.Tensor | None:
        """The teacher's id of every token of the student's; None where the two have the same.

        A vocabulary that was cut has some of the teacher's tokens under new ids.

        Raises:
            UserError: the student has a token that the teacher has not: its distribution would be over other text.
        """
        theirs, ours = Tokenizer(self.folder).vocabulary, tokenizer.vocabulary
        if theirs == ours:
            return None
        by_id = sorted(ours, key=lambda token: ours[token])
        unknown = next((token for token in by_id if token not in theirs), None)
        if unknown is not None:
            raise UserError(
                f"the teacher {self.folder} has another tokenizer than the model in {tokenizer.folder}, whose token "
                f"{unknown!r} it does not know; a teacher has its student's tokens, all of them or more"
            )
        if [ours[token] for token in by_id] != list(range(len(by_id))):
            raise UserError(f"the ids of the tokenizer in {tokenizer.folder} have gaps, which no teacher's are cut to")
        return torch.tensor([theirs[token] for token in by_id])

    def distillation(
        self, tokenizer: Tokenizer, settings: DistillSettings, device: torch.device, precision: str
    ) -> Distillation:
        """The objective of a student with this tokenizer; the teacher is in memory from here on."""
        ids = self.ids_of(tokenizer)
        known = None if ids is None else ids.to(device)
        return Distillation(self.load(device, precision), settings.weight, settings.temperature, known)

    def load(self, device: torch.device, precision: str) -> Transformer | Foreign:
        """The model, frozen, its weights in the run's precision."""
        with torch.device("meta"):
            teacher = self.architecture.build()
        for parameter in teacher.parameters():  # not the rotary table, which bf16 would spoil
            parameter.data = parameter.data.to(torch.bfloat16 if precision == "bf16" else torch.float32)
        materialise(teacher, device)
        fill(teacher, self.architecture.read(self.folder))
        return teacher.eval().requires_grad_(False)


def check_vocabulary(folder: Path, architecture: Architecture, tokenizer: Tokenizer) -> None:
    """UserError when a tokenizer has ids that a model has no row for."""
    if tokenizer.vocab_size > architecture.shape.vocab:
        raise UserError(
            f"the tokenizer in {folder} has {tokenizer.vocab_size:,} tokens, more than the "
            f"{architecture.shape.vocab:,} rows of the model's embedding; these weights need their own"
        )
