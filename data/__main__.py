"""``python -m data tokenizer`` and ``python -m data prepare``."""

import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.command import run_command
from common.console import Console, duration
from common.errors import UserError
from common.settings import parse, to_dict
from common.words import no_command

USAGE = """\
usage: python -m data {tokenizer,prepare} [options]

  tokenizer   train a byte-level BPE tokenizer on a sample of a corpus
  prepare     write a corpus as tokens, for GPUs faster than a CPU can tokenise

example:
  python -m data tokenizer --data c4:en=0.9,c4:zh=0.1 --vocab 32768 --out tokenizer
  python -m data prepare --data c4 --tokenizer tokenizer --out prepared/c4 --shards 64
"""


def main() -> None:
    """Dispatch on the first word."""
    commands = {"tokenizer": _tokenizer, "prepare": _prepare}
    word = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if word in ("-h", "--help"):
        print(USAGE, end="")
    elif word in commands:
        commands[word](sys.argv[2:])
    else:
        raise no_command("python -m data", word, tuple(commands))


def _tokenizer(argv: list[str]) -> None:
    from data.settings import TokenizerSettings

    settings = parse(
        TokenizerSettings,
        argv,
        prog="python -m data tokenizer",
        description="Train a byte-level BPE tokenizer on a sample of a corpus.\n\nexample:\n"
        "  python -m data tokenizer --data c4:en=0.9,c4:zh=0.1 --vocab 32768 --out tokenizer\n",
    )
    from data.prepared import PreparedSource
    from data.sources import Corpus
    from data.tokenizer import bytes_per_token, check_replaceable, sample_texts, train_tokenizer

    out = Path(settings.out)
    check_replaceable(out)
    console = Console()
    console.settings("train a tokenizer", to_dict(settings))
    corpus = Corpus.open(settings.data)
    if any(isinstance(source, PreparedSource) for source in corpus.sources):
        raise UserError(f"{settings.data} holds tokens, not text; its own tokenizer is in its folder tokenizer/")
    texts = list(sample_texts(corpus, settings.sample_bytes))
    console.say(f"sample: {len(texts):,} documents, {sum(len(text.encode()) for text in texts) / 1e6:.1f} MB")
    tokenizer = train_tokenizer(texts, settings.vocab, out)
    for language, (rate, on) in bytes_per_token(tokenizer, texts[:: len(texts) // 1000 + 1]).items():
        console.say(f"{rate:.2f} bytes a token in {language} ({on})")
    console.say(f"tokenizer: {settings.out} ({tokenizer.vocab_size:,} tokens)")
    console.say(f"next: python train.py --tokenizer {settings.out} --data '{settings.data}'")


def _prepare(argv: list[str]) -> None:
    from data.settings import PrepareSettings

    settings = parse(
        PrepareSettings,
        argv,
        prog="python -m data prepare",
        description="Write the tokens of a corpus to memory-mapped shards; running again goes on after a kill.\n\n"
        "example:\n  python -m data prepare --data c4 --tokenizer tokenizer --out prepared/c4 --shards 64\n",
    )
    from common.files import cache_folder
    from data.prepare import check_space, prepare
    from data.prepared import PreparedSource
    from data.sources import open_source
    from data.tokenizer import find_tokenizer

    console = Console()
    console.settings("prepare tokens", to_dict(settings))
    if settings.tokenizer is None:
        raise UserError("--tokenizer is needed: a folder, such as `python -m data tokenizer` makes")
    if len(settings.data.parts) != 1:
        raise UserError(
            f"{settings.data} is a mix; prepare each source in a folder of its own and mix those in training"
        )
    tokenizer = find_tokenizer(settings.tokenizer, cache_folder())
    source = open_source(settings.data.parts[0][0])
    if isinstance(source, PreparedSource):
        raise UserError(f"{settings.data} holds prepared tokens already")
    if settings.shards is not None:
        source = replace(source, train=source.train[: settings.shards])
    out = Path(settings.out)
    check_space(source, tokenizer, out)
    workers = settings.workers if settings.workers is not None else os.cpu_count() or 1
    records = prepare(source, tokenizer, out, workers=workers, skip_bad_shards=settings.skip_bad_shards)
    _report(console, records, len(source.train) + len(source.validation))
    console.say(f"prepared: {out}\nnext: python train.py --data {out}")


def _report(console: Console, records: Iterator[dict[str, Any]], total: int) -> None:
    """Show each finished shard, the speed and the time left."""
    began, tokens = time.perf_counter(), 0
    console.start(total, 0)
    try:
        for done, record in enumerate(records, 1):
            tokens += record["tokens"]
            elapsed = time.perf_counter() - began
            status = {
                "shard": f"{done}/{total}",
                "tokens": f"{tokens:,}",
                "tok/s": f"{tokens / elapsed:,.0f}",
                "left": duration(elapsed / done * (total - done)),
            }
            console.progress(done, total, status)
            if record["damage"]:
                console.warn(f"{record['damage']}; kept {record['documents']:,} documents of it")
    finally:
        console.stop()


if __name__ == "__main__":
    run_command(main)
