"""The command from its help to its last line."""

import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from common.errors import UserError
from export import library, parity
from export.settings import out_folder
from export.shards import read_cache
from tests.conftest import Command, empty_cache, run_command
from tests.export.test_mlc import FAKE

LIBRARY = "host-0123456789abcdef.so"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiles nothing: what is tested is what stands around it."""

    def build(values: dict[str, Any], target: str, dtype: str, out: Path, *, context: int) -> list[Path]:
        (out / LIBRARY).write_bytes(b"library")
        return [out / LIBRARY]

    monkeypatch.setattr(library, "build", build)
    monkeypatch.setattr(parity, "check", lambda model, export: {"divergence": 0.0, "summary": "KL 0"})


@pytest.mark.parametrize(
    ("word", "shown"),
    [
        ("", ("--target host,android-cpu", "--parity {check,skip}", "python -m export phone runs/1b/export")),
        ("bench", ("--threads", "python -m export bench runs/1b/export")),
        ("phone", ("--serial", "the exit code")),
    ],
)
def test_help_is_quick_and_has_examples(word: str, shown: tuple[str, ...]) -> None:
    done = run_command("-X", "importtime", "-m", "export", *filter(None, [word]), "--help")
    assert done.returncode == 0
    for line in shown:
        assert line in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not imported & {"torch", "tvm", "transformers", "tokenizers", "lightning", "datasets"}


def test_a_model_is_exported(
    micro_model: Path, tmp_path: Path, exporting: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PALMTOP_CACHE", str(empty_cache(tmp_path / "cache")))
    model, out = tmp_path / "runs" / "little" / "model", tmp_path / "runs" / "little" / "export"
    shutil.copytree(micro_model, model)
    (model / "palmtop.json").write_text('{"data": []}')
    code, shown, err = exporting(model)
    assert code == 0, err
    assert shown.endswith(f"export: {out}\nnext: python -m export bench {out}\n")
    record = json.loads((out / "export.json").read_text())
    (made,) = record["libraries"]
    assert made["sha256"] == hashlib.sha256((out / made["file"]).read_bytes()).hexdigest()
    assert record["parity"]["divergence"] < 1e-3
    assert record["parity"]["summary"] in " ".join(shown.split())
    assert record["model"]["parameters"] == 2 * record["weights"]["bytes"] / 4
    assert record["memory"]["passes_opencl_gate"]
    assert list(record["seconds"]) == ["check", "libraries", "weights", "parity"]
    assert {file.name for file in (out / "mlc").iterdir()} == {
        "mlc-chat-config.json",
        "ndarray-cache.json",
        "params_shard_0.bin",
        "tensor-cache.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    chat = json.loads((out / "mlc" / "mlc-chat-config.json").read_text())["conv_template"]
    assert chat["roles"] == {"user": "<|user|>", "assistant": "<|assistant|>"}
    assert (out / "palmtop.json").read_text() == '{"data": []}'
    assert "# little on a phone" in (out / "README.md").read_text()
    assert {path.name for path in out.parent.iterdir()} == {"model", "export"}


def test_an_export_is_replaced_and_records_what_is_unchecked(
    micro_model: Path, tmp_path: Path, quick: None, exporting: Command
) -> None:
    out = tmp_path / "out"
    for words in ([], ["--parity", "skip", "--context", "32"]):
        code, shown, err = exporting(micro_model, "--out", out, *words)
        assert code == 0, err
    record = json.loads((out / "export.json").read_text())
    assert (record["parity"], record["context"]) == ("unchecked", 32)
    assert "unchecked (--parity skip)" in shown
    assert read_cache(out / "mlc")["metadata"]["ParamBytes"] == record["weights"]["bytes"]


def test_a_library_that_is_over_the_bar_leaves_nothing(
    micro_model: Path, tmp_path: Path, quick: None, exporting: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(model: Path, export: Path) -> None:
        raise UserError("the mean KL divergence is 2")

    monkeypatch.setattr(parity, "check", fail)
    code, _, err = exporting(micro_model, "--out", tmp_path / "out")
    assert (code, err) == (2, "error: the mean KL divergence is 2\n")
    assert list(tmp_path.iterdir()) == []


def test_bad_input_is_one_message_and_leaves_nothing(
    micro_model: Path, tmp_path: Path, quick: None, exporting: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    pickled, large, mine = tmp_path / "pickled", tmp_path / "large", tmp_path / "mine"
    shutil.copytree(micro_model, pickled)
    (pickled / "model.safetensors").unlink()
    (pickled / "pytorch_model.bin").write_bytes(b"\x80\x04")
    shutil.copytree(micro_model, large)
    weights = load_file(large / "model.safetensors")
    save_file(weights | {"model.norm.weight": np.full(32, 1e6, "f4")}, large / "model.safetensors")
    mine.mkdir()
    (mine / "diary.txt").write_text("dear diary")
    monkeypatch.setenv("MLC_LLM_SOURCE_DIR", "")
    for asked, message in [
        ([], "give the model folder to export: python -m export MODEL"),
        ([tmp_path], "is no model folder: it has no config.json"),
        ([mine / "diary.txt"], "diary.txt is a file; give a model folder"),
        ([pickled], "has its weights only as pickle (pytorch_model.bin), which can run code"),
        ([large], "model.norm.weight of"),
        ([micro_model, "--context", "4k"], "--context 4,000 is longer than the model's context of 64"),
        ([micro_model, "--context", "0"], "--context must be at least 1"),
        ([micro_model, "--target", "iphone"], "--target iphone is none; there are host, android-cpu, android-opencl"),
        ([micro_model, "--target", "android-cpu"], "parity is checked with the host library"),
        ([micro_model, "--mlc-source", "x"], "--mlc-source belongs to --with-mlc"),
        ([micro_model, "--with-mlc"], "MLC-LLM is not installed here"),
        ([micro_model, "--out", mine], "was not made by this command; choose another --out"),
        ([micro_model, "--out", micro_model], "is the model's own folder"),
        (["bench"], "give an exported folder: python -m export bench"),
        (["phone"], "give an exported folder: python -m export phone"),
        (["bench", "x", "--threads", "[0]"], "--threads must be numbers of at least 1"),
        (["phone", "x", "--repeats", "0"], "must be at least 1"),
    ]:
        out = [] if "--out" in asked or asked[:1] in ([], ["bench"], ["phone"]) else ["--out", tmp_path / "out"]
        code, said, err = exporting(*asked, *out)
        assert (code, err.count("\n")) == (2, 1), (asked, err)
        assert message in err, (message, err)
        assert not said or asked == [large], said  # values are looked at as they are written
    assert {one.name for one in tmp_path.iterdir()} == {"pickled", "large", "mine"}
    assert (mine / "diary.txt").exists()


def test_a_compiler_that_is_not_there_is_named(
    micro_model: Path, tmp_path: Path, exporting: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PALMTOP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, err = exporting(micro_model, "--out", tmp_path / "out")
    assert (code, err.count("\n")) == (2, 1), err
    assert "compiler" in err
    assert not (tmp_path / "out").exists()


def test_where_an_export_goes() -> None:
    assert out_folder("runs/little/model", None) == Path("runs/little/export")
    assert out_folder("hub/Llama-3-8B", None) == Path("hub/Llama-3-8B-export")
    assert out_folder("runs/little/model", "there") == Path("there")


def test_mlc_is_run_on_what_was_exported(
    micro_model: Path, tmp_path: Path, quick: None, exporting: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, program = tmp_path / "out", tmp_path / "bin" / "mlc_llm"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {FAKE} "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    monkeypatch.setenv("FAKE_MLC_OURS", str(out / "mlc"))
    monkeypatch.delenv("MLC_LLM_SOURCE_DIR", raising=False)
    code, _, err = exporting(micro_model, "--out", out, "--with-mlc")
    assert code == 0, err
    record = json.loads((out / "export.json").read_text())
    assert record["mlc_llm"]["weights"] == "equal"
    assert (out / "mlc-llm" / record["mlc_llm"]["library"]).exists()
    monkeypatch.setenv("FAKE_MLC", "other-weights")
    code, _, err = exporting(micro_model, "--out", out, "--with-mlc")
    assert code == 2
    assert "MLC-LLM's weights are unlike those of" in err
    assert "mlc_llm" not in json.loads((out / "export.json").read_text())  # the export itself is whole
