"""The commands as a user types them: help, bad input, the hub."""

import fcntl
import json
import resource
import shutil
from pathlib import Path

import pytest

from common import signals
from data.tokenizer import train_tokenizer
from tests.conftest import ROOT, WORDS, run_command, write_corpus
from tests.data.fake_hub import C4_CARD, FakeHub
from tests.forked import Forked, forked
from train.__main__ import main

MICRO = "--batch-tokens 256 --seq-len 32 --tokens 512 --device cpu --log.tensorboard false --loader.streams 2".split()
COMMANDS = ("train.py", "-m train", "-m data", "-m data prepare", "-m data tokenizer", "-m sft", "-m sft formats")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_quick_and_has_an_example(command: str) -> None:
    began = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = run_command(*command.split(), "--help")
    # Of the processor, for a busy machine says nothing of the command.
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - began < 1.0
    assert done.returncode == 0
    assert "example" in done.stdout
    assert "  python " in done.stdout


def test_every_flag_that_is_promised_is_there() -> None:
    shown = run_command("train.py", "--help").stdout
    promised = """
    size data tokenizer tokens seq-len batch-tokens run resume init seed device precision compile deterministic config
    keep-every skip-bad-shards optimizer.lr schedule.warmup loader.workers eval.every checkpoint.every
    """
    for flag in promised.split():
        assert f"--{flag} " in shown, flag


@pytest.fixture
def fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run a training command that must fail: exit code 2, one message, nothing made; returns the message."""

    def run(*words: str | Path, began: bool = False) -> str:
        monkeypatch.setattr("sys.argv", ["train.py", "--run", str(tmp_path / "run"), *MICRO, *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            main()
        signals.clear()
        return check_failure(caught.value.code, capsys.readouterr().err, tmp_path / "run", began)

    return run


def check_failure(code: object, error: str, run: Path, began: bool = False) -> str:
    assert code == 2
    message = error[error.index("error: ") :].strip()
    assert "\n" not in message
    assert began or not run.exists()
    assert not (run / "model").exists()
    return message


def test_bad_input_gets_one_message(fails, tmp_path: Path, corpus: Path, micro_model: Path) -> None:
    ready = ("--init", micro_model, "--data", corpus)
    assert "the sizes are 125m" in fails("--size", "125mm", "--data", corpus)
    assert "neither a folder here nor" in fails("--init", micro_model, "--data", "/no/such/folder")
    (tmp_path / "empty").mkdir()
    assert "holds no shards" in fails("--init", micro_model, "--data", tmp_path / "empty")
    assert "not a whole number of rows" in fails(*ready, "--batch-tokens", "250")
    assert "cannot be shared evenly" in fails(*ready, "--loader.workers", "3")
    assert "is no device" in fails(*ready, "--device", "warp")
    assert "Did you mean --tokens" in fails(*ready, "--tokns", "5")
    assert "is no checkpoint" in fails(*ready, "--resume", tmp_path)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "train.jsonl").write_text('{"url": "u"}\n' * 500)
    assert "line 1 of train.jsonl has no field 'text'; its fields are: url" in fails(
        "--init", micro_model, "--data", tmp_path / "broken"
    )


def test_a_failed_start_leaves_other_files_of_the_folder_alone(fails, tmp_path: Path, micro_model: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".mine.tmp").write_text("precious")
    fails("--init", micro_model, "--data", "/no/such/folder", began=True)
    assert (tmp_path / "run" / ".mine.tmp").read_text() == "precious"


def test_a_process_that_fails_says_so_without_a_traceback(tmp_path: Path, micro_model: Path) -> None:
    folder = write_corpus(tmp_path / "data", [["one document", "and another"]], ["validation text"])
    words = (*MICRO, "--init", micro_model, "--data", folder, "--loader.streams", "8", "--loader.workers", "2")
    done = run_command("train.py", "--run", tmp_path / "run", *words)
    assert "Traceback" not in done.stderr + done.stdout
    assert "the corpus has too few for so many streams" in check_failure(done.returncode, done.stderr, tmp_path / "run")


def test_a_tokenizer_that_does_not_fit_is_refused(fails, tmp_path: Path, corpus: Path, micro_model: Path) -> None:
    words = [f"{first}{second}{third}" for first in WORDS for second in WORDS[:9] for third in ("ing", "ed")]
    larger = train_tokenizer([" ".join(words)], 700, tmp_path / "larger")
    assert larger.vocab_size == 700
    message = fails("--init", micro_model, "--data", corpus, "--tokenizer", larger.folder)
    assert "has 700 tokens, more than the 512 rows" in message
    assert "these weights need their own" in message


def test_a_corrupt_shard_is_named_and_can_be_passed_over(fails, tmp_path: Path, micro_model: Path) -> None:
    folder = write_corpus(tmp_path / "data", [["some words here"] * 100 for _ in range(2)], ["validation text"])
    shard = sorted((folder / "en").glob("c4-train*"))[1]
    shard.write_bytes(shard.read_bytes()[:-40])
    words = ("--init", micro_model, "--data", folder, "--tokens", "8k")
    message = fails(*words, began=True)
    assert shard.name in message
    assert "--skip-bad-shards" in message
    done = forked().run("train.py", "--run", tmp_path / "run", *MICRO, *words, "--skip-bad-shards")
    assert done.returncode == 0, done.stderr
    assert f"1 damaged shards passed over so far: {shard.name}" in done.stdout
    record = json.loads((tmp_path / "run" / "model" / "palmtop.json").read_text())
    assert record["damaged_shards_passed_over"] == [shard.name]


def test_no_room_on_the_disk_is_said_before_anything_is_written(
    fails, tmp_path: Path, corpus: Path, micro_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    assert "no room on the disk" in fails("--init", micro_model, "--data", corpus, began=True)
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_the_hub_out_of_reach_says_how_to_give_a_folder(tmp_path: Path, micro_model: Path) -> None:
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "PALMTOP_CACHE": str(tmp_path / "cache")}
    words = ("train.py", "--run", tmp_path / "run", *MICRO, "--init", micro_model, "--data", "c4")
    done = run_command(*words, environment=nowhere)
    assert "--data" in check_failure(done.returncode, done.stderr, tmp_path / "run")


def test_c4_trains_from_a_hub_and_fetches_nothing_twice(tmp_path: Path, micro_model: Path, corpus: Path) -> None:
    files = {f"en/{path.name}": path.read_bytes() for path in (corpus / "en").iterdir()}
    words = ["train.py", *MICRO, "--init", micro_model, "--data", "c4", "--run"]
    with FakeHub({"allenai/c4": {"README.md": C4_CARD, **files}}) as hub:
        python = Forked(hub.environment(tmp_path))
        for name in ("one", "two"):
            done = python.run(*words, tmp_path / name)
            assert done.returncode == 0, done.stderr
        served = {name: count for name, count in hub.served.items() if name.endswith(".json.gz")}
    done = python.run(*words, tmp_path / "offline")
    assert done.returncode == 0, done.stderr  # what was fetched serves without the hub
    assert losses(tmp_path / "offline") == losses(tmp_path / "one")
    assert len(served) >= 3
    assert all(count == len(files[name.removeprefix("allenai/c4/")]) for name, count in served.items())
    assert losses(tmp_path / "one") == losses(tmp_path / "two")


def losses(run: Path) -> list[float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


def test_one_run_folder_is_not_used_twice_at_once(fails, tmp_path: Path, corpus: Path, micro_model: Path) -> None:
    (tmp_path / "run").mkdir()
    with open(tmp_path / "run" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "in use by another process" in fails("--init", micro_model, "--data", corpus, began=True)


def test_the_door_works_from_anywhere(tmp_path: Path) -> None:
    done = run_command(ROOT / "train.py", "--help", folder=tmp_path)
    assert done.returncode == 0
