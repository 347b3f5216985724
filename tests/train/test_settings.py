import datetime
from pathlib import Path

import pytest

from common.errors import UserError
from common.settings import Count, parse
from data.settings import LoaderSettings
from train.settings import TrainCommand, TrainSettings, default_batch_tokens, model_config, resolve, run_name, run_path


def read(*words: str) -> TrainSettings:
    settings = parse(TrainSettings, words, prog="train.py", description="")
    return resolve(settings, model_config(settings))


def test_defaults_follow_from_the_size() -> None:
    settings = read("--size", "125m")
    assert settings.tokens == 20 * 125_081_664
    assert settings.seq_len == 2048
    assert settings.batch_tokens == 2**18
    assert settings.schedule.decay == int(0.6 * settings.tokens)
    assert settings.optimizer.name == "muon"
    assert settings.optimizer.lr == pytest.approx(0.2 / 576 ** (2 / 3))
    assert None not in (settings.run, settings.model.vocab, settings.checkpoint.every, settings.eval.every)


def test_muon_trains_new_weights_and_adamw_the_others(micro_model: Path) -> None:
    for words in (("--init", str(micro_model)), ("--size", "125m", "--strategy", "deepspeed-2")):
        assert read(*words).optimizer.name == "adamw"
    adamw = read("--size", "125m", "--optimizer.name", "adamw").optimizer
    assert (adamw.name, adamw.lr) == ("adamw", pytest.approx(1e-3 * 768 / 576))
    assert read("--size", "125m", "--optimizer.lr", "2e-3").optimizer.lr == 2e-3


def test_smaller_batches_than_the_default_have_smaller_steps_and_a_longer_mean() -> None:
    usual, quarter, larger = (
        read("--size", "125m", "--batch-tokens", str(tokens)).optimizer for tokens in (2**18, 2**16, 2**19)
    )
    assert usual == larger == read("--size", "125m").optimizer
    assert usual.beta2 == 0.95
    assert quarter.lr == pytest.approx(usual.lr / 2)
    assert quarter.beta2**4 == pytest.approx(0.95)
    adamw = read("--size", "125m", "--batch-tokens", str(2**16), "--optimizer.name", "adamw").optimizer
    assert (adamw.lr, adamw.beta2) == (pytest.approx(1e-3 * 768 / 576), 0.95)


def test_the_batch_grows_with_the_root_of_the_budget() -> None:
    sizes = [default_batch_tokens(tokens) for tokens in (10**6, 10**8, 25 * 10**8, 10**10, 10**13)]
    assert sizes == [2**12, 2**16, 2**18, 2**19, 2**20]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--size 1bb", "the sizes are 1b, "),
        ("--size tiny --seq-len 100 --batch-tokens 250", "not a whole number of rows of 100 tokens; use 200 or 300"),
        (
            "--size tiny --batch-tokens 1024 --micro-batch 3",
            "--micro-batch 3 does not divide the 4 rows of each device; use 2",
        ),
        ("--size tiny --tokens 0", "--tokens must be at least 1"),
        ("--checkpoint.keep 0", "--checkpoint.keep"),
        ("--log.every 0", "--log.every must be at least 1"),
        ("--optimizer.beta1 2", "below 1, not 2"),
        ("--size tiny --tokens 1M --schedule.warmup 1B", "do not fit into the run"),
        (
            "--size tiny --tokens 1M --schedule.warmup 500k --schedule.decay 600k",
            "the decay of 600,000",
        ),
        ("--schedule.final -1", "from 0 to 1"),
        ("--checkpoint.minutes -1", "must be positive"),
        ("--deepspeed-config some.json", "belongs to --strategy deepspeed-2"),
        ("--model.z-loss -1", "not be negative"),
        ("--model.vocab 0", "--model.vocab must be at least 1"),
        ("--eval.scores quick@every=1M --eval.every 0", "of which --eval.every 0 has none"),
        ("--init /no/such/model", "no model folder"),
        ("--data a=1,a=2", "stands twice"),
    ],
)
def test_settings_that_do_not_fit_are_refused_with_numbers(words: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(*words.split())


def test_init_decides_the_shape(micro_model: Path) -> None:
    assert model_config(parse(TrainSettings, ["--init", str(micro_model)], prog="", description="")).width == 32
    with pytest.raises(UserError, match="but --size tiny is"):
        read("--init", str(micro_model), "--size", "tiny")


def test_the_same_command_goes_on_after_midnight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    today = f"1b-{datetime.date.today()}"
    for name in ("1b-2026-01-01", "1b-2026-01-02", "1b-2026-01-02-101112", "11b-2026-01-03"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.yaml").touch()
    assert run_name(TrainSettings(size="1b")) == "1b-2026-01-02"
    (tmp_path / "runs" / "1b-2026-01-02" / "model").mkdir()
    assert run_name(TrainSettings(size="1b")) == today  # the last one is finished
    assert run_name(TrainSettings(size="tiny")) == f"tiny-{datetime.date.today()}"


def test_a_run_is_named_or_placed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_path("mine") == Path("runs/mine")
    assert run_path("./mine") == Path("mine")
    assert run_path("a/b") == Path("a/b")
    assert run_path(".") == Path(".")
    assert run_path("/a/b") == Path("/a/b")
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    assert run_path(run_name(TrainSettings(size="1b"))) == Path("runs/1b-4711")


def test_seq_len_beyond_the_size_extends_the_context() -> None:
    settings = parse(TrainSettings, ["--size", "tiny", "--seq-len", "512"], prog="", description="")
    assert model_config(settings).context == 512
    assert resolve(settings, model_config(settings)).seq_len == Count(512)


def test_what_only_a_plan_understands_is_refused_without_one() -> None:
    with pytest.raises(ValueError, match="--gpu belongs to --plan"):
        TrainCommand(gpu="h100-80g")


@pytest.mark.parametrize(
    ("words", "message"),
    [("--slurm nodes=2,gpus=8", "--plan takes --nodes and --devices"), ("--price -3", "--price must not be negative")],
)
def test_a_plan_of_nothing_is_refused(words: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(TrainCommand, ["--plan", *words.split()], prog="", description="")


def test_devices_must_share_the_batch() -> None:
    settings = TrainSettings(size="tiny", batch_tokens=Count(6 * 256), loader=LoaderSettings(streams=12))
    assert resolve(settings, model_config(settings), world=3).batch_tokens == 6 * 256
    with pytest.raises(
        UserError, match="6 rows of 256, which 4 devices cannot share evenly; .*--batch-tokens 1024 or 2048"
    ):
        resolve(settings, model_config(settings), world=4)
    settings.micro_batch = 2
    with pytest.raises(UserError, match="--micro-batch 2 does not divide the 3 rows of each device; use 1"):
        resolve(settings, model_config(settings), world=2)


def test_devices_and_workers_must_share_the_streams() -> None:
    settings = TrainSettings(size="tiny", batch_tokens=Count(6 * 256))
    with pytest.raises(UserError, match="64 streams cannot be shared evenly by 3 devices; .* --loader.streams 66"):
        resolve(settings, model_config(settings), world=3)
    settings.loader.workers = 3
    with pytest.raises(UserError, match="by 2 devices with 3 workers each"):
        resolve(settings, model_config(settings), world=2)


def test_the_default_batch_is_one_that_the_devices_can_share() -> None:
    settings = TrainSettings(size="tiny", loader=LoaderSettings(streams=66))
    batch = resolve(settings, model_config(settings), world=6).batch_tokens
    assert batch is not None
    assert batch % (6 * 256) == 0


def test_a_recovery_of_next_to_no_tokens_has_a_batch(micro_model: Path) -> None:
    settings = read("--init", str(micro_model), "--teacher", str(micro_model), "--tokens", "100", "--seq-len", "32")
    assert settings.batch_tokens == 32


def test_the_decay_leaves_room_for_the_warm_up() -> None:
    schedule = read("--size", "tiny", "--tokens", "1M", "--schedule.warmup", "500k").schedule
    assert (schedule.warmup, schedule.decay) == (500_000, 500_000)
