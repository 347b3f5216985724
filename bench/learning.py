"""Learning: how much text our default recipe needs to come where tuned AdamW ends, on the same shape and text.

    python -m data prepare --data my-corpus --tokenizer my-tokenizer --out prepared
    python bench/learning.py sweep --recipe adamw --data prepared --sizes 4x128 --times 0.5 0.75 1 1.5
    python bench/learning.py compare --data prepared --size 4x128 --baseline-lr 6e-3 --seeds 0 1 2
    python bench/learning.py sweep --recipe default --data prepared --sizes 2x128 2x512 --times 0.67 1 1.5

``compare`` trains (a) AdamW by the recipe of the GaLore paper's C4 table (arXiv:2403.03507: no weight decay, 10%
warm-up, cosine to 10%) at a rate that a sweep has found, and (b) what ``train.py`` does when it is told nothing, on
the same tokens in the same batches from the same seeds. ``galore`` has the second beta 0.999 and no clipping, as in
that paper's code; ``adamw`` 0.95 and clipping at 1. It prints both ends, the tokens after which (b) is where (a) ends,
and the time that takes: steps of both, taken in turn here, times their number. In mid-run (b) is at a high rate that it
will pay for only as the rate falls, so that with ``--share 0.7`` a run of (b) whose schedule fits 0.7 of the tokens is
set beside (a), too. ``sweep`` trains one recipe at several rates, and prints the best one of each size.

A size is a row of models/sizes.py or LAYERSxWIDTH. Every run is one of ``train.py``, in a folder of its own under
``--out``: the same command again goes on where it was, and what is finished is not done again. Words that are not
known here go to ``train.py``.
"""

import argparse
import json
import math
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # runs from a checkout that is not installed

from bench.peers import Batch  # noqa: E402
from bench.train_step import machine  # noqa: E402
from common.command import run_command  # noqa: E402
from common.errors import UserError  # noqa: E402
from common.settings import Count, parse  # noqa: E402
from data.prepared import PreparedSource  # noqa: E402
from data.settings import Mix  # noqa: E402
from data.sources import open_source  # noqa: E402
from data.tokenizer import Tokenizer  # noqa: E402
from models import budget, sizes  # noqa: E402
from models.sizes import ModelConfig, Size  # noqa: E402
from models.transformer import Transformer  # noqa: E402
from train.optimizer import make_optimizers  # noqa: E402
from train.settings import TrainSettings, model_config, resolve  # noqa: E402

GALORE = "--optimizer.name adamw --optimizer.weight-decay 0 --schedule.name cosine --schedule.final 0.1"

RECIPES = {
    "galore": f"{GALORE} --optimizer.beta2 0.999 --optimizer.clip 0",
    "adamw": f"{GALORE} --optimizer.beta2 0.95 --optimizer.clip 1",
    "default": "",
}
"""Words for train.py, without the learning rate and the warm-up of the first two, which is a tenth of the tokens."""

HEAD_WIDTH = 32
"""Of the shapes that are given as LAYERSxWIDTH: several heads even where the model is narrow."""

EVALUATIONS = 12
"""Of a run; between them the loss is interpolated."""

MICRO_TOKENS = {"cpu": 4_096, "cuda": 32_768}
"""Tokens in a forward pass of the steps that are timed."""


@dataclass(frozen=True)
class Task:
    """What every run of a comparison has in common."""

    data: Mix
    tokens: int
    batch_tokens: int
    seq_len: int
    vocab: int
    out: Path
    more: tuple[str, ...]
    """Further words for train.py."""

    def words(self, recipe: str, size: str, seed: int, rate: float | None) -> list[str]:
        """The words for train.py; a rate of None leaves it to the default."""
        words = ["--size", size, "--data", str(self.data), "--tokens", str(self.tokens), "--seed", str(seed)]
        words += ["--batch-tokens", str(self.batch_tokens), "--seq-len", str(self.seq_len)]
        words += ["--model.vocab", str(self.vocab), *RECIPES[recipe].split()]
        words += [] if recipe == "default" else ["--schedule.warmup", str(self.tokens // 10)]
        words += [] if rate is None else ["--optimizer.lr", f"{rate:g}"]
        words += ["--eval.every", str(self.tokens // EVALUATIONS), "--eval.continuation", "0"]
        return [*words, "--checkpoint.keep", "1", "--log.tensorboard", "false", *self.more]

    def settings(self, recipe: str, size: str) -> TrainSettings:
        """What train.py makes of the words."""
        asked = parse(TrainSettings, self.words(recipe, size, 0, None), prog="train.py", description="")
        return resolve(asked, model_config(asked))

    def default_rate(self, recipe: str, size: str) -> float:
        """The peak learning rate when train.py is not told one."""
        rate = self.settings(recipe, size).optimizer.lr
        assert rate is not None
        return rate

    def folder(self, recipe: str, size: str, seed: int, rate: float) -> Path:
        """Of a run."""
        return self.out / f"{recipe}-{size}-{self.tokens}-lr-{rate:g}-seed-{seed}"

    def run(self, recipe: str, size: str, seed: int, rate: float) -> "Curve":
        """Train, or go on, or find it finished; its losses.

        Raises:
            UserError: train.py does not end well; it has said why.
        """
        folder = self.folder(recipe, size, seed, rate)
        words = [*self.words(recipe, size, seed, rate), "--run", str(folder.absolute())]
        log = folder.with_name(folder.name + ".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "a", encoding="utf-8") as file:
            command = [sys.executable, __file__, "train", *words]
            ended = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False)
        if ended.returncode:
            last = log.read_text(encoding="utf-8").strip().splitlines()[-1:]
            raise UserError(f"the run {folder} ended with {ended.returncode} ({''.join(last)}); see {log}")
        return Curve.read(folder)


@dataclass(frozen=True)
class Curve:
    """Validation losses of a run in nats a token, by the source of the text; ``""`` is the mean of all."""

    tokens: list[int]
    losses: dict[str, list[float]]

    @classmethod
    def read(cls, run: Path) -> "Curve":
        """From ``metrics.jsonl``, where a run that was killed may have evaluated twice at one step."""
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        records = {record["tokens"]: record for record in map(json.loads, lines) if "val/loss" in record}
        tokens = sorted(records)
        names = [name for name in records[tokens[-1]] if name.startswith("val/loss")]
        losses = {
            name.removeprefix("val/loss").removeprefix("/"): [records[at][name] for at in tokens] for name in names
        }
        return cls(tokens, losses)

    def last(self, source: str = "") -> float:
        """The loss at the end."""
        return self.losses[source][-1]

    def reaches(self, loss: float) -> float | None:
        """Tokens at which the mean loss first comes down to ``loss``, linear in between; None if it never does."""
        points = list(zip(self.tokens, self.losses[""], strict=True))
        if points[0][1] <= loss:
            return points[0][0]
        for (before, high), (after, low) in pairwise(points):
            if low <= loss:
                return before + (after - before) * (high - loss) / (high - low)
        return None


def known_size(name: str) -> ModelConfig:
    """The shape of a size; one given as LAYERSxWIDTH becomes a row of models/sizes.py, for this process.

    Raises:
        UserError: there is no such size, or its width is no multiple of two heads.
    """
    asked = re.fullmatch(r"(\d+)x(\d+)", name)
    if asked is None:
        return sizes.size(name).config
    layers, width = int(asked[1]), int(asked[2])
    if not layers or not width or width % (2 * HEAD_WIDTH):
        raise UserError(f"{name} needs a layer and a width that is a multiple of {2 * HEAD_WIDTH}, such as 4x128")
    heads = width // HEAD_WIDTH
    ffn = round(width * 8 / 3 / 32) * 32
    config = ModelConfig(layers, width, heads, heads // 2, HEAD_WIDTH, ffn, 32_768, 256, tied=True, qk_norm=True)
    sizes.SIZES[name] = Size(config, budget.parameters(config).total, "of bench/learning.py")
    return config


def train(argv: list[str]) -> None:
    """``train.py`` with one size more, the one that ``argv`` asks for."""
    known_size(argv[argv.index("--size") + 1])
    from train.__main__ import main as train_main

    sys.argv = ["train.py", *argv]
    train_main()


def rows_of_embedding(data: Mix) -> int:
    """A multiple of 64 that holds the tokenizer of prepared tokens.

    Raises:
        UserError: some of the data is text.
    """
    vocab = 0
    for name, _ in data.parts:
        source = open_source(name)
        if not isinstance(source, PreparedSource):
            raise UserError(f"{name} is text; write its tokens once: python -m data prepare --data {name}")
        vocab = max(vocab, Tokenizer(source.tokenizer).vocab_size)
    return -(-vocab // 64) * 64


def best_rate(rates: Sequence[float], losses: Sequence[float]) -> float:
    """The rate of least loss: the lowest point of the parabola in log(rate) through the best one and its neighbours.

    At either end of the grid the best rate itself; the caller says so.
    """
    best = min(range(len(rates)), key=lambda number: losses[number])
    if best in (0, len(rates) - 1):
        return rates[best]
    (x, y, z), (a, b, c) = (map(math.log, rates[best - 1 : best + 2])), losses[best - 1 : best + 2]
    left, right = (y - x) * (b - c), (y - z) * (b - a)
    return math.exp(y - 0.5 * ((y - x) * left - (y - z) * right) / (left - right))


def make_step(task: Task, recipe: str, size: str, device: torch.device) -> Callable[[], None]:
    """A whole step of a recipe as train.py takes it on one device, on random tokens."""
    settings = task.settings(recipe, size)
    config = model_config(settings)
    cuda = device.type == "cuda"
    model = Transformer(config).to(device)
    if cuda:
        model.compile_parts()
    optimizers = make_optimizers(model, settings.optimizer, "bf16" if cuda else "32")
    rows = task.batch_tokens // task.seq_len
    micro_rows = max(1, min(rows, MICRO_TOKENS[device.type] // task.seq_len))
    batch = Batch.random(config, rows, task.seq_len, device.type, packed=True)
    clip = settings.optimizer.clip or math.inf

    def step() -> None:
        for first in range(0, rows, micro_rows):
            part = slice(first, first + micro_rows)
            assert batch.positions is not None
            with torch.autocast("cuda", torch.bfloat16, enabled=cuda):
                loss, _ = model(batch.tokens[part], batch.positions[part], batch.targets[part])
            (loss / batch.targets.numel()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def step_ratio(task: Task, baseline: str, size: str, device: torch.device, rounds: int) -> float:
    """Time of a step of the default over one of the baseline: the median over rounds in which both take one in turn.

    On a CPU processor time, which others on the machine change less.
    """
    steps = [make_step(task, recipe, size, device) for recipe in ("default", baseline)]

    def seconds(step: Callable[[], None]) -> float:
        clock = time.perf_counter if device.type == "cuda" else time.process_time
        start = clock()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return clock() - start

    for step in steps:
        seconds(step)  # makes the moments, and on a GPU compiles
    return statistics.median(seconds(steps[0]) / seconds(steps[1]) for _ in range(rounds))


@dataclass(frozen=True)
class Comparison:
    """One seed: AdamW's losses and the default's, and those of a default run with fewer tokens if there is one."""

    seed: int
    adamw: Curve
    default: Curve
    shorter: Curve | None = None

    @property
    def tokens(self) -> float:
        """Share of AdamW's tokens after which the default is where AdamW ends; infinite if it never is."""
        reached = self.default.reaches(self.adamw.last())
        return math.inf if reached is None else reached / self.adamw.tokens[-1]

    def perplexity(self, source: str = "") -> float:
        """The default's perplexity at the end, over AdamW's."""
        return math.exp(self.default.last(source) - self.adamw.last(source))

    @property
    def shorter_perplexity(self) -> float:
        """That of the run with fewer tokens, over AdamW's."""
        assert self.shorter is not None
        return math.exp(self.shorter.last() - self.adamw.last())


def compare(args: argparse.Namespace, task: Task) -> None:
    """Train both recipes from every seed, and print what came of it."""
    known_size(args.size)
    rates = {args.baseline: args.baseline_lr, "default": task.default_rate("default", args.size)}
    found = []
    for seed in args.seeds:
        runs = [task.run(recipe, args.size, seed, rate) for recipe, rate in rates.items()]
        if args.share is not None:
            fewer = replace(task, tokens=round(args.share * task.tokens))
            runs.append(fewer.run("default", args.size, seed, rates["default"]))
        found.append(Comparison(seed, *runs))
        ends = zip(("AdamW", "default", f"default with {args.share} of the tokens"), runs, strict=False)
        print(f"seed {seed}: " + ", ".join(f"{name} {curve.last():.4f}" for name, curve in ends), flush=True)
    ratio = step_ratio(task, args.baseline, args.size, torch.device(args.device), args.rounds)
    print_comparison(found, ratio, args.share)


def print_comparison(found: Sequence[Comparison], ratio: float, share: float | None = None) -> None:
    """The losses over the tokens, and a line for every figure with its mean and spread over the seeds.

    Args:
        found: one for each seed.
        ratio: time of a step of the default over one of AdamW.
        share: of the tokens, that the shorter runs have.
    """
    print(f"\n{'tokens':>12} {'AdamW':>8} {'default':>8}   mean validation loss over the seeds")
    for number, at in enumerate(found[0].adamw.tokens):
        both = [statistics.fmean(curve.losses[""][number] for curve in curves) for curves in _by_recipe(found)]
        print(f"{at:>12,} {both[0]:>8.4f} {both[1]:>8.4f}")
    print(f"\n{'':<56} {'mean':>8} {'least':>8} {'most':>8}")
    for source in found[0].adamw.losses:
        where = f" on {source}" if source else ""
        for name, curves in zip(("AdamW", "default"), _by_recipe(found), strict=True):
            _print_line(f"loss of {name}{where}", [curve.last(source) for curve in curves])
        _print_line(f"perplexity at equal tokens, ratio{where}", [one.perplexity(source) for one in found])
    shares = [one.tokens for one in found]
    _print_line("tokens to AdamW's last loss, ratio", shares)
    _print_line(f"time to it, ratio (a step {ratio:.3f})", [one * ratio for one in shares])
    if share is not None:
        name = f"perplexity with {share} of the tokens, ratio"
        _print_line(f"{name} (time {share * ratio:.3f})", [one.shorter_perplexity for one in found])


def _by_recipe(found: Sequence[Comparison]) -> tuple[list[Curve], list[Curve]]:
    return [one.adamw for one in found], [one.default for one in found]


def _print_line(name: str, values: Sequence[float]) -> None:
    print(f"{name:<56} {statistics.fmean(values):>8.4f} {min(values):>8.4f} {max(values):>8.4f}")


def sweep(args: argparse.Namespace, task: Task) -> None:
    """Train a recipe at every rate and size, and print the losses and the best rates.

    The rates are multiples of the default one, which depends on the width: what does not depend on it any more is
    where in the grid the best one lies.
    """
    times = sorted(args.times)
    best = {}
    for size in args.sizes:
        known_size(size)
        usual = task.default_rate(args.recipe, size)
        losses = []
        for factor in times:
            rate = factor * usual
            curves = [task.run(args.recipe, size, seed, rate) for seed in args.seeds]
            losses.append(statistics.fmean(curve.last() for curve in curves))
            print(f"{size:<10} {factor:>6g} × {usual:.3g} = {rate:<10.3g} loss {losses[-1]:.4f}", flush=True)
        best[size] = best_rate(times, losses)
        at_the_end = min(losses) in (losses[0], losses[-1])
        found = f"{size:<10} best at {best[size]:.2f} times the default, {best[size] * usual:.3g}"
        print(found + (": an end of the grid, give more" if at_the_end else ""), flush=True)
    if len(best) > 1:
        print(f"the best multiples differ by a factor of {max(best.values()) / min(best.values()):.2f}")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    whole = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ways = whole.add_subparsers(dest="way", required=True)
    both = argparse.ArgumentParser(add_help=False)
    both.add_argument("--data", type=Mix.parse, required=True, help="prepared tokens, or a mix of them")
    both.add_argument("--tokens", type=Count.parse, default=Count(600_000))
    both.add_argument("--batch-tokens", type=Count.parse, default=Count(2_048))
    both.add_argument("--seq-len", type=Count.parse, default=Count(128))
    both.add_argument("--seeds", type=int, nargs="+", default=[0])
    both.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    both.add_argument("--out", type=Path, default=Path("runs/learning"))
    one = ways.add_parser("compare", parents=[both], help="AdamW and the default, from several seeds")
    one.add_argument("--size", default="4x128")
    one.add_argument("--baseline", choices=("adamw", "galore"), default="adamw")
    one.add_argument("--baseline-lr", type=float, required=True, help="the best that a sweep has found")
    one.add_argument("--share", type=float, metavar="0.7", help="train the default with so much of the tokens, too")
    one.add_argument("--rounds", type=int, default=21, help="of the steps that are timed")
    many = ways.add_parser("sweep", parents=[both], help="one recipe at several rates and sizes")
    many.add_argument("--recipe", choices=tuple(RECIPES), required=True)
    many.add_argument("--sizes", nargs="+", default=["4x128"])
    many.add_argument("--times", type=float, nargs="+", required=True, help="the default rate, such as 0.67 1 1.5")
    return whole


def main() -> None:
    """Train what is asked for and print."""
    if sys.argv[1:2] == ["train"]:
        train(sys.argv[2:])
        return
    args, more = parser().parse_known_args()
    run_command(lambda: _main(args, more))


def _main(args: argparse.Namespace, more: list[str]) -> None:
    vocab = rows_of_embedding(args.data)
    more = ["--device", args.device, *more]
    task = Task(args.data, args.tokens, args.batch_tokens, args.seq_len, vocab, args.out, tuple(more))
    print(machine(args.device))
    print(f"{args.tokens:,} tokens of {args.data} in rows of {args.seq_len}, {args.batch_tokens:,} a step\n")
    (compare if args.way == "compare" else sweep)(args, task)


if __name__ == "__main__":
    main()
