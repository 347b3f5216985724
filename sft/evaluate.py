"""What fine-tuning looks at on its way: held-out loss of each language, answers to fixed questions."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from data.packing import Batch
from sft.rendering import Renderer
from sft.settings import SftSettings
from train.distill import Distillation
from train.evaluate import summed, write_on
from train.stage import Stage, known


class Evaluator:
    """What the loop calls to evaluate.

    Args:
        stage: the run.
        settings: resolved.
        held_out: rows of each language.
        renderer: the model's own.
        model: on its devices.
        distillation: with a teacher, whose divergence from the model is then measured too.
    """

    def __init__(
        self,
        stage: Stage,
        settings: SftSettings,
        held_out: Mapping[str, Batch],
        renderer: Renderer,
        model: nn.Module,
        distillation: Distillation | None,
    ) -> None:
        self._stage, self._settings, self._held_out = stage, settings, held_out
        self._renderer, self._model, self._distillation = renderer, model, distillation

    def __call__(self, step: int) -> dict[str, float]:
        """Figures after ``step``; the answers go to ``samples.jsonl`` and the first to the console.

        Returns:
            ``val/loss/LANGUAGE``, nats a token of the answers, and their mean ``val/loss``; ``val/kl/LANGUAGE`` with a
            teacher; ``val/stopped``, the share of the fixed questions whose answer ended.
        """
        losses: dict[str, float] = {}
        divergences: dict[str, float] = {}
        for language, batch in self._held_out.items():
            nll, divergence, count = summed(
                self._figures, batch, self._stage.micro_rows, self._stage.device, self._stage.job
            )
            losses[f"val/loss/{language}"] = nll / max(count, 1)
            divergences[f"val/kl/{language}"] = divergence / max(count, 1)
        mean = {"val/loss": sum(losses.values()) / len(losses)} if losses else {}
        return mean | losses | (divergences if self._distillation else {}) | self._answers(step)

    def _figures(self, batch: dict[str, Tensor]) -> Tensor:
        if self._distillation is not None:
            return torch.stack(self._distillation.figures(self._model, batch))
        nll = self._model(batch["inputs"], batch["positions"], batch["targets"])[1]
        return torch.stack([nll, torch.zeros_like(nll)])

    def _answers(self, step: int) -> dict[str, float]:
        """Ask the fixed questions; the likeliest token is taken each time."""
        stage, settings, renderer = self._stage, self._settings.eval, self._renderer
        prompts = settings.prompts if settings.answer else []
        written = write_on(
            self._model,
            [renderer.prompt([{"role": "user", "content": prompt}]) for prompt in prompts],
            settings.answer,
            renderer.stops,
            known(self._settings.seq_len),
            stage.device,
            stage.job,
            temperature=0.0,
        )
        stopped = [ids[-1] in renderer.stops for ids in written]
        samples = [
            {"step": step, "prompt": prompt, "text": renderer.tokenizer.decode(ids), "stopped": end}
            for prompt, ids, end in zip(prompts, written, stopped, strict=True)
        ]
        stage.run.log_samples(samples)
        for sample in samples[:1]:
            stage.console.say(f"  {sample['prompt']} → {sample['text']}".replace("\n", " "))
        return {"val/stopped": sum(stopped) / len(stopped)} if stopped else {}
