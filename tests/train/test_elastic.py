"""A run that is killed and goes on with other numbers of ranks, and other strategies, sees the same batches."""

import json
from pathlib import Path

import pytest

from tests.conftest import kill_and_resume

STEPS = 30
ROWS = 16
RUN = f"""
--tokens {STEPS * ROWS * 32} --batch-tokens {ROWS * 32} --seq-len 32 --device cpu --precision 32 --optimizer.lr 1e-3
--schedule.warmup {10 * ROWS * 32} --schedule.decay 0 --checkpoint.every 3 --log.every 1
--eval.every {3 * ROWS * 32} --eval.tokens 300 --eval.continuation 2
--log.tensorboard false --loader.streams 8 --micro-batch 4
""".split()


def losses(folder: Path) -> list[float]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


def rows_seen(folder: Path) -> dict[int, str]:
    """Every row of the run by its number, hashed; the same row is the same in every attempt that took it."""
    seen: dict[int, str] = {}
    for path in sorted(folder.iterdir()):
        for line in path.read_text().splitlines():
            first, rank, world, hashes = json.loads(line)
            numbers = range(first + (rank - first) % world, first + ROWS, world)
            for number, found in zip(numbers, hashes, strict=True):
                assert seen.setdefault(number, found) == found
    return seen


def train(folder: Path, corpus: Path, model: Path, attempts: list[dict]) -> list[dict]:
    (folder / "rows").mkdir(parents=True)
    words = [*RUN, "--data", str(corpus), "--init", str(model)]
    attempts = [{"run": str(folder / "run")} | attempt for attempt in attempts]
    return kill_and_resume({"argv": words, "attempts": attempts, "rows": str(folder / "rows")})


@pytest.fixture(scope="module")
def uninterrupted(corpus: Path, micro_model: Path, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("whole")
    train(folder, corpus, micro_model, [{"argv": []}])
    assert len(losses(folder / "run")) == STEPS
    return losses(folder / "run"), rows_seen(folder / "rows")


def killed(step: int, world: int, strategy: str) -> dict:
    return {"step": step, "signal": "SIGKILL", "world": world, "argv": ["--strategy", strategy]}


ATTEMPTS = {
    "ddp": [killed(8, 2, "ddp"), killed(15, 1, "ddp"), killed(22, 4, "ddp")],
    "mixed": [killed(6, 2, "ddp"), killed(11, 2, "deepspeed-3"), killed(17, 4, "fsdp"), killed(22, 1, "fsdp"),
              killed(26, 2, "deepspeed-2")],
}  # fmt: skip


@pytest.mark.parametrize("name", list(ATTEMPTS))
def test_other_numbers_of_ranks_see_the_same_batches(name, uninterrupted, corpus, micro_model, tmp_path) -> None:
    last = {"argv": ["--strategy", "ddp" if name == "ddp" else "fsdp"], "world": 2}
    ends = train(tmp_path, corpus, micro_model, [*ATTEMPTS[name], last])
    assert [end["codes"] for end in ends[:-1]] == [[-9] * attempt["world"] for attempt in ATTEMPTS[name]]
    assert ends[-1]["codes"] == [0, 0], ends[-1]["log"][-3000:]
    expected, rows = uninterrupted
    assert rows_seen(tmp_path / "rows") == rows
    assert losses(tmp_path / "run") == pytest.approx(expected, rel=1e-5)


def test_a_rank_killed_while_a_shard_is_written_costs_nothing(uninterrupted, corpus, micro_model, tmp_path) -> None:
    moments = [(0, 3), (1, 1), (0, 9), (1, 2), (0, 14), (0, 20)]
    attempts = [{"rank": rank, "operation": at, "world": 2, "argv": ["--strategy", "fsdp"]} for rank, at in moments]
    ends = train(tmp_path, corpus, micro_model, [*attempts, {"world": 2, "argv": ["--strategy", "fsdp"]}])
    assert all(end["codes"][rank] == -9 for end, (rank, _) in zip(ends, moments, strict=False))
    assert ends[-1]["codes"] == [0, 0], ends[-1]["log"][-3000:]
    expected, rows = uninterrupted
    assert rows_seen(tmp_path / "rows") == rows
    assert losses(tmp_path / "run") == pytest.approx(expected, rel=1e-5)
