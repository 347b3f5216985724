import json
import math
import re
from pathlib import Path

import pytest

from bench import learning
from bench.learning import Comparison, Curve, Task, best_rate, known_size
from common.errors import UserError
from data.prepare import prepare
from data.settings import Mix
from data.sources import TextSource, open_source
from models import sizes


@pytest.fixture(autouse=True)
def _own_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "SIZES", dict(sizes.SIZES))


@pytest.fixture(scope="module")
def prepared(corpus: Path, tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = open_source(str(corpus))
    assert isinstance(source, TextSource)
    folder = tmp_path_factory.mktemp("learning") / "prepared"
    list(prepare(source, tokenizer, folder, workers=0))
    return folder


def curve(*points: tuple[int, float]) -> Curve:
    return Curve([tokens for tokens, _ in points], {"": [loss for _, loss in points]})


def test_the_tokens_to_a_loss_are_interpolated() -> None:
    falls = curve((100, 5.0), (200, 4.0), (300, 3.5))
    assert falls.reaches(4.25) == 175
    assert falls.reaches(3.5) == 300
    assert falls.reaches(6.0) == 100
    assert falls.reaches(3.4) is None


def test_a_comparison_by_hand() -> None:
    adamw = curve((100, 5.0), (200, 4.0))
    one = Comparison(0, adamw, curve((100, 4.5), (200, 3.5)))
    assert one.tokens == pytest.approx(150 / 200)
    assert one.perplexity() == pytest.approx(math.exp(-0.5))
    assert Comparison(0, adamw, curve((100, 6.0), (200, 5.0))).tokens == math.inf


def test_the_best_rate_is_a_parabolas_lowest_point() -> None:
    rates = [1e-3, 2e-3, 5e-3, 1e-2]
    losses = [3 + math.log(rate / 3e-3) ** 2 for rate in rates]
    assert best_rate(rates, losses) == pytest.approx(3e-3)
    assert best_rate(rates, [4, 3, 2, 1]) == 1e-2
    assert best_rate(rates, [1, 2, 3, 4]) == 1e-3


def test_an_evaluation_that_was_made_twice_counts_once(tmp_path: Path) -> None:
    records = [{"step": 1, "tokens": 64, "loss": 5.0}]
    records += [{"tokens": 64, "val/loss": 4.0, "val/loss/a": 3.0}, {"tokens": 128, "val/loss": 3.0, "val/loss/a": 2.0}]
    records += [{"tokens": 64, "val/loss": 4.5, "val/loss/a": 3.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    read = Curve.read(tmp_path)
    assert read == Curve([64, 128], {"": [4.5, 3.0], "a": [3.5, 2.0]})
    assert read.last("a") == 2.0


def test_a_size_by_its_layers_and_width() -> None:
    config = known_size("3x192")
    assert (config.layers, config.width, config.heads, config.kv_heads, config.ffn) == (3, 192, 6, 3, 512)
    assert sizes.size("3x192").config == config
    assert known_size("tiny") == sizes.size("tiny").config
    for name in ("3x100", "0x64", "4x0"):
        with pytest.raises(UserError, match=f"{name} needs a layer and a width that is a multiple of 64"):
            known_size(name)
    with pytest.raises(UserError, match="no size is called '4by128'"):
        known_size("4by128")


def test_the_recipes_are_what_they_say() -> None:
    known_size("4x128")
    task = Task(Mix.parse("sample"), 100_000, 2_048, 128, 512, Path("out"), ())
    galore, adamw, default = (task.settings(recipe, "4x128") for recipe in ("galore", "adamw", "default"))
    for settings, beta2, clip in ((galore, 0.999, 0.0), (adamw, 0.95, 1.0)):
        given, schedule = settings.optimizer, settings.schedule
        assert (given.name, given.beta1, given.beta2, given.weight_decay) == ("adamw", 0.9, beta2, 0.0)
        assert given.clip == clip
        assert (schedule.name, schedule.warmup, schedule.final) == ("cosine", 10_000, 0.1)
    assert (default.optimizer.name, default.schedule.name) == ("muon", "wsd")
    for settings in (galore, adamw, default):
        assert (settings.tokens, settings.batch_tokens, settings.seq_len) == (100_000, 2_048, 128)


def main(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr("sys.argv", ["learning.py", *map(str, words)])
    learning.main()


def test_both_are_trained_and_compared(prepared: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    small = ("--data", prepared, "--tokens", "4k", "--batch-tokens", "512", "--seq-len", "64", "--device", "cpu")
    small += ("--out", tmp_path, "--eval.tokens", "1000", "--loader.streams", "8")
    main(monkeypatch, "compare", *small, "--size", "1x64", "--baseline-lr", "3e-3", "--rounds", "1", "--share", "0.5")
    said = capsys.readouterr().out
    ends = {}
    for name in ("adamw", "default"):
        (run,) = tmp_path.glob(f"{name}-1x64-4000-lr-*-seed-0")
        ends[name] = Curve.read(run).last()
    assert f"seed 0: AdamW {ends['adamw']:.4f}, default {ends['default']:.4f}" in said
    ratio = re.search(r"perplexity at equal tokens, ratio +([0-9.]+)", said)
    assert ratio is not None
    assert float(ratio[1]) == pytest.approx(math.exp(ends["default"] - ends["adamw"]), abs=1e-3)
    assert "tokens to AdamW's last loss" in said
    (shorter,) = tmp_path.glob("default-1x64-2000-lr-*-seed-0")
    ratio = re.search(r"perplexity with 0.5 of the tokens, ratio \(time [0-9.]+\) +([0-9.]+)", said)
    assert ratio is not None
    assert float(ratio[1]) == pytest.approx(math.exp(Curve.read(shorter).last() - ends["adamw"]), abs=1e-3)


def test_text_is_refused_with_the_command_that_prepares_it(corpus: Path, monkeypatch, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main(monkeypatch, "sweep", "--data", corpus, "--recipe", "adamw", "--times", "1")
    assert ended.value.code == 2
    assert "python -m data prepare --data" in capsys.readouterr().err
