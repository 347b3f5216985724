"""Validation loss, bits per byte and sample continuations."""

import math
import operator
from collections.abc import Callable, Collection, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from common.distributed import Job
from data.packing import IGNORE, Array, Batch, make_batch
from data.sources import Corpus
from data.tokenizer import Tokenizer
from data.validation import HeldOut, read_held_out
from train.settings import TrainSettings
from train.stage import Stage


@torch.no_grad()
def validate(
    model: nn.Module,
    held_out: Sequence[HeldOut],
    weights: Sequence[float],
    end: int,
    rows: int,
    device: torch.device,
    job: Job,
) -> dict[str, float]:
    """Loss in nats a token, and bits per byte or perplexity, on held-out documents.

    Bits per byte is the summed negative log-likelihood, in bits, over the bytes of the text. It counts the
    end token of each document as a cost and no byte for it, and does not depend on the tokenizer.

    Args:
        model: called as ``model(tokens, positions, targets)``.
        held_out: one set for each source.
        weights: of the sources, for the mean.
        end: id of the token that closes documents.
        rows: rows in a forward pass.
        device: where the model is.
        job: the ranks that share the rows.

    Returns:
        ``val/loss`` and ``val/bpb``, and where there are several sources both for each, as ``val/loss/NAME``. Of padded
        rows, whose text is cut, ``val/perplexity`` instead of bits per byte.
    """
    losses, bits = [], []
    for held in held_out:

        def nll(batch: dict[str, Tensor]) -> Tensor:
            negative: Tensor = model(batch["inputs"], batch["positions"], batch["targets"])[1]
            return negative[None]

        nats, targets = summed(nll, make_batch(held.rows, end, held.layout), rows, device, job)
        losses.append(nats / max(targets, 1))
        bits.append(nats / math.log(2) / max(held.text_bytes, 1))
    padded = held_out[0].layout == "padded"
    figures: dict[str, float] = {}
    for name, values in ({"loss": losses} if padded else {"loss": losses, "bpb": bits}).items():
        figures[f"val/{name}"] = sum(map(operator.mul, weights, values)) / sum(weights)
        if len(held_out) > 1:
            figures |= {f"val/{name}/{held.name}": value for held, value in zip(held_out, values, strict=True)}
    return figures | ({"val/perplexity": float(np.exp(figures["val/loss"]))} if padded else {})


@torch.no_grad()
def summed(
    call: Callable[[dict[str, Tensor]], Tensor], batch: Batch, rows: int, device: torch.device, job: Job
) -> list[float]:
    """The sums over a batch of the figures that ``call`` gives for some of its rows, and last of its targets.

    Args:
        call: a micro-batch on the device to figures without gradient, a vector.
        batch: the same on every rank; they share its rows.
        rows: rows in a forward pass.
        device: where to put them.
        job: the ranks.
    """
    totals: Tensor | None = None
    # Every rank makes as many forward passes, under FSDP2 they are made together; always of the shape that is compiled.
    for start in range(0, len(batch.inputs), rows * job.world_size):
        own = slice(start + job.rank * rows, start + (job.rank + 1) * rows)
        part = {
            "inputs": _filled(batch.inputs[own], rows, 0),
            "targets": _filled(batch.targets[own], rows, IGNORE),
            "positions": _filled(batch.positions[own], rows, 0),
        }
        figures = call({name: torch.from_numpy(values).to(device) for name, values in part.items()}).double()
        totals = figures if totals is None else totals + figures
    assert totals is not None
    return [*job.sum(totals).tolist(), float(batch.target_count)]


def _filled(values: Array, rows: int, value: int) -> Array:
    """As many rows as asked for, those that are missing of one value, which predict nothing."""
    filling = np.full((rows - len(values), values.shape[1]), value, dtype=values.dtype)
    return np.concatenate([values, filling]) if len(filling) else values


@torch.no_grad()
def write_on(
    model: nn.Module,
    openings: Sequence[list[int]],
    tokens: int,
    stop: Collection[int],
    context: int,
    device: torch.device,
    job: Job,
    *,
    temperature: float,
    seed: int = 0,
) -> list[list[int]]:
    """The tokens that a model writes after each of some openings, up to one of ``stop``, which is the last then.

    Recomputes the rows for each token instead of keeping a cache: meant for a few dozen tokens. All ranks
    compute the same, for a sharded model needs them; rank 0's choices count.

    Args:
        model: called as ``model(tokens)``, gives logits.
        openings: token ids that stand before.
        tokens: the most to write.
        stop: ids to stop after.
        context: the longest row.
        device: where the model is.
        job: the ranks.
        temperature: of sampling among the 40 likeliest tokens; 0 takes the likeliest.
        seed: of sampling, for each row the same.
    """
    written: list[list[int]] = [[] for _ in openings]
    generators = [torch.Generator().manual_seed(seed) for _ in openings]

    def going_on(row: int) -> bool:
        return len(written[row]) < tokens and not (written[row] and written[row][-1] in stop)

    with torch.compiler.set_stance("force_eager"):  # each length would be compiled anew
        while any(map(going_on, range(len(openings)))):
            rows = [(opening + own)[-context:] for opening, own in zip(openings, written, strict=True)]
            # Filled up on the right, where causal attention does not look.
            longest = max(map(len, rows))
            filled = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
            last = torch.tensor([len(row) - 1 for row in rows], device=device)
            logits: Tensor = model(filled)[torch.arange(len(rows), device=device), last].float().cpu()
            best, choices = logits.topk(min(40, logits.shape[-1]))
            picks = torch.zeros(len(rows), dtype=torch.long)
            if temperature:
                chances = (best / temperature).softmax(-1)
                drawn = zip(chances, generators, strict=True)
                picks = torch.cat([torch.multinomial(row, 1, generator=generator) for row, generator in drawn])
            chosen = job.broadcast(choices.gather(1, picks[:, None]).flatten().tolist())
            for row, token in enumerate(chosen):
                if going_on(row):
                    written[row].append(token)
    return written


class Evaluator:
    """What the loop calls to evaluate.

    Reads the held-out text when it is made, so that a lack of it shows before the training starts. ``scores`` may add
    figures after a step.
    """

    def __init__(
        self,
        stage: Stage,
        settings: TrainSettings,
        corpus: Corpus,
        tokenizer: Tokenizer,
        model: nn.Module,
        scores: Callable[[int], dict[str, float]] = lambda step: {},
    ) -> None:
        self._scores = scores
        self._stage, self._settings, self._corpus = stage, settings.eval, corpus
        self._tokenizer, self._model, self._seed = tokenizer, model, settings.seed
        assert settings.seq_len is not None
        assert settings.eval.tokens is not None
        self._seq_len = settings.seq_len
        sources = corpus.sources if settings.eval.every else ()
        tokens, layout = settings.eval.tokens, settings.loader.layout
        self._held_out = [read_held_out(source, tokenizer, self._seq_len, tokens, layout) for source in sources]

    def __call__(self, step: int) -> dict[str, float]:
        """Validation figures after ``step``; continuations go to ``samples.jsonl`` and the console."""
        stage, weights, end = self._stage, self._corpus.weights, self._tokenizer.end
        figures = validate(self._model, self._held_out, weights, end, stage.micro_rows, stage.device, stage.job)
        samples = self._continuations()
        stage.run.log_samples({"step": step, "prompt": prompt, "text": text} for prompt, text in samples.items())
        for prompt, text in list(samples.items())[:1]:
            stage.console.say(f"  {prompt}{text}".replace("\n", " "))
        return figures | self._scores(step)

    def _continuations(self) -> dict[str, str]:
        """Each beginning and what the model writes after it, sampled at temperature 0.8."""
        tokenizer, stage, settings = self._tokenizer, self._stage, self._settings
        prompts = settings.prompts if settings.continuation else []
        opening = [] if tokenizer.begin is None else [tokenizer.begin]
        written = write_on(
            self._model,
            [opening + tokenizer.encode(prompt) for prompt in prompts],
            settings.continuation,
            {tokenizer.end},
            self._seq_len,
            stage.device,
            stage.job,
            temperature=0.8,
            seed=self._seed,
        )
        return dict(zip(prompts, map(tokenizer.decode, written), strict=True))
