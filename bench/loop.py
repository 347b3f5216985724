"""What the training loop adds to the bare step: data, logging, Fabric, signals.

    python bench/loop.py                                       # a small model on this CPU
    python bench/loop.py --size 125m --device cuda --batch-tokens 65536 --seq-len 2048 --micro-rows 32

One side is ``train.loop.fit`` on prepared tokens, with metrics and TensorBoard and without evaluation
and checkpoints. The other does forward, backward, clipping and fused AdamW on the same batches, which
are on the device already. The two sides take turns, and medians over the rounds are compared.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout that is not installed

from bench.train_step import machine
from common.command import run_command
from common.console import Console
from common.distributed import Job
from common.run_folder import RunFolder
from data.loader import Loader, Order
from data.packing import Batch
from data.prepare import prepare
from data.prepared import PreparedSource
from data.settings import Mix
from data.sources import Corpus, TextSource, open_source
from data.tokenizer import Tokenizer, sample_texts, train_tokenizer
from models import budget, sizes
from models.sizes import ModelConfig
from models.transformer import Transformer, initial_weight
from train.engine import Engine
from train.fabric import Fabric
from train.loop import Training, fit
from train.optimizer import make_adamw, make_optimizers
from train.pretrain import PackedRows
from train.settings import HealthSettings, OptimizerSettings

SMALL = replace(sizes.size("15m").config, layers=2, width=128, heads=2, kv_heads=1, ffn=352, vocab=2048)
"""15m cut to a step of some tenths of a second on two CPU cores."""

TEXT_BYTES = 4_000_000
OPTIMIZER = OptimizerSettings(name="adamw", lr=1e-4, beta2=0.95)
TARGET = 3.0
"""Percent."""


@dataclass(frozen=True)
class Shape:
    """A step: rows, tokens in a row, rows in a forward pass."""

    rows: int
    seq_len: int
    micro_rows: int


class BareStep:
    """The step alone."""

    def __init__(self, config: ModelConfig, device: torch.device, micro_rows: int) -> None:
        self._device, self._micro_rows = device, micro_rows
        self._model = make_model(config, device)
        self._optimizer = make_adamw(list(self._model.parameters()), OPTIMIZER)

    def run(self, batches: list[Batch]) -> float:
        """Seconds for a step on each batch."""
        names = ("inputs", "positions", "targets")
        on_device = [[torch.from_numpy(getattr(batch, name)).to(self._device) for name in names] for batch in batches]
        counts = [batch.target_count for batch in batches]
        start = time.perf_counter()
        for parts, count in zip(on_device, counts, strict=True):
            norm = self._step(parts, count)
        norm.item()  # waits for the device
        return time.perf_counter() - start

    def _step(self, parts: list[Tensor], count: int) -> Tensor:
        for micro_batch in zip(*(part.split(self._micro_rows) for part in parts), strict=True):
            with torch.autocast("cuda", torch.bfloat16) if self._device.type == "cuda" else nullcontext():
                loss, _ = self._model(*micro_batch)
            (loss / count).backward()
        norm = nn.utils.clip_grad_norm_(self._model.parameters(), OPTIMIZER.clip)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm


def make_model(config: ModelConfig, device: torch.device) -> Transformer:
    """The model as training has it: compiled on CUDA."""
    model = Transformer(config, seed=0).to(device)
    if device.type == "cuda":
        model.compile_parts()
    return model


def make_training(config: ModelConfig, device: torch.device, shape: Shape, batches: PackedRows, run: Path) -> Training:
    """The loop as pre-training calls it, but silent and without evaluation and checkpoints."""
    cuda = device.type == "cuda"

    def build() -> Transformer:
        raw = Transformer(config, seed=None)
        if cuda:
            raw.compile_parts()
        return raw

    engine = Engine(
        Fabric(accelerator=device.type, devices=1, precision="bf16-mixed" if cuda else "32-true"),
        Job(),
        build=build,
        values=lambda name, shape: initial_weight(name, shape, config, seed=0),
        make_optimizers=lambda raw: make_optimizers(raw, OPTIMIZER, "bf16" if cuda else "32"),
        spike=HealthSettings().spike,
    )
    folder = RunFolder(run)
    folder.path.mkdir()
    folder.start_metrics(0, 0, tensorboard=True)

    def objective(module: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        loss, nll = module(batch["inputs"], batch["positions"], batch["targets"])
        return loss, nll

    return Training(
        engine=engine,
        batches=batches,
        objective=objective,
        rate=lambda before, tokens: 1e-4,
        run=folder,
        console=Console(rank=1),
        tokens=0,
        rows=shape.rows,
        micro_rows=shape.micro_rows,
        seq_len=shape.seq_len,
        clip=OPTIMIZER.clip,
        log_every=5,
        evaluate=lambda step: {},
        evaluate_every=0,
        save=lambda progress, wait: None,
        save_every=2**62,
    )


def timed_fit(training: Training, steps: int) -> float:
    """Seconds that the loop takes for so many steps more."""
    training.tokens = training.progress.tokens + steps * training.batch_tokens
    start = time.perf_counter()
    fit(training)
    return time.perf_counter() - start


def prepare_sample(folder: Path, vocab: int) -> tuple[PreparedSource, Tokenizer]:
    """Some of the offline sample as prepared tokens."""
    texts = list(sample_texts(Corpus.open(Mix.parse("sample")), TEXT_BYTES))
    tokenizer = train_tokenizer(texts, vocab, folder / "tokenizer")
    (folder / "text").mkdir()
    records = [json.dumps({"text": text}) + "\n" for text in texts]
    (folder / "text" / "train.jsonl").write_text("".join(records), encoding="utf-8")
    source = open_source(str(folder / "text"))
    assert isinstance(source, TextSource)
    list(prepare(source, tokenizer, folder / "prepared", workers=0))
    return PreparedSource.open(folder / "prepared"), tokenizer


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", help="a size of models/sizes.py; default: 15m cut down")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--batch-tokens", type=int, default=8192)
    parser.add_argument("--micro-rows", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--steps", type=int, default=3, help="of each side in each round")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    return parser.parse_args()


def main() -> None:
    """Measure and print."""
    args = parse()
    device = torch.device(args.device)
    config = sizes.size(args.size).config if args.size else SMALL
    shape = Shape(args.batch_tokens // args.seq_len, args.seq_len, args.micro_rows)
    print(machine(args.device))
    print(
        f"{budget.parameters(config).total:,} parameters, {shape.rows} rows of {shape.seq_len} tokens, "
        f"{shape.micro_rows} a forward pass"
    )
    with tempfile.TemporaryDirectory() as name:
        source, tokenizer = prepare_sample(Path(name), min(config.vocab, 8192))
        order = Order(Corpus((source,), (1.0,)), tokenizer.folder, shape.seq_len, 64, seed=0)
        copy = PackedRows(Loader(order), tokenizer.end)
        training = make_training(config, device, shape, PackedRows(Loader(order), tokenizer.end), Path(name) / "run")
        bare = BareStep(config, device, shape.micro_rows)
        seconds: list[tuple[float, float]] = []
        for number in range(args.rounds + 1):
            batches = [copy.take(shape.rows) for _ in range(args.steps)]
            both = (bare.run(batches), timed_fit(training, args.steps))
            if number:  # the first round warms up
                seconds.append(both)
                print(f"round {number}: {both[0]:.2f} s alone, {both[1]:.2f} s in the loop", flush=True)
        training.run.close()
    alone, loop = (statistics.median(times) / args.steps for times in zip(*seconds, strict=True))
    overhead = 100 * (statistics.median(there / here for here, there in seconds) - 1)
    print(f"\n{'':<12} {'ms/step':>9}\n{'bare step':<12} {1e3 * alone:>9.1f}\n{'loop':<12} {1e3 * loop:>9.1f}")
    print(f"overhead {overhead:+.1f}% (median of the rounds' ratios), target at most {TARGET:.0f}%")


if __name__ == "__main__":
    run_command(main)
