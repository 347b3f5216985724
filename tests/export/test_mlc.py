"""MLC-LLM's tools, by a stand-in that keeps to their command line."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from common.errors import UserError
from common.files import write_json
from export import mlc
from export.check import Checked, check
from export.mlc_config import mlc_config
from export.settings import MlcSettings
from export.shards import write_weights
from tests.conftest import ROOT
from tests.export.conftest import Folder

FAKE = ROOT / "tests" / "export" / "fake_mlc_llm.py"


@pytest.fixture
def exported(folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Checked]:
    """What MLC-LLM is run on, and mlc_llm on the PATH."""
    model, out = folder("qwen3"), tmp_path / "out"
    checked = check(model, MlcSettings())
    (out / "mlc").mkdir(parents=True)
    write_weights(model, out / "mlc")
    sizes = {"context": checked.context, "prefill_chunk": checked.prefill_chunk}
    write_json(out / "mlc" / "mlc-chat-config.json", mlc_config(model, checked.chat, **sizes))
    write_json(out / "config.json", checked.values)
    write_json(out / mlc.PACKAGE_CONFIG, mlc.package_config(out, "little", checked))
    program = tmp_path / "bin" / "mlc_llm"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {FAKE} "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    monkeypatch.setenv("FAKE_MLC_OURS", str(out / "mlc"))
    monkeypatch.delenv("MLC_LLM_SOURCE_DIR", raising=False)
    return out, checked


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkout of MLC-LLM, as far as it is looked at."""
    app = tmp_path / "mlc-source" / "android" / "MLCChat"
    app.mkdir(parents=True)
    (app / "gradlew").write_text(
        "mkdir -p app/build/outputs/apk/debug && echo app > app/build/outputs/apk/debug/app-debug.apk\n"
    )
    return tmp_path / "mlc-source"


def test_mlc_is_driven_to_the_app(
    exported: tuple[Path, Checked], source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, checked = exported
    said: list[str] = []
    found = mlc.run_mlc(mlc.program(), mlc.checkout(str(source)), out, checked, said.append)
    assert found["weights"] == "equal"
    assert (out / "mlc-llm" / found["library"]).read_bytes() == b"library"
    assert (out / "mlc-llm" / found["apk"]).read_text() == "app\n"
    assert "package is under way" in (out / "mlc-llm" / "package.log").read_text()
    steps = ["mlc_llm convert_weight", "mlc_llm gen_config", "mlc_llm compile", "mlc_llm package"]
    assert said[:5] == [*steps, "gradlew assembleDebug"]
    assert "bundle_weight.py" in said[5]
    assert not (checked.folder / "model.safetensors.index.json").exists()
    monkeypatch.setenv("MLC_LLM_SOURCE_DIR", str(source))
    assert mlc.checkout(None) == source


def test_without_a_checkout_nothing_is_packaged(exported: tuple[Path, Checked]) -> None:
    out, checked = exported
    said: list[str] = []
    assert "apk" not in mlc.run_mlc(mlc.program(), mlc.checkout(None), out, checked, said.append)
    assert "nothing is packaged" in said[-1]


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ("compile", r"MLC-LLM's compile failed \(compile: it cannot be done\); all of its output is in .*compile\.log"),
        ("other-weights", "MLC-LLM's weights are unlike those of"),
        ("other-config", "is unlike ours in model_config"),
    ],
)
def test_what_goes_wrong_is_said(
    wish: str, message: str, exported: tuple[Path, Checked], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, checked = exported
    monkeypatch.setenv("FAKE_MLC", wish)
    with pytest.raises(UserError, match=message):
        mlc.run_mlc(mlc.program(), None, out, checked, print)


def test_where_mlc_is_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="MLC-LLM is not installed here"):
        mlc.program()
    with pytest.raises(UserError, match="is no checkout of MLC-LLM: it has no android/MLCChat"):
        mlc.checkout(str(tmp_path))


def test_the_readme_has_the_commands_that_are_run(exported: tuple[Path, Checked]) -> None:
    out, checked = exported
    blocks = re.findall(r"```bash\n(.*?)```", mlc.readme("little", checked), re.S)
    commands = [shlex.split(line) for block in blocks for line in block.replace("\\\n", "").splitlines()]
    typed = [words[1:] for words in commands if words[0] == "mlc_llm"]
    source, work = Path("mlc-llm/source"), Path("mlc-llm")
    run = [
        mlc.convert_weight(source, work),
        mlc.gen_config(source, work, checked),
        mlc.compile_library(Path("mlc"), work),
    ]
    assert typed == [list(map(str, words)) for words in run]
    (model,) = json.loads((out / mlc.PACKAGE_CONFIG).read_text())["model_list"]
    assert (model["model"], model["bundle_weight"]) == (str(out / "mlc"), True)
