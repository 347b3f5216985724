"""README is true: every command in it runs, its table is what the code says."""

import gzip
import json
import os
import random
import re
import shlex
import subprocess
from pathlib import Path

from models.budget import default_tokens, parameters, phone_bytes
from models.gpus import GPUS
from models.sizes import SIZES
from tests.conftest import ROOT, make_text, write_corpus
from tests.data.fake_hub import C4_CARD, FakeHub
from tests.forked import Forked
from tests.pruning.test_qwen1 import write_qwen
from tests.pruning.test_shapes import LLAMA_3
from tests.scoring.eval_folder import write_eval
from train.plan import ASSUMED_MFU, DEFAULT_GPU, Machine, tokens_per_second

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", README, re.S) for line in block.strip().splitlines()]


def size_table() -> str:
    """The size table as it stands in README."""
    lines = [
        "| size | layers × width | heads / KV | parameters | on a phone | plan | why |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    one_h100 = Machine(GPUS[DEFAULT_GPU])
    for name, size in SIZES.items():
        config = size.config
        count, held = parameters(config).total / 1e6, phone_bytes(config, config.context) / 1e9
        tokens = default_tokens(config)
        hours = tokens / tokens_per_second(config, config.context, one_h100, "none", ASSUMED_MFU) / 3600
        time = f"{hours:,.1f} h" if hours >= 1 else f"{hours * 60:.0f} min"
        lines.append(
            f"| `{name}` | {config.layers} × {config.width} | {config.heads} / {config.kv_heads} | {count:,.0f} M "
            f"| {held:.2f} GB | {tokens / 1e9:,.2f} B, {time} | {size.why} |"
        )
    return "\n".join(lines)


def test_the_size_table_is_current() -> None:
    table = re.search(r"<!-- sizes: begin -->\n(.*?)\n<!-- sizes: end -->", README, re.S)
    assert table is not None
    assert table[1] == size_table()


def test_every_folder_is_explained() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    folders = {path.partition("/")[0] for path in tracked.splitlines() if "/" in path and not path.startswith(".")}
    section = README.partition("## Where things are")[2]
    assert folders - {"docs"} == set(re.findall(r"^\| `(\w+)/` \|", section, re.M))


SMALLER = {
    "--plan": "",
    "consolidate": "",
    "pipeline recipes/1b.yaml --slurm": "",
    "--slurm": "--size tiny --batch-tokens 2048 --seq-len 32",
    "eval --limit 50": "--only chid --out runs/chat/scores/competition-limit50 --max-out-len 2 --speed false",
    "train.py": "--size tiny --model.vocab 512 --tokenizer my-tokenizer --tokens 512 --batch-tokens 256 --seq-len 32 "
    "--eval.tokens 200 --eval.continuation 2 --loader.streams 16 --device cpu --log.tensorboard false",
    "sft chat": "--device cpu --max-tokens 4",
    "sft formats": "--count 20",
    "--show": "",
    "--epochs": "--data alpaca_zh.json=1 --epochs 0.2 --batch-tokens 4096 --seq-len 256 --eval.tokens 200 "
    "--eval.answer 2 --device cpu",
    "-m sft": "--tokens 1024 --batch-tokens 512 --seq-len 256 --eval.tokens 200 --eval.answer 2 --device cpu",
    "data tokenizer": "--vocab 512",
    "data prepare": "--workers 1",
    "scoring prompts": "",
    "scoring rescore": "",
    "submit bundle": "--verify false",
    "-m submit": "",
    "pruning import": "",
    "--ffn": "--tokens 2048 --seq-len 64 --measure-tokens 200 --device cpu",
    "--layers": "--tokens 2048 --seq-len 64 --measure-tokens 200 --device cpu",
    "-m pruning": "--tokens 2048 --seq-len 64 --measure c4 --measure-tokens 200 --rank 1 --device cpu",
    "--suite quick": "--limit 1 --text-tokens 200 --max-seq-len 64 --speed false --device cpu",
    "export bench": "--prompts [8] --new-tokens 4 --repeats 1 --warm-up 0 --threads [1] --torch false",
    "-m export": "",
    "-m scoring": "--data eval --only chid --max-out-len 2 --limit 1 --speed false --device cpu",
}
"""What makes a command of README small enough for a test: the same command, less of it."""


def smaller(line: str, number: int) -> list[str]:
    """The words of a command of README after ``python``, made small."""
    program, *words = shlex.split(line)
    assert program == ".venv/bin/python"
    less = shlex.split(next(words for kind, words in SMALLER.items() if kind in line))
    if "--recover" in words:
        less += shlex.split("--recovery.tokens 512 --recovery.batch-tokens 256 --recovery.seq-len 32")
    if "--devices" in words and less:
        less += ["--devices", "2" if "fsdp" in words else "1"]
    if "--init" in words:
        less = less[less.index("--tokens") :]  # the shape and the tokenizer come with the weights
    if "train.py" in line and less and "--run" not in words:
        less += ["--run", f"runs/{number}"]  # the names of these runs come from the size, here the same
    words[0] = str(ROOT / words[0]) if words[0] == "train.py" else words[0]
    return words + less


def write_alpacas(folder: Path, rng: random.Random) -> dict[str, dict[str, bytes]]:
    """Both Alpacas as files in a folder, and as they lie on the hub."""
    rows = [
        {"instruction": f"Tell me of {n}.", "input": "", "output": f"The {make_text(rng, 6).lower()}"}
        for n in range(200)
    ]
    (folder / "alpaca_data.json.gz").write_bytes(gzip.compress(json.dumps(rows[:100]).encode()))
    (folder / "alpaca_zh.json").write_text(json.dumps(rows[100:]), encoding="utf-8")
    lines = "\n".join(map(json.dumps, rows[100:])).encode()
    return {
        "tatsu-lab/alpaca": {"data.jsonl": "\n".join(map(json.dumps, rows[:100])).encode()},
        "silk-road/alpaca-data-gpt4-chinese": {"Alpaca_data_gpt4_zh.jsonl": lines},
    }


def test_every_command_of_the_readme_runs(tmp_path: Path) -> None:
    rng = random.Random(0)
    texts = [[make_text(rng, 60) for _ in range(300)] for _ in range(2)]
    write_eval(tmp_path / "eval")
    write_qwen(tmp_path / "Qwen-7B")
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (tmp_path / "Llama-3-8B").mkdir()
    (tmp_path / "Llama-3-8B" / "config.json").write_text(json.dumps(LLAMA_3))
    write_corpus(tmp_path / "my-corpus", texts, ["validation text"] * 5)
    files = {f"en/{path.name}": path.read_bytes() for path in (tmp_path / "my-corpus" / "en").iterdir()}
    chinese = {
        name.replace("en/c4-train", "multilingual/c4-zh").replace("en/c4-v", "multilingual/c4-zh-v"): data
        for name, data in files.items()
    }
    repos = {"allenai/c4": {"README.md": C4_CARD, **files, **chinese}, **write_alpacas(tmp_path, rng)}
    commands = [line for line in COMMANDS if not line.startswith("make ")]
    with FakeHub(repos) as hub:
        sbatch = tmp_path / "bin" / "sbatch"  # tests/slurm has a real one
        sbatch.parent.mkdir()
        sbatch.write_text("#!/bin/sh\necho 42\n")
        sbatch.chmod(0o755)
        path = f"{sbatch.parent}:{os.environ['PATH']}"
        environment = hub.environment(tmp_path) | {"PYTHONPATH": str(ROOT), "PATH": path}
        lines = sorted(commands, key=lambda line: "data tokenizer" not in line)
        python = Forked(environment)
        for number, line in enumerate(lines):
            done = python.run(*smaller(line, number), folder=tmp_path)
            assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    assert (tmp_path / "runs" / "continued" / "model" / "model.safetensors").exists()


def test_make_demo_trains_and_answers(tmp_path: Path) -> None:
    assert [line for line in COMMANDS if line.startswith("make")] == ["make demo", "make test"]
    small = """pretrain.tokens=33k pretrain.eval.tokens=2k sft.epochs=1 score.limit=1 score.max-out-len=8
        score-pruned.limit=1 score-pruned.max-out-len=8 score-pruned.speed=false prune.recovery.tokens=1k
        bench.threads=[1] bench.prompts=[16] bench.repeats=1"""
    environment = os.environ | {"DEMO": " ".join(small.split()), "DEMO_RUN": str(tmp_path / "demo")}
    done = subprocess.run(["make", "demo"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    for row in (r"sft +\d+\.\d\d \(sample, limit\) +[\d,]+ tok/s", r"prune +\d+\.\d\d \(sample, limit\)"):
        assert re.search(f"^{row}", done.stdout, re.M), done.stdout
    assert re.search(r"KL \d", done.stdout)
    assert "<h1>" in (tmp_path / "demo" / "prune" / "recovered" / "report.html").read_text(encoding="utf-8")
