"""The runner on an emulated ARM processor: the tokens of this machine's library, and the whole way through adb."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from export import phone
from export.command import export_command
from export.engine import Engine
from export.runner_folder import COMPILER, START, runner_folder
from export.settings import ExportCommand
from tests.conftest import run_command
from tests.export.conftest import Folder
from tests.export.fake_adb import Phone

pytestmark = pytest.mark.skipif(
    not (shutil.which("qemu-aarch64") and shutil.which(COMPILER)), reason="needs qemu-user and a compiler for aarch64"
)

CPUS = {"armv8": "cortex-a57", "fhm": "max"}
"""Processors that qemu emulates, by the library that fits them."""

SHAPE = {"hidden_size": 64, "head_dim": 16, "max_position_embeddings": 600}

NEW_TOKENS = 12


def export(model: Path, dtype: str) -> Path:
    out = model.with_name(f"{model.name}-{dtype}")
    targets = "host,android-cpu"
    export_command(ExportCommand(model=str(model), out=str(out), target=targets, dtype=dtype, parity="skip"))
    return out


def emulate(exported: Path, place: Path, library: str, words: dict[str, object]) -> subprocess.CompletedProcess[str]:
    """Run the runner on an exported folder, put together in ``place`` as on a phone."""
    for file in phone.files(exported, phone.read_export(exported)):
        target = place / file.remote
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file.local, target)
    asked = " ".join(f"--{name} {value}" for name, value in words.items())
    command = f"TVM_BIND_THREADS=0 qemu-aarch64 -cpu {CPUS[library]} {START} --threads 1 {asked}"
    return subprocess.run(command, shell=True, cwd=place, capture_output=True, text=True, timeout=300, check=False)


def answer(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("kind", "dtype"), [("qwen3", "f16"), ("llama", "f32")])
def test_tokens_are_those_of_the_host(folder: Folder, tmp_path: Path, kind: str, dtype: str) -> None:
    # Longer than the 512 tokens that go through the model at one time.
    prompt = [(31 * place + 3) % 500 for place in range(530)]
    exported = export(folder(kind, **SHAPE), dtype)
    (host,) = (exported / "lib").glob("host-*.so")
    expected = Engine(host, exported / "mlc").generate(prompt, NEW_TOKENS)
    assert len(set(expected)) > 1  # so that a library which always says the same does not pass
    for library in CPUS:
        words = {"tokens": ",".join(map(str, prompt)), "new-tokens": NEW_TOKENS}
        found = answer(emulate(exported, tmp_path / "phone", library, words))
        assert found["library"] == library
        assert found["tokens"] == expected


def test_the_runner_is_small_and_says_what_it_lacks(tmp_path: Path) -> None:
    folder = runner_folder()
    assert sum(file.stat().st_size for file in folder.iterdir()) < 12_000_000
    place = shutil.copytree(folder, tmp_path / "phone")
    for words, reason in (("", "--threads is missing"), ("--threads 1", "armv8.so")):
        command = f"qemu-aarch64 -cpu cortex-a57 {START} {words}"
        done = subprocess.run(command, shell=True, cwd=place, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 1
        assert done.stderr.startswith("runner: ")
        assert reason in done.stderr


def test_the_whole_protocol_on_an_emulated_phone(folder: Folder, tmp_path: Path) -> None:
    model = folder("qwen3", **SHAPE | {"max_position_embeddings": 48})  # fewer than what is asked for
    exported, device = export(model, "f16"), Phone(tmp_path / "device")
    protocol = ["--prompts", "[8,40]", "--new-tokens", "128", "--repeats", "2", "--threads", "1"]
    done = run_command("-m", "export", "phone", exported, "--adb", device.adb, *protocol)
    assert done.returncode == 3, done.stderr
    assert "not measured: Palmtop Stand-in is emulated, and its speed means nothing" in done.stderr
    assert "prompt of 8 tokens, run 3 of 3\nprompt of 24 tokens, run 1 of 3" in done.stdout
    found = json.loads((exported / "phone.json").read_text())
    assert found["library"] == "fhm"
    assert found["emulated"]
    assert found["measurement"] is None
    assert {"armv8.so", "fhm.so", "runner", "weights/tensor-cache.json"} <= device.files()
