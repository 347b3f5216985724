"""Our answers against plain lm-evaluation-harness's, in time and text.

    python bench/score.py --data ../shared/datasets/eval
    python bench/score.py --data ../shared/datasets/eval --prompts 4 --new-tokens 16      # whether it works at all

The harness's HFLM stands with its defaults, batch 1 and dtype auto; ours with its own, with and without early stop. All
three answer the same prompts of the competition's tasks (:data:`ROWS`) with SmolLM2-135M-Instruct in the form of base
models, greedily, one after the other in this process. Ours is to take a third of the time at most, and two thirds
without early stop. An answer may differ where two tokens are all but equally likely: for each that does, the margin
between the two in logits is shown.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout that is not installed

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import logging

from scoring.competition import TASKS
from scoring.competition.data import read_rows
from scoring.competition.prompts import prompt_of
from scoring.competition.shots import read_shots
from scoring.generation import GenerationSettings, Generator
from scoring.loading import load
from scoring.requests import Key, Request
from tests.smollm2 import smollm2_folder

ROWS = {
    "commonsense_qa": 10,
    "gsm8k": 12,
    "bbh_date_understanding": 6,
    "bbh_navigate": 6,
    "humaneval": 10,
    "chid": 10,
    "truthfulqa": 10,
}
"""The first rows of each task: 64 prompts."""

NEAR = 0.01
"""Logits between two tokens that the order of additions may decide between."""

Outputs = dict[Key, str]


def read_requests(data: Path, prompts: int, new_tokens: int) -> list[Request]:
    """The prompts of :data:`ROWS`, in turns from each task so that fewer of them are of all tasks."""
    shots, requests = read_shots(data), []
    for name, count in ROWS.items():
        task = TASKS[name]
        for number, row in enumerate(read_rows(task, data)[:count]):
            length = min(task.max_new_tokens or new_tokens, new_tokens)
            requests.append(Request(name, number, prompt_of(task, row, shots), length, task.finished))
    return sorted(requests, key=lambda request: request.row)[:prompts]


def by_harness(folder: Path, requests: list[Request]) -> tuple[float, Outputs]:
    """Seconds and answers of HFLM."""
    model = HFLM(pretrained=str(folder), device="cpu")
    instances = [
        Instance("generate_until", {}, (one.prompt, {"until": [], "max_gen_toks": one.max_new_tokens}), 0)
        for one in requests
    ]
    seconds, texts = timed(lambda: model.generate_until(instances, disable_tqdm=True))
    return seconds, dict(zip((one.key for one in requests), texts, strict=True))


def by_us(model: Any, tokenizer: Any, requests: list[Request], *, early_stop: bool) -> tuple[float, Outputs]:
    """Seconds and answers of ours, planning and shared beginnings included."""
    generator, outputs = Generator(model, tokenizer, GenerationSettings(early_stop=early_stop)), {}
    seconds, _ = timed(lambda: generator.generate(requests, lambda one, text: outputs.update({one.key: text})))
    return seconds, outputs


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """How long something takes, and what it gives."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


@torch.inference_mode()
def margin(model: Any, tokenizer: Any, prompt: str, theirs: str, ours: str) -> float:
    """Logits, one prompt alone, by which the first token that differs was the likelier one for the harness."""
    end = [tokenizer.eos_token_id]
    before, a, b = (tokenizer(text)["input_ids"] for text in (prompt, theirs, ours))
    same = next(place for place, (x, y) in enumerate(zip(a + end, b + end, strict=False)) if x != y)
    logits_V = model(torch.tensor([before + a[:same]]), logits_to_keep=1).logits[0, -1]
    return float(logits_V[(a + end)[same]] - logits_V[(b + end)[same]])


def compare(model: Any, tokenizer: Any, requests: list[Request], theirs: Outputs, ours: Outputs) -> None:
    """Name the answers that differ, with their margins."""
    differing = [one for one in requests if theirs[one.key] != ours[one.key]]
    print(f"\n{len(requests) - len(differing)} of {len(requests)} answers are the same to the letter")
    for one in differing:
        gap = margin(model, tokenizer, one.prompt, theirs[one.key], ours[one.key])
        print(f"  {one.task} {one.row}: {gap:+.6f} logits, {'a near-tie' if abs(gap) < NEAR else 'NOT A NEAR-TIE'}")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of evaluation data")
    parser.add_argument("--model", type=Path, help="another model folder")
    parser.add_argument("--prompts", type=int, default=sum(ROWS.values()), help="how many of the 64")
    parser.add_argument("--new-tokens", type=int, default=256, help="of the longest answer")
    return parser.parse_args()


def main() -> None:
    """Time all three and compare."""
    args = parse()
    logging.set_verbosity_error()
    folder, requests = args.model or smollm2_folder(), read_requests(args.data, args.prompts, args.new_tokens)
    model, tokenizer = load(folder, "cpu")
    with torch.inference_mode():  # the first pass of a process is slower
        model(torch.zeros(1, 64, dtype=torch.long))
    print(f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}, {len(requests)} prompts, {folder.name}")
    slow, theirs = by_harness(folder, requests)
    print(f"{'lm-eval HFLM':<24} {slow:8.1f} s", flush=True)
    whole, ours = by_us(model, tokenizer, requests, early_stop=False)
    print(f"{'ours, no early stop':<24} {whole:8.1f} s  {slow / whole:5.2f} times as fast (at least 1.5)", flush=True)
    early, stopped = by_us(model, tokenizer, requests, early_stop=True)
    print(f"{'ours':<24} {early:8.1f} s  {slow / early:5.2f} times as fast (at least 3)", flush=True)
    compare(model, tokenizer, requests, theirs, ours)
    cut = sum(ours[key] != text for key, text in stopped.items())
    wrong = [key for key, text in stopped.items() if not ours[key].startswith(text.rstrip("\ufffd"))]
    print(f"{cut} answers were stopped early; not the beginning of the whole answer: {wrong or 'none'}")


if __name__ == "__main__":
    main()
