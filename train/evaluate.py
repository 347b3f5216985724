"""Validation loss, bits per byte and sample continuations."""

import json
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from common.console import Console
from common.distributed import Job
from common.files import readable_disk_errors
from common.run_folder import RunFolder
from data.packing import make_batch
from data.sources import Corpus
from data.tokenizer import Tokenizer
from data.validation import HeldOut, read_held_out
from train.settings import TrainSettings


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
    """Loss in nats a token and bits per byte on held-out documents.

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
        ``val/loss`` and ``val/bpb``, and where there are several sources both for each, as ``val/loss/NAME``.
    """
    losses, bits = [], []
    for held in held_out:
        nll, count = torch.zeros((), device=device, dtype=torch.float64), 0
        # Every rank makes as many forward passes: under FSDP2 they are made together.
        for start in range(0, len(held.rows), rows * job.world_size):
            part = held.rows[start + job.rank * rows :][:rows]
            filling = np.full((rows - len(part), part.shape[1]), end, dtype=part.dtype)  # predicts nothing
            batch = make_batch(np.concatenate([part, filling]), end)  # always the shape that is compiled
            count += batch.target_count
            parts = (torch.from_numpy(part).to(device) for part in (batch.inputs, batch.positions, batch.targets))
            nll += model(*parts)[1]
        nats, targets = job.sum(torch.stack([nll, nll.new_tensor(count)])).tolist()
        losses.append(nats / max(targets, 1))
        bits.append(nats / math.log(2) / max(held.text_bytes, 1))
    total = sum(weights)
    figures = {
        "val/loss": sum(weight * loss for weight, loss in zip(weights, losses, strict=True)) / total,
        "val/bpb": sum(weight * bit for weight, bit in zip(weights, bits, strict=True)) / total,
    }
    if len(held_out) > 1:
        for held, loss, bit in zip(held_out, losses, bits, strict=True):
            figures |= {f"val/loss/{held.name}": loss, f"val/bpb/{held.name}": bit}
    return figures


@torch.no_grad()
def continue_text(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompt: str,
    tokens: int,
    context: int,
    device: torch.device,
    job: Job,
    seed: int = 0,
) -> str:
    """What the model writes after ``prompt``: sampled at temperature 0.8 from the 40 likeliest tokens.

    Recomputes the row for each token instead of keeping a cache: meant for a few dozen tokens. All ranks
    compute the same, for a sharded model needs them; rank 0's choice counts.
    """
    opening = [] if tokenizer.begin is None else [tokenizer.begin]
    ids = opening + tokenizer.encode(prompt)
    first = len(ids)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(tokens):
        row = torch.tensor([ids[-context:]], device=device)
        logits: Tensor = model(row)[0, -1].float().cpu()
        best, choices = logits.topk(min(40, len(logits)))
        pick = torch.multinomial((best / 0.8).softmax(-1), 1, generator=generator)
        token = job.broadcast(int(choices[pick]))
        if token == tokenizer.end:
            break
        ids.append(token)
    return tokenizer.decode(ids[first:])


class Evaluator:
    """What the loop calls to evaluate.

    Reads the held-out text when it is made, so that a lack of it shows before the training starts.
    """

    def __init__(
        self,
        settings: TrainSettings,
        corpus: Corpus,
        tokenizer: Tokenizer,
        model: nn.Module,
        run: RunFolder,
        console: Console,
        rows: int,
        device: torch.device,
        job: Job,
    ) -> None:
        self._job = job
        self._settings, self._corpus, self._tokenizer, self._model = settings.eval, corpus, tokenizer, model
        self._run, self._console, self._rows, self._device = run, console, rows, device
        self._seed = settings.seed
        assert settings.seq_len is not None
        assert settings.eval.tokens is not None
        self._seq_len = settings.seq_len
        sources = corpus.sources if settings.eval.every else ()
        self._held_out = [read_held_out(source, tokenizer, self._seq_len, settings.eval.tokens) for source in sources]

    def __call__(self, step: int) -> dict[str, float]:
        """Validation figures after ``step``; continuations go to ``samples.jsonl`` and the console."""
        weights = self._corpus.weights
        figures = validate(
            self._model, self._held_out, weights, self._tokenizer.end, self._rows, self._device, self._job
        )
        samples = self._continuations()
        if not self._run.writes:
            return figures
        with readable_disk_errors(self._run.samples), open(self._run.samples, "a", encoding="utf-8") as file:
            for prompt, text in samples.items():
                file.write(json.dumps({"step": step, "prompt": prompt, "text": text}, ensure_ascii=False) + "\n")
        for prompt, text in list(samples.items())[:1]:
            self._console.say(f"  {prompt}{text}".replace("\n", " "))
        return figures

    def _continuations(self) -> dict[str, str]:
        length = self._settings.continuation
        with torch.compiler.set_stance("force_eager"):  # each length would be compiled anew
            return {
                prompt: continue_text(
                    self._model, self._tokenizer, prompt, length, self._seq_len, self._device, self._job, self._seed
                )
                for prompt in (self._settings.prompts if length else ())
            }
