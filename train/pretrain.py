"""Pre-training: build the parts, then fit."""

import math
import os
import shutil
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from common.console import Console
from common.errors import UserError
from common.files import cache_folder, new_folder, require_space
from common.run_folder import RunFolder
from common.settings import to_dict, to_yaml
from data.loader import Loader, Order
from data.packing import Batch, make_batch
from data.prepared import PreparedSource
from data.sources import Corpus
from data.tokenizer import Tokenizer, bytes_per_token, find_tokenizer, sample_texts, train_tokenizer
from data.validation import read_held_out
from models import budget
from models.hf import read_state as read_weights
from models.hf_config import to_config
from models.sizes import ModelConfig
from models.transformer import Transformer
from train import checkpoint
from train.checkpoint import Checkpoints
from train.evaluate import continue_text, validate, write_samples
from train.loop import Progress, Training, fit
from train.model_folder import write_model_folder
from train.optimizer import make_optimizer
from train.resume import Origin, adopt_stored, find_origin
from train.schedule import Schedule
from train.settings import TrainSettings, model_config, resolve, run_folder

TOKENIZER_SAMPLE = 50_000_000
"""Bytes of text that the run's own tokenizer is trained on."""

Known = TypeVar("Known")


@dataclass
class PackedRows:
    """The loader's rows as the loop takes them."""

    loader: Loader
    end: int

    def take(self, rows: int) -> Batch:
        """This rank's share of the next rows."""
        return make_batch(self.loader.take(rows), self.end)

    def state(self) -> dict[str, Any]:
        """The loader's state."""
        return self.loader.state()


def pretrain(settings: TrainSettings) -> signal.Signals | None:
    """Train a model from text; returns the signal that stopped it, or None when it is finished.

    Raises:
        UserError: anything that the user can put right.
    """
    run = RunFolder(run_folder(settings))
    new = not run.path.exists()
    try:
        with run.claimed():
            return _pretrain(settings, run, Console())
    except UserError:
        if new and not Checkpoints(run.checkpoints, keep=1).steps():
            shutil.rmtree(run.path)  # nothing came of it
        raise


def _pretrain(settings: TrainSettings, run: RunFolder, console: Console) -> signal.Signals | None:
    # Settings, and where the weights come from
    settings = adopt_stored(settings, run)
    config = model_config(settings)
    settings = replace(resolve(settings, config), precision=_precision(settings))
    origin = find_origin(settings, run, console.warn)
    _check_room(config, run)
    console.settings(f"run {run.path}", to_dict(settings))

    # Data
    corpus = Corpus.open(settings.data)
    run.begin(to_yaml(settings))
    tokenizer = _tokenizer(settings, config, corpus, run, origin, console)

    # Model
    fabric = _fabric(settings)
    raw = Transformer(config, settings.seed)
    if settings.compile == "on" or (settings.compile == "auto" and fabric.device.type == "cuda"):
        raw.compile_parts()
    model = fabric.setup_module(raw)
    plain_optimizer = make_optimizer(raw, settings.optimizer)
    optimizer = fabric.setup_optimizers(plain_optimizer)
    state = _restore(origin, raw, plain_optimizer, run, console)
    progress = Progress(state.get("step", 0), state.get("tokens", 0))

    # What the loop calls
    batch_tokens, seq_len, tokens = known(settings.batch_tokens), known(settings.seq_len), known(settings.tokens)
    rows = batch_tokens // seq_len
    micro_rows = settings.micro_batch or _micro_rows(config, rows, seq_len, fabric.device)
    workers = _workers(settings, corpus, fabric.device)
    order = Order(corpus, tokenizer.folder, seq_len, settings.loader.streams, settings.seed, settings.skip_bad_shards)
    evaluate = _evaluator(settings, config, corpus, tokenizer, model, fabric.device, run, console, micro_rows)
    loader = Loader(order, workers=workers, state=state.get("loader"))
    checkpoints = Checkpoints(run.checkpoints, settings.checkpoint.keep, settings.keep_every)

    def objective(module: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        loss, nll = module(batch["inputs"], batch["positions"], batch["targets"], settings.model.z_loss)
        return loss, nll

    def save(at: Progress) -> None:
        values = {"tokens": at.tokens, "loader": loader.state(), "settings": to_dict(settings)}
        shape = to_config(config, bos=tokenizer.begin, eos=tokenizer.end, pad=tokenizer.pad)
        checkpoints.save(at.step, checkpoint.training_tensors(raw, plain_optimizer), values, shape)
        if loader.bad_shards:
            names = ", ".join(sorted(loader.bad_shards))
            console.warn(f"{len(loader.bad_shards)} damaged shards passed over so far: {names}")

    peak = budget.peak_flops(torch.cuda.get_device_name(fabric.device)) if fabric.device.type == "cuda" else None
    flops = budget.flops_per_token(config, seq_len)
    training = Training(
        fabric=fabric,
        model=model,
        optimizer=optimizer,
        batches=PackedRows(loader, tokenizer.end),
        objective=objective,
        rate=Schedule.of(settings).rate,
        run=run,
        console=console,
        tokens=tokens,
        rows=rows,
        micro_rows=micro_rows,
        seq_len=seq_len,
        clip=settings.optimizer.clip,
        log_every=settings.log.every,
        evaluate=evaluate,
        evaluate_every=max(1, round(settings.eval.every / batch_tokens)) if settings.eval.every else 0,
        save=save,
        save_every=known(settings.checkpoint.every),
        keep_every=settings.keep_every,
        flops_per_token=flops,
        peak_flops=peak,
        progress=progress,
    )
    console.table(
        "",
        {
            "parameters": f"{budget.parameters(config).total:,}",
            "data": ", ".join(f"{s.name} ({len(s.train)} shards, {w:.0%})" for s, w in _weighted(corpus)),
            "batch": f"{batch_tokens:,} tokens = {rows} rows of {seq_len}, {micro_rows} a forward pass",
            "steps": f"{math.ceil(tokens / batch_tokens):,}, starting after {progress.step:,}",
            "device": f"{_device_name(fabric.device)}, {settings.precision}, {workers} data workers",
            "FLOPs per token": f"{flops / 1e6:,.0f} M = 6·(parameters without input embedding) + 12·L·H·N·T; "
            + (f"MFU against {peak / 1e12:,.0f} TFLOP/s dense bf16" if peak else "no peak is known, so no MFU"),
        },
    )

    # Train
    run.start_metrics(progress.step, progress.tokens, tensorboard=settings.log.tensorboard)
    try:
        stopped = fit(training)
    finally:
        loader.close()
        run.close()
    bad_shards = sorted(loader.bad_shards)
    write_model_folder(run.model, raw, config, tokenizer, settings, corpus, progress.step, progress.tokens, bad_shards)
    if stopped is None:
        console.say(f"trained on {progress.tokens:,} tokens in {progress.step:,} steps")
        console.say(f"model: {run.model}\nlook:  tensorboard --logdir {run.path}")
    else:
        console.say(f"stopped by {stopped.name} after step {progress.step:,}; the same command goes on from there")
    return stopped


def known(value: Known | None) -> Known:
    """A setting that resolving has filled in."""
    assert value is not None
    return value


def _weighted(corpus: Corpus) -> list[tuple[Any, float]]:
    return list(zip(corpus.sources, corpus.weights, strict=True))


def _precision(settings: TrainSettings) -> Any:
    """32 or bf16: bf16 where the device has instructions for it, for elsewhere it is slower than fp32."""
    if settings.precision != "auto":
        return settings.precision
    if _device(settings).type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "32"
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "32"
    return "bf16" if "avx512_bf16" in flags or "amx_bf16" in flags else "32"


def _device(settings: TrainSettings) -> torch.device:
    available = torch.cuda.device_count()
    name = settings.device if settings.device != "auto" else ("cuda" if available else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name} is no device; use auto, cpu, cuda or cuda:0") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name} is not supported; use auto, cpu, cuda or cuda:0")
    if device.type == "cuda" and (device.index or 0) >= available:
        raise UserError(f"--device {name} is not there: torch sees {available} CUDA devices")
    return device


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def _fabric(settings: TrainSettings) -> Fabric:
    if settings.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS may choose another sum
        torch.use_deterministic_algorithms(True)
    device = _device(settings)
    return Fabric(
        accelerator=device.type,
        devices=[device.index or 0] if device.type == "cuda" else 1,
        precision="bf16-mixed" if settings.precision == "bf16" else "32-true",
    )


def _check_room(config: ModelConfig, run: RunFolder) -> None:
    """Two checkpoints (weights and two moments in fp32) and the model folder must fit on the disk."""
    require_space(run.path, 28 * budget.parameters(config).total, "this run (two checkpoints and the model)")


def _tokenizer(
    settings: TrainSettings, config: ModelConfig, corpus: Corpus, run: RunFolder, origin: Origin, console: Console
) -> Tokenizer:
    """The run's tokenizer: its own from before, the prepared data's, the given one, or a new one."""
    if (run.tokenizer / "tokenizer.json").exists():
        return Tokenizer(run.tokenizer)
    given = find_tokenizer(settings.tokenizer, cache_folder()) if settings.tokenizer else origin.tokenizer
    for source in corpus.sources:
        if isinstance(source, PreparedSource):
            prepared = Tokenizer(source.tokenizer)
            if given is not None and prepared.digest != given.digest:
                raise UserError(
                    f"{source.name} was prepared with another tokenizer than {given.folder}; "
                    "leave --tokenizer out, or prepare the data with it"
                )
            given = prepared
    if given is None:
        console.say(f"training a tokenizer of {config.vocab:,} tokens on {TOKENIZER_SAMPLE / 1e6:.0f} MB of the corpus")
        texts = list(sample_texts(corpus, TOKENIZER_SAMPLE))
        given = train_tokenizer(texts, config.vocab, run.tokenizer)
        for language, (rate, on) in bytes_per_token(given, texts[:: len(texts) // 1000 + 1]).items():
            console.say(f"{rate:.2f} bytes a token in {language} ({on})")
    if given.vocab_size > config.vocab:
        raise UserError(
            f"the tokenizer in {given.folder} has {given.vocab_size:,} tokens, more than the {config.vocab:,} rows "
            f"of the model's embedding; use --model.vocab {-(-given.vocab_size // 64) * 64}"
        )
    _ = given.end  # says so now when the tokenizer has no end token
    if given.folder != run.tokenizer:
        with new_folder(run.tokenizer) as folder:
            given.copy_to(folder)
    return Tokenizer(run.tokenizer)


def _restore(
    origin: Origin, raw: Transformer, optimizer: torch.optim.Optimizer, run: RunFolder, console: Console
) -> dict[str, Any]:
    """Load what the run starts from; returns the state to go on with, empty for a new run."""
    if origin.checkpoint is not None:
        state = checkpoint.load(origin.checkpoint, raw, optimizer)
        Checkpoints(run.checkpoints, keep=1).set_aside_after(state["step"])
        run.rewind(state["step"])
        console.say(f"going on from {origin.checkpoint}")
        return state
    run.rewind(-1)
    if origin.init is not None:
        if (origin.init / "state.json").exists():
            checkpoint.load(origin.init, raw, None)
        else:
            raw.load_state_dict(read_weights(origin.init, raw.config))
        console.say(f"starting from the weights of {origin.init}")
    return {}


def _micro_rows(config: ModelConfig, rows: int, seq_len: int, device: torch.device) -> int:
    """The most rows a forward pass that divide the batch and fit the device.

    On a CPU more than about 4,096 tokens gain nothing and leave the caches; on a GPU the activations may
    take 70% of what weights, gradients and moments leave.
    """
    divisors = [count for count in range(1, rows + 1) if rows % count == 0]
    if device.type == "cuda":
        room = 0.7 * (torch.cuda.mem_get_info(device)[0] - budget.training_bytes(config))
        fitting = [n for n in divisors if budget.activation_bytes(config, n, seq_len, 2) <= room]
    else:
        fitting = [n for n in divisors if n * seq_len <= 4096]
    return max(fitting, default=1)


def _workers(settings: TrainSettings, corpus: Corpus, device: torch.device) -> int:
    """As asked for; by default none on a CPU, whose cores the model needs, and none for prepared data."""
    if settings.loader.workers is not None:
        return settings.loader.workers
    if device.type == "cpu" or all(isinstance(source, PreparedSource) for source in corpus.sources):
        return 0
    wanted = min(4, max(1, (os.cpu_count() or 1) - 1))
    return max(count for count in range(1, wanted + 1) if settings.loader.streams % count == 0)


def _evaluator(
    settings: TrainSettings,
    config: ModelConfig,
    corpus: Corpus,
    tokenizer: Tokenizer,
    model: nn.Module,
    device: torch.device,
    run: RunFolder,
    console: Console,
    rows: int,
) -> Any:
    """The function that the loop calls to evaluate; reads the held-out text now, so that a lack shows at once."""
    if not settings.eval.every:
        return lambda step: {}
    seq_len = known(settings.seq_len)
    held_out = [read_held_out(source, tokenizer, seq_len, settings.eval.tokens) for source in corpus.sources]

    def evaluate(step: int) -> dict[str, float]:
        figures = validate(model, held_out, corpus.weights, tokenizer.end, rows, device)
        if settings.eval.continuation:
            length = settings.eval.continuation
            with torch.compiler.set_stance("force_eager"):  # each length would be compiled anew
                samples = {
                    prompt: continue_text(model, tokenizer, prompt, length, config.context, device, settings.seed)
                    for prompt in settings.eval.prompts
                }
            write_samples(run, step, samples)
            prompt, text = next(iter(samples.items()), ("", ""))
            console.say(f"  {prompt}{text}".replace("\n", " "))
        return figures

    return evaluate
