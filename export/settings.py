"""What ``python -m export`` can be told. Imports neither torch nor tvm: ``--help`` reads this module."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.settings import Count, option
from models.folder import check_model, check_out

FILE = "export.json"
"""In the exported folder: what was made from what."""

TARGETS = ("host", "android-cpu", "android-opencl")

CONTEXT = 2048
"""Tokens in the KV cache by default: what MLC-LLM's own Android app gives small models."""


@dataclass
class MlcSettings:
    """The MLC folder."""

    context: Count | None = None
    """Tokens in the KV cache. Default: 2,048, or the model's context where that is shorter."""
    prefill_chunk: Count = option(Count(128))
    """Tokens of a prompt that go through the model at one time: they decide the memory of its buffers."""

    def __post_init__(self) -> None:
        for name in ("context", "prefill_chunk"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {value}")


@dataclass
class ExportCommand(MlcSettings):
    """The model, where it goes, and what is made of it."""

    model: str | None = None
    """Model folder to export; it stays as it is."""
    out: str | None = None
    """Folder to write. Default: export/ beside a run's model, else the model's name with -export, beside it."""
    target: str = "host"
    """What libraries are compiled for: host, android-cpu (aarch64), android-opencl (objects for MLC-LLM's app);
    several with commas. Parity needs host."""
    dtype: Literal["f16", "f32"] = "f16"
    """Of the libraries' weights. f16: fp16 weights, sums in fp32; f32: all in fp32."""
    parity: Literal["check", "skip"] = "check"
    """Compare the host library with transformers in fp32; skip where this machine's memory does not hold that."""
    with_mlc: bool = False
    """Run MLC-LLM as well, where it is installed: convert, compile and package for Android, and compare."""
    mlc_source: str | None = None
    """With --with-mlc: checkout of MLC-LLM, which packaging needs. Default: the environment's MLC_LLM_SOURCE_DIR."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model is None:
            raise ValueError("give the model folder to export: python -m export MODEL")
        unknown = [name for name in self.targets if name not in TARGETS]
        if unknown or not self.targets:
            raise ValueError(f"--target {self.target} is none; there are {', '.join(TARGETS)}")
        if self.parity == "check" and "host" not in self.targets:
            raise ValueError("parity is checked with the host library: add host to --target, or give --parity skip")
        if self.mlc_source is not None and not self.with_mlc:
            raise ValueError("--mlc-source belongs to --with-mlc")

    @property
    def targets(self) -> list[str]:
        """What is compiled for, each once."""
        return list(dict.fromkeys(name.strip() for name in self.target.split(",") if name.strip()))


@dataclass
class ProtocolSettings:
    """What is measured, here and on a phone alike."""

    prompts: list[int] = option([64, 512, 2000])
    """Tokens of the prompts whose prefill is timed; those beyond the context are cut to it."""
    new_tokens: int = 128
    """Tokens to decode after each prompt; as many as a short context holds beside it."""
    repeats: int = 5
    """Timed runs of each kind; medians and quartiles are reported."""
    warm_up: int = 1
    """Runs before the first that counts."""

    def __post_init__(self) -> None:
        if not self.prompts or min(self.prompts) < 1:
            raise ValueError(f"--prompts must be token counts of at least 1, not {self.prompts}")
        if self.new_tokens < 1 or self.repeats < 1 or self.warm_up < 0:
            raise ValueError("--new-tokens and --repeats must be at least 1, --warm-up not negative")


@dataclass
class BenchCommand(ProtocolSettings):
    """What ``python -m export bench`` takes."""

    folder: str | None = None
    """Folder that python -m export has written."""
    threads: list[int] = option([1, 2])
    """Numbers of threads to measure with, one after the other."""
    torch: bool = True
    """Time transformers too, in a process of its own: fp32, fp16 and bf16."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.folder is None:
            raise ValueError("give an exported folder: python -m export bench runs/NAME/export")
        if not self.threads or min(self.threads) < 1:
            raise ValueError(f"--threads must be numbers of at least 1, not {self.threads}")


@dataclass
class PhoneCommand(ProtocolSettings):
    """What ``python -m export phone`` takes."""

    folder: str | None = None
    """Folder that python -m export has written, with --target android-cpu among others."""
    adb: str = "adb"
    """The adb program."""
    serial: str | None = None
    """Serial number of the phone, where several are connected."""
    threads: int = 4
    """Threads on the phone; large cores first."""
    out: str | None = None
    """File of the results. Default: phone.json in the folder."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.folder is None:
            raise ValueError("give an exported folder: python -m export phone runs/NAME/export")
        if self.threads < 1:
            raise ValueError(f"--threads must be at least 1, not {self.threads}")


def out_folder(model: str, out: str | None) -> Path:
    """Where an export is written: as asked, else in the model's run, else beside the model."""
    if out is not None:
        return Path(out)
    folder = Path(model)
    name = folder.absolute().name
    return folder.parent / "export" if name == "model" else folder.parent / f"{name}-export"


def checked_folders(command: ExportCommand) -> tuple[Path, Path]:
    """The model's folder and the one to write.

    Raises:
        UserError: the first is no model folder, or the second holds something that no export has made.
    """
    assert command.model is not None
    folder, out = Path(command.model), out_folder(command.model, command.out)
    check_model(folder)
    check_out(out, folder, own=(out / FILE).exists())
    return folder, out
