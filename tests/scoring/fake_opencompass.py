"""A stand-in for the Python that has OpenCompass 0.3.1: its command line and the files that it writes.

It answers every question alike, and gives fixed scores. OpenCompass itself needs gigabytes of packages at old releases.

    python fake_opencompass.py -c PROBE
    python fake_opencompass.py run_opencompass.py CONFIG --mode MODE --reuse latest --work-dir FOLDER

FAKE_OPENCOMPASS in the environment has it go wrong: ``crash``, ``fail=DATASET``, ``error=DATASET``, ``hang``,
``version=X``, ``silent``.
"""

import argparse
import json
import os
import re
import sys
import time
from pathlib import Path

BBH = sorted(file.stem for file in Path("data/data/BBH/data").glob("*.json"))
SCORES = {
    "commonsense_qa": {"accuracy": 25.0},
    **{f"bbh-{name}": {"score": float(number)} for number, name in enumerate(BBH)},
    "gsm8k": {"accuracy": 12.5},
    "openai_humaneval": {"humaneval_pass@1": 99.0},
    "chid-test": {"accuracy": 14.28571},
    "truthful_qa": {"bleu_max": 0.0712, "bleu_diff": -0.0113, "bleu_acc": 0.2834},
}
ANSWERS = {"openai_humaneval": "    return 1\n", "commonsense_qa": "So the answer is A."}


def main() -> None:
    kind, _, what = os.environ.get("FAKE_OPENCOMPASS", "").partition("=")
    if sys.argv[1] == "-c":
        assert "opencompass" in sys.argv[2]
        print(json.dumps({"version": what if kind == "version" else "0.3.1", "gpus": 0}))
        return
    assert Path(sys.argv[1]).exists()
    parser = argparse.ArgumentParser()
    parser.add_argument("config")
    for option in ("--mode", "--reuse", "--work-dir"):
        parser.add_argument(option)
    asked = parser.parse_args(sys.argv[2:])
    if kind == "crash":
        sys.exit("RuntimeError: no such thing")
    run = latest(Path(asked.work_dir))
    print("opencompass", asked.mode, "in", run, flush=True)
    model = re.search(r"abbr='([^']+)'", Path("palmtop_opencompass.py").read_text()).group(1)
    left_out = re.findall(r"!= '(\w+)'", Path(asked.config).read_text())
    for dataset in SCORES:
        if dataset in left_out or kind == "silent":
            continue
        if asked.mode == "infer":
            infer(run, model, dataset, failing=kind == "fail" and what == dataset)
            if kind == "hang":
                Path("pid").write_text(str(os.getpid()))
                time.sleep(60)
        else:
            judge(run, model, dataset, error=kind == "error" and what == dataset)
    if asked.mode == "eval":
        summarise(run, model)


def latest(work: Path) -> Path:
    runs = sorted(work.iterdir())
    return runs[-1] if runs else work / "20240101_000000"


def infer(run: Path, model: str, dataset: str, *, failing: bool) -> None:
    answers = write(run / "predictions" / model / f"{dataset}.json", None)
    if answers.exists():
        return
    write(run / "logs" / "infer" / model / f"{dataset}.out", "Traceback (most recent call last):\nOSError: no hub")
    if failing:
        return
    write(run / "logs" / "infer" / model / f"{dataset}.out", "fine")
    rows = {str(row): {"origin_prompt": "?", "prediction": ANSWERS.get(dataset, "A"), "gold": "A"} for row in range(3)}
    write(answers, json.dumps(rows))
    with open("answered.txt", "a") as file:
        file.write(dataset + "\n")


def judge(run: Path, model: str, dataset: str, *, error: bool) -> None:
    result = run / "results" / model / f"{dataset}.json"
    if result.exists():
        return
    if not (run / "predictions" / model / f"{dataset}.json").exists():
        write(result, json.dumps({"error": "No predictions found."}))
    else:
        write(result, json.dumps({"error": "a bug"} if error else SCORES[dataset] | {"details": {}}))


def summarise(run: Path, model: str) -> None:
    lines, bbh = [f"dataset,version,metric,mode,{model}"], []
    for dataset in SCORES:
        result = run / "results" / model / f"{dataset}.json"
        found = json.loads(result.read_text()) if result.exists() else {}
        measured = {name: value for name, value in found.items() if isinstance(value, float)}
        if not measured:
            lines.append(f"{dataset},-,-,-,-")
        lines += [f"{dataset},abc123,{name},gen,{value:.02f}" for name, value in measured.items()]
        bbh += [*measured.values()] if dataset.startswith("bbh-") else []
    if len(bbh) == len(BBH):
        lines.append(f"bbh,-,naive_average,gen,{sum(bbh) / len(bbh):.02f}")
    write(run / "summary" / "summary_20240101_000000.csv", "\n".join(lines) + "\n")


def write(path: Path, text: str | None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if text is not None:
        path.write_text(text)
    return path


main()
