"""MLC-LLM's own tools on an exported folder: the commands for its README, and running them where they are installed."""

import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import empty_folder, gigabytes, write_json, write_text
from export.check import Checked
from export.mlc_config import CONFIG
from export.shards import CACHE, OLD_CACHE, read_cache

LIBRARY = "palmtop"
"""Name of the compiled model inside MLC-LLM's app."""

ARCHIVE = f"{LIBRARY}-android.tar"
PACKAGE_CONFIG = "mlc-package-config.json"

OURS = ("conv_template", "active_vocab_size")
"""Fields of the configuration that MLC-LLM writes otherwise, see :mod:`export.mlc_config`."""

_APK = Path("app", "build", "outputs", "apk", "debug", "app-debug.apk")
"""Where gradle leaves the app, inside its project."""


def convert_weight(source: Path, work: Path) -> list[str | Path]:
    """Words after ``mlc_llm`` that convert the weights of the model folder ``source``."""
    return ["convert_weight", source / "config.json", "--quantization", "q0f16", "--output", work / "weights"]


def gen_config(source: Path, work: Path, checked: Checked) -> list[str | Path]:
    """Words after ``mlc_llm`` that write its configuration; LM stands for the template that it cannot be given."""
    sizes = {
        "--context-window-size": checked.context,
        "--prefill-chunk-size": checked.prefill_chunk,
        "--max-batch-size": 1,
    }
    words: list[str | Path] = ["gen_config", source / "config.json", "--quantization", "q0f16", "--conv-template", "LM"]
    words += [str(word) for pair in sizes.items() for word in pair]
    return [*words, "--output", work / "config"]


def compile_library(mlc: Path, work: Path) -> list[str | Path]:
    """Words after ``mlc_llm`` that compile the model for its Android app."""
    prefix = f"{LIBRARY}_"
    words: list[str | Path] = ["compile", mlc / CONFIG, "--device", "android", "--system-lib-prefix", prefix]
    return [*words, "--output", work / ARCHIVE]


def package_config(out: Path, name: str, checked: Checked) -> dict[str, Any]:
    """What ``mlc_llm package`` builds into the app; its paths are absolute."""
    model = {
        "model": str(out.absolute() / "mlc"),
        "model_id": name,
        "model_lib": LIBRARY,
        "estimated_vram_bytes": checked.memory.weights + checked.memory.cache,
        "bundle_weight": True,
        "overrides": {"context_window_size": checked.context, "prefill_chunk_size": checked.prefill_chunk},
    }
    libraries = {LIBRARY: str(out.absolute() / "mlc-llm" / ARCHIVE)}
    return {"device": "android", "model_list": [model], "model_lib_path_for_prepare_libs": libraries}


def readme(name: str, checked: Checked) -> str:
    """``README.md`` of an exported folder."""
    source, work, mlc = Path("mlc-llm", "source"), Path("mlc-llm"), Path("mlc")
    model = shlex.quote(str(checked.folder.absolute()))
    commands = [convert_weight(source, work), gen_config(source, work, checked), compile_library(mlc, work)]
    convert, configure, compiled = (_typed(["mlc_llm", *words]) for words in commands)
    size = f"{checked.size:,} parameters, {gigabytes(checked.memory.weights)} in fp16"
    cache = f"a cache of {checked.context:,} tokens, {gigabytes(checked.memory.cache)}"
    gate = "passes" if checked.memory.passes else "does not pass"
    return f"""\
# {name} on a phone

{checked.values["architectures"][0]}, {size}; {cache}.
It {gate} MLC-LLM's memory gate on OpenCL ({gigabytes(checked.memory.gate)}).

| here | what it is |
| --- | --- |
| `mlc/` | what MLC-LLM and its app take: configuration, weights in fp16 (q0f16), tokenizer |
| `lib/` | libraries that palmtop has compiled: for this machine, and as asked for Android |
| `config.json` | the model's configuration, its rotary values where MLC-LLM reads them |
| `export.json` | what was made from what, and what was measured |
| `{PACKAGE_CONFIG}` | what goes into MLC-LLM's app; its paths are those of the day of the export |

## MLC-LLM's app

These commands need `mlc_llm` (from the MLC project's own wheels or its source), a checkout of MLC-LLM with its
submodules at `$MLC_LLM_SOURCE_DIR`, the Android SDK, the NDK (`$ANDROID_NDK`, `$TVM_NDK_CC`), a JDK (`$JAVA_HOME`),
Rust and adb. Run them in this folder; `python -m export MODEL --with-mlc` runs all but the last.

The weights and the configuration once more, by MLC-LLM itself: equal to those in `mlc/` but for
{" and ".join(f"`{one}`" for one in OURS)}.

```bash
mkdir -p {source} && ln -sf {model}/* {source}/
cp --remove-destination config.json {source}/
{convert}
{configure}
```

The library for Android's OpenCL, the app with library and weights, and both onto a phone:

```bash
{compiled}
cp {PACKAGE_CONFIG} "$MLC_LLM_SOURCE_DIR"/android/MLCChat/
(cd "$MLC_LLM_SOURCE_DIR"/android/MLCChat && mlc_llm package && ./gradlew assembleDebug)
(cd "$MLC_LLM_SOURCE_DIR"/android/MLCChat && python bundle_weight.py --apk-path {_APK})
```
"""


def _typed(words: Sequence[str | Path]) -> str:
    """A command as one would type it, its long options on lines of their own."""
    return shlex.join(map(str, words)).replace(" --", " \\\n    --")


def program() -> list[str]:
    """How ``mlc_llm`` is started; UserError where it is not installed."""
    found = shutil.which("mlc_llm")
    if found is not None:
        return [found]
    if importlib.util.find_spec("mlc_llm") is not None:
        return [sys.executable, "-m", "mlc_llm"]
    raise UserError(
        "--with-mlc: MLC-LLM is not installed here: there is no mlc_llm to run. Without --with-mlc the commands are "
        "written into the README.md of the exported folder, to be run where it is"
    )


def checkout(given: str | None) -> Path | None:
    """MLC-LLM's source, where it is given or named by the environment; UserError where it is not what it should be."""
    named = given or os.environ.get("MLC_LLM_SOURCE_DIR")
    if not named:
        return None
    if not (Path(named) / "android" / "MLCChat").is_dir():
        raise UserError(f"{named} is no checkout of MLC-LLM: it has no android/MLCChat")
    return Path(named).absolute()


def run_mlc(
    mlc_llm: list[str], source: Path | None, out: Path, checked: Checked, say: Callable[[str], None]
) -> dict[str, Any]:
    """Drive MLC-LLM on an exported folder, into ``mlc-llm/`` there.

    Args:
        mlc_llm: from :func:`program`.
        source: from :func:`checkout`; without it nothing is packaged.
        out: the exported folder.
        checked: the model.
        say: told of every step.

    Returns:
        What was made, for ``export.json``.

    Raises:
        UserError: a step fails, its output left in ``mlc-llm/STEP.log``; or what MLC-LLM makes is unlike ours.
    """
    work = out.absolute() / "mlc-llm"
    empty_folder(work)
    model = work / "source"  # MLC-LLM writes into the folder that it reads
    model.mkdir()
    for file in checked.folder.absolute().iterdir():
        if file.is_file() and file.name != "config.json":
            (model / file.name).symlink_to(file)
    write_json(model / "config.json", checked.values)
    mlc = out.absolute() / "mlc"
    for words in (convert_weight(model, work), gen_config(model, work, checked), compile_library(mlc, work)):
        say(f"mlc_llm {words[0]}")
        _run([*mlc_llm, *words], work / f"{words[0]}.log", work)
    _compare(mlc, work)
    for folder in (model, work / "weights"):
        shutil.rmtree(folder)
    found: dict[str, Any] = {"weights": "equal", "config": f"equal but for {' and '.join(OURS)}", "library": ARCHIVE}
    if source is None:
        say("nothing is packaged: --mlc-source names no checkout of MLC-LLM, nor does MLC_LLM_SOURCE_DIR")
        return found
    return found | {"apk": _package(mlc_llm, source, out, work, say)}


def _package(mlc_llm: list[str], source: Path, out: Path, work: Path, say: Callable[[str], None]) -> str:
    """Build the app in a copy of its project; returns the name of the APK."""
    app = work / "MLCChat"
    shutil.copytree(source / "android" / "MLCChat", app)
    shutil.copyfile(out / PACKAGE_CONFIG, app / PACKAGE_CONFIG)
    say("mlc_llm package")
    _run([*mlc_llm, "package", "--mlc-llm-source-dir", source], work / "package.log", app)
    say("gradlew assembleDebug")
    _run(["sh", "gradlew", "assembleDebug"], work / "gradlew.log", app)
    if not (app / _APK).exists():
        raise UserError(f"gradle has left no {_APK}; its output is in {work / 'gradlew.log'}")
    shutil.copyfile(app / _APK, work / "MLCChat.apk")
    say(f"onto a phone: cd {app} && python bundle_weight.py --apk-path {_APK}")
    return "MLCChat.apk"


def _run(words: Sequence[str | Path], log: Path, folder: Path) -> None:
    """Run a command, its output into a file; UserError with its last line where it fails."""
    try:
        done = subprocess.run(list(map(str, words)), cwd=folder, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise UserError(f"{words[0]} cannot be run: {error.strerror}") from error
    write_text(log, done.stdout + done.stderr)
    if done.returncode != 0:
        last = ([line for line in (done.stdout + done.stderr).splitlines() if line.strip()] or ["no output"])[-1]
        raise UserError(f"MLC-LLM's {log.stem} failed ({last.strip()[:200]}); all of its output is in {log}")


def _compare(mlc: Path, work: Path) -> None:
    """Hold MLC-LLM's weights, by the checksums in its cache, and its configuration to ours."""
    name = CACHE if (work / "weights" / CACHE).exists() else OLD_CACHE
    theirs = _read(work / "weights" / name)
    if theirs["records"] != read_cache(mlc)["records"]:
        raise UserError(f"MLC-LLM's weights are unlike those of {mlc}: compare {work / 'weights' / name}")
    ours, config = _read(mlc / CONFIG), _read(work / "config" / CONFIG)
    unlike = sorted(field for field in config if field not in OURS and config[field] != ours.get(field))
    if unlike:
        raise UserError(f"MLC-LLM's {work / 'config' / CONFIG} is unlike ours in {', '.join(unlike)}")


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise UserError(f"MLC-LLM has left no {path} that can be read: {error}") from error
