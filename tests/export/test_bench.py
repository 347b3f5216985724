"""What the bench says: its figures from known timings, and a run of the whole."""

import json
from pathlib import Path

import pytest

from common.errors import UserError
from export import bench, library
from export.check import check
from export.settings import BenchCommand, MlcSettings
from export.shards import write_weights
from export.timing import measure
from tests.export.conftest import Folder


class Clock:
    """A reader that takes 10 ms for a token of a prompt, and 20 ms for one after it, by a clock of its own."""

    vocab, context = 7, 40

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import numpy as np

        self.now, self.resets, self.logits = 0.0, 0, np.eye(7)[3]
        monkeypatch.setattr("time.perf_counter", lambda: self.now)

    def reset(self) -> None:
        self.resets += 1

    def prefill(self, ids):
        assert all(0 <= token < self.vocab for token in ids)
        self.now += 0.01 * len(ids)
        return self.logits

    def decode(self, token: int):
        assert token == 3
        self.now += 0.02
        return self.logits


def test_figures_of_a_known_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    found = measure(clock, [5, 100, 200], new_tokens=8, repeats=3, warm_up=1)
    assert [run["tokens"] for run in found["runs"]] == [5, 32]  # prompt and new tokens fit into the context
    assert clock.resets == 2 * 4
    one = bench.measurement("ours", 1, found, bandwidth=2e9, read=10**7)
    assert one.prompts[1].prefill.median == pytest.approx(100)
    assert one.prompts[1].decode.median == pytest.approx(50)
    assert one.prompts[1].first_token.median == pytest.approx(0.32)
    assert one.bandwidth_share == pytest.approx(0.25)
    assert "32: prefill 100.0 (100.0-100.0), decode 50.0" in bench.line(one)
    assert "25% of the bandwidth" in bench.line(one)


@pytest.mark.parametrize(
    ("prompt", "new", "lengths"),
    [(5, 8, (5, 8)), (100, 8, (32, 8)), (5, 30, (5, 30)), (100, 40, (20, 20)), (5, 128, (5, 35)), (30, 128, (20, 20))],
)
def test_a_short_context_holds_a_prompt_and_what_follows(
    prompt: int, new: int, lengths: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    (run,) = measure(clock, [prompt], new, repeats=1, warm_up=0)["runs"]
    assert (run["tokens"], round((clock.now - run["first_token"][0]) / 0.02)) == lengths
    assert run["decode"] == pytest.approx([50])


def test_a_bench_of_the_whole(
    folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "TORCH", {"torch bf16": "bfloat16"})  # a process for each: one shows what three would
    model, out = folder("llama", num_hidden_layers=1, tie_word_embeddings=False), tmp_path / "export"
    for name in ("mlc", "lib"):
        (out / name).mkdir(parents=True)
    write_weights(model, out / "mlc", lambda done, total: None)
    values = check(model, MlcSettings(context=64)).values
    library.build(values, "host", "f16", out / "lib", context=64)
    (out / "config.json").write_text(json.dumps(values))
    (out / "export.json").write_text(json.dumps({"context": 64, "dtype": "f16"}))
    bench.bench_command(BenchCommand(folder=str(out), prompts=[8, 16], new_tokens=128, repeats=2, threads=[1]))
    found = json.loads((out / bench.FILE).read_text())["measurements"]
    assert [one["engine"] for one in found] == ["ours", *bench.TORCH]
    assert all(prompt["decode"]["median"] > 0 for one in found for prompt in one["prompts"])
    assert found[0]["bandwidth_share"] > 0
    assert found[1]["bandwidth_share"] is None
    assert found[0]["peak_memory"] != found[1]["peak_memory"]
    assert "next: python -m export phone" in capsys.readouterr().out
    whole = sum(one.stat().st_size for one in (out / "mlc").glob("params_shard_*.bin"))
    assert bench.read_by_decoding(out, "f16") == whole - 2 * values["vocab_size"] * values["hidden_size"]
    (out / "mlc" / "tensor-cache.json").write_text('{"records": []}')
    with pytest.raises(UserError, match=r"^a measurement failed: .* do not belong together: [^\n]*$"):
        bench.ask("library", out, 1)


def test_what_cannot_be_measured(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no exported folder"):
        bench.read_export(tmp_path)
    (tmp_path / "export.json").write_text("{}")
    with pytest.raises(UserError, match="holds no library for this machine"):
        bench.read_export(tmp_path)
    with pytest.raises(UserError, match="a measurement failed: .*SystemExit|a measurement failed"):
        bench.run_child(["-c", "raise SystemExit('no')"], 1)
    with pytest.raises(UserError, match="killed, most likely for its memory"):
        bench.run_child(["-c", "import os; os.kill(os.getpid(), 9)"], 1)
