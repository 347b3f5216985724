"""Scores of the quick likelihood tasks while training, on the model in memory: no export, no stop of the run."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from common.console import Console
from common.errors import UserError
from data.tokenizer import Tokenizer
from models.transformer import Transformer
from train.settings import ScoreInLoop
from train.stage import Stage


class LoopScores:
    """Scores at the first evaluation after every so many tokens, and at the last one.

    Rank 0 scores, with whole weights; the other ranks wait. Under FSDP2 it holds a whole copy of the weights meanwhile.
    The tasks' rows are read when this is made, so that a lack of them shows before the training starts.

    Args:
        asked: what to score, how often.
        stage: of the run.
        tokenizer: the run's.
        model: the bare model, sharded or not.
        batch_tokens: tokens of a step.
        evaluate_every: tokens between evaluations.
        tokens: of the run.
    """

    def __init__(
        self,
        asked: ScoreInLoop,
        stage: Stage,
        tokenizer: Tokenizer,
        model: nn.Module,
        *,
        batch_tokens: int,
        evaluate_every: int,
        tokens: int,
    ) -> None:
        self._asked, self._stage, self._tokenizer, self._model = asked, stage, tokenizer, model
        self._batch_tokens, self._tokens = batch_tokens, tokens
        self._steps = max(1, round(evaluate_every / batch_tokens))
        if _sharded(model) and not isinstance(model, Transformer):
            raise UserError("--eval.scores takes sharded models of our own shapes only; use --strategy ddp")
        if stage.job.rank == 0:
            from scoring.quick.rows import read_rows

            for name in asked.tasks:
                read_rows(name, self._data)

    def __call__(self, step: int) -> dict[str, float]:
        """``score/NAME`` (0-100) of each task and ``score/mean``; nothing when they are not due."""
        if not self.due(step):
            return {}
        model = whole(self._model)
        figures = self._score(model) if self._stage.job.rank == 0 else {}
        return self._stage.job.broadcast(figures)

    def due(self, step: int) -> bool:
        """Whether this evaluation is the last, or the first after a multiple of the tokens asked for."""
        now, before = step * self._batch_tokens, (step - self._steps) * self._batch_tokens
        return now >= self._tokens or now // self._asked.every > max(before, 0) // self._asked.every

    @property
    def _data(self) -> Path | None:
        return Path(self._asked.data) if self._asked.data else None

    def _score(self, model: Any) -> dict[str, float]:
        from scoring.generation import Generator
        from scoring.harness import FolderModel
        from scoring.loading import in_memory, load_tokenizer
        from scoring.quick.scores import score_quick

        twin, tokenizer = in_memory(model), load_tokenizer(self._tokenizer.folder)
        device, bf16 = self._stage.device, self._stage.settings.precision == "bf16"
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            found, _ = score_quick(
                FolderModel(Generator(twin, tokenizer), tokenizer, console=Console(rank=1)),
                self._asked.tasks,
                self._data,
                limit=self._asked.limit,
            )
        scores = {f"score/{result.name}": result.score for result in found if result.score is not None}
        return scores | {"score/mean": sum(scores.values()) / len(scores)}


def whole(model: nn.Module) -> nn.Module:
    """A model with every weight whole on this rank: itself, or of a sharded one a copy. All ranks call it."""
    if not _sharded(model):
        return model
    assert isinstance(model, Transformer)
    with torch.device("meta"):
        copy = Transformer(model.config, seed=None)
    copy.load_state_dict({name: _full(value) for name, value in model.state_dict().items()}, assign=True)
    return copy


def _sharded(model: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def _full(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value
