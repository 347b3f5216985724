"""Does a teacher help a pruned model to recover? One student, fine-tuned twice at equal steps.

    python bench/distill.py MODEL --data alpaca_data.json.gz=1,alpaca_zh.json=1 --leave-out 3 6 9 --tokens 100k

The student is MODEL without some of its layers. Prints the held-out losses, and the divergence from the teacher.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common.command import run_command  # noqa: E402
from common.files import new_folder, write_json  # noqa: E402
from models.foreign import Architecture  # noqa: E402
from models.hf import WeightFiles, save_weights  # noqa: E402


def leave_out(folder: Path, layers: set[int], out: Path) -> None:
    """Write ``folder`` without some of its layers."""
    files, values = WeightFiles(folder), Architecture.of(folder).values
    kept = [layer for layer in range(values["num_hidden_layers"]) if layer not in layers]
    weights = {}
    for name in files.names:
        parts = name.split(".")
        if parts[1] == "layers":
            if int(parts[2]) not in kept:
                continue
            parts[2] = str(kept.index(int(parts[2])))
        weights[".".join(parts)] = files.read(name)
    with new_folder(out) as temporary:
        save_weights(weights, temporary)
        write_json(temporary / "config.json", values | {"num_hidden_layers": len(kept)})
        for pattern in ("tokenizer*.json", "generation_config.json", "palmtop.json"):
            for file in folder.glob(pattern):
                shutil.copyfile(file, temporary / file.name)


def main() -> None:
    """Make the student, fine-tune it both ways, print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", default="sample")
    parser.add_argument("--leave-out", type=int, nargs="+", required=True)
    parser.add_argument("--tokens", default="100k")
    parser.add_argument("--weight", default="0.5")
    parser.add_argument("--out", type=Path, default=Path("runs/distill"))
    arguments, more = parser.parse_known_args()
    student = arguments.out / "student"
    leave_out(arguments.model, set(arguments.leave_out), student)
    variants = {
        "labels alone": [],
        "with the teacher": ["--teacher", arguments.model, "--distill.weight", arguments.weight],
    }
    for name, words in variants.items():
        run = arguments.out / name.replace(" ", "-")
        command = [sys.executable, "-m", "sft", student, "--data", arguments.data, "--tokens", arguments.tokens]
        command += ["--run", run.absolute(), "--eval.answer", "0", *words, *more]
        subprocess.run(list(map(str, command)), env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        for record in lines:
            if "val/loss" in record:
                figures = {key: f"{value:.4f}" for key, value in record.items() if key.startswith("val/")}
                print(f"{name}, step {record['step']}: {figures}", flush=True)


if __name__ == "__main__":
    run_command(main)
