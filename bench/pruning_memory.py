"""The memory and time that pruning takes of a model larger than it may hold: a random Llama of 1.5B parameters.

    python bench/pruning_memory.py                                   # needs 5 GB of disk, in $TMPDIR
    python bench/pruning_memory.py --layers 2 --vocab 1024 --rows 2  # whether it works at all

The model is written in bf16 shards and then pruned by a child process, whose peak of resident anonymous memory counts:
what it holds itself, not the pages of files that the kernel may drop. That is to stay within 40% of the fp32 size.
"""

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout that is not installed

from common.command import run_command
from common.console import Console
from common.settings import Count
from data.settings import Mix
from data.sources import Corpus
from data.tokenizer import Tokenizer, sample_texts, train_tokenizer
from models.hf import save_weights
from pruning.calibration import read_test
from pruning.perplexity import measure
from pruning.prune import prune
from pruning.settings import CutSettings
from pruning.shapes import Shape, parameters

SHARE = 0.4
"""Of the fp32 size."""

CPU = torch.device("cpu")


def config(args: argparse.Namespace) -> dict[str, Any]:
    """The shape of Llama-3.2-1B with a head of its own."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": args.layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": args.vocab,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }


def write_random(folder: Path, values: dict[str, Any]) -> None:
    """A model folder of random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values))
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: (torch.randn(one.shape, generator=generator) * 0.02 + (one.ndim == 1)).to(torch.bfloat16)
        for name, one in model.named_parameters()
    }
    save_weights(weights, folder)
    (folder / "config.json").write_text(json.dumps(values))


class AnonymousPeak:
    """The most resident anonymous memory of this process, looked at every 20 ms."""

    def __init__(self) -> None:
        self.bytes = 0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            status = Path(f"/proc/{os.getpid()}/status").read_text()
            (line,) = (line for line in status.splitlines() if line.startswith("RssAnon"))
            self.bytes = max(self.bytes, int(line.split()[1]) * 1024)
            time.sleep(0.02)


def prune_and_measure(folder: Path, out: Path, ffn: int, tokens: int, length: int, results: Any) -> None:
    """What the child does."""
    peak, start = AnonymousPeak(), time.perf_counter()
    values = json.loads((folder / "config.json").read_text())
    shape = Shape(**(vars(Shape.of(values)) | {"ffn": ffn}))
    settings = CutSettings(calibration=Mix.parse("sample"), tokens=Count(tokens), seq_len=Count(length))
    prune(folder, out, shape, settings, CPU, console=Console())
    results.put(("pruning", time.perf_counter() - start, peak.bytes))
    peak.bytes, start = 0, time.perf_counter()
    measure(out, [read_test("sample", Tokenizer(folder), tokens)], CPU, length=length)
    results.put(("measuring", time.perf_counter() - start, peak.bytes))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--vocab", type=int, default=128_256)
    parser.add_argument("--ffn", type=int, default=6_528, help="to cut 8192 feed-forward units to")
    parser.add_argument("--rows", type=int, default=8, help="of calibration text")
    parser.add_argument("--length", type=int, default=256, help="tokens in a row")
    return parser.parse_args()


def main() -> None:
    """Write, prune, print."""
    args = parse()
    values = config(args)
    count = parameters(values, Shape.of(values))
    with tempfile.TemporaryDirectory() as temporary:
        folder, out = Path(temporary) / "model", Path(temporary) / "out"
        folder.mkdir()
        print(f"writing {count / 1e9:.2f}B random parameters, {2 * count / 1e9:.1f} GB in bf16", flush=True)
        write_random(folder, values)
        texts = sample_texts(Corpus.open(Mix.parse("sample")), 1_000_000)
        train_tokenizer(texts, min(args.vocab, 1024), Path(temporary) / "tokenizer")
        for file in (Path(temporary) / "tokenizer").iterdir():
            file.rename(folder / file.name)
        context = get_context("spawn")
        results = context.Queue()
        tokens = args.rows * args.length
        child = context.Process(target=prune_and_measure, args=(folder, out, args.ffn, tokens, args.length, results))
        child.start()
        for _ in range(2):
            what, seconds, peak = results.get()
            share = peak / (4 * count)
            within = "within" if share <= SHARE else "BEYOND"
            print(
                f"{what}: {seconds:.0f} s, {peak / 1e9:.2f} GB of anonymous memory at the peak, {share:.0%} of the "
                f"{4 * count / 1e9:.1f} GB in fp32 ({within} {SHARE:.0%}); {tokens:,} tokens",
                flush=True,
            )
        child.join()


if __name__ == "__main__":
    run_command(main)
