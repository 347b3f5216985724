"""The bundle holds what is asked for, says what it lacks, and stands alone."""

import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from common.errors import UserError
from common.files import write_json, write_text
from scoring.results import COLUMNS
from submit import bundle_verify
from submit.bundle import bundle_command
from submit.bundle_weight import commands
from submit.checklist import CHECKLIST, SUMS, check_sums
from submit.settings import BundleCommand
from tests.conftest import ROOT
from tests.submit.runs import write_run, write_scores


@pytest.fixture
def run(micro_model: Path, tmp_path: Path) -> Path:
    """A run with a real model, scores on the sample, and an export of made-up weights."""
    run = write_run(tmp_path / "runs" / "demo", model=False)
    shutil.copytree(micro_model, run / "model")
    write_json(
        run / "model" / "palmtop.json", {"data": [{"stage": "sft", "sources": [{"source": "sample", "weight": 1}]}]}
    )
    write_scores(run, (20.0, 10.0, 5.0, 1.0, 14.0, 12.0), "sample", ("sample: no benchmark",))
    export = run / "export"
    for name in ("mlc-chat-config.json", "ndarray-cache.json", "tokenizer.json"):
        write_json(export / "mlc" / name, {})
    (export / "mlc" / "params_shard_0.bin").write_bytes(bytes(1000))
    write_json(export / "export.json", {"parity": {"summary": "mean KL 1e-6"}})
    write_json(export / "mlc-package-config.json", {"model_list": [{"model_id": "demo"}]})
    write_text(export / "README.md", "mlc_llm convert_weight\n")
    shutil.copyfile(run / "model" / "palmtop.json", export / "palmtop.json")
    return run


def bundle(run: Path, out: Path, **more: object) -> str:
    """Write a bundle, unchecked, and return its checklist."""
    bundle_command(BundleCommand(run=str(run), out=str(out), **({"verify": False} | more)))  # type: ignore[arg-type]
    return (out / CHECKLIST).read_text(encoding="utf-8")


def missing(checklist: str) -> list[str]:
    return [line.split(" | ")[0].removeprefix("| ") for line in checklist.splitlines() if "**missing**" in line]


def test_a_bundle_lacks_the_app_and_its_picture_and_says_how_to_make_them(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    text = bundle(run, out)
    assert missing(text) == ["APK", "a screenshot, or error.txt with the reasons"]
    assert f"python -m export {run / 'model'} --with-mlc --mlc-source" in text
    assert "adb exec-out screencap -p > screenshot.png" in text
    assert "| tokenizer.model | not applicable |" in text
    assert "data outside the rules of track 2: sample" in text
    assert "**not full scores**: sample: no benchmark" in text
    assert {path.name for path in out.iterdir()} == {
        *("CHECKLIST.md", "README.md", "SHA256SUMS", "Results.csv", "bundle_weight.py", "checkpoint", "convert", "mlc"),
        *("checkpoint_link.txt", "compiled_model_link.txt", "error.txt", "opencompass", "record", "source"),
    }
    assert (out / "Results.csv").read_text().splitlines()[0] == ",".join([*COLUMNS, "Throughput", "Memory-Usage"])
    assert {path.name for path in (out / "opencompass").iterdir()} == {
        *("palmtop_opencompass.py", "palmtop_model.py", "run_opencompass.py"),
    }
    assert "path='../checkpoint'" in (out / "opencompass" / "palmtop_opencompass.py").read_text()
    assert (out / "source" / "scoring" / "__main__.py").exists()
    assert not list((out / "source").rglob("__pycache__"))


def test_the_checklist_has_size_and_checksum_of_every_item(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    text = bundle(run, out)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    there = [row for row in rows[2:] if row[1].startswith("`")]
    assert len(there) == 9
    for _, place, size, digest, _ in there:
        path = place.strip("`")
        whole = (out / SUMS).read_text() if (out / path).is_dir() else ""
        lines = "".join(f"{line}\n" for line in whole.splitlines() if f"  {path}/" in line)
        content = lines.encode() if whole else (out / path).read_bytes()
        assert digest == f"`{hashlib.sha256(content).hexdigest()}`", path
        assert size
    assert check_sums(out) == len((out / SUMS).read_text().splitlines())
    with tarfile.open(tmp_path / "bundle.tar") as tar:
        assert "bundle/checkpoint/model.safetensors" in tar.getnames()


def test_what_is_given_is_taken(run: Path, tmp_path: Path) -> None:
    (tmp_path / "app.apk").write_bytes(b"app")
    (tmp_path / "shot.png").write_bytes(b"picture")
    text = bundle(
        run,
        tmp_path / "bundle",
        apk=str(tmp_path / "app.apk"),
        screenshot=str(tmp_path / "shot.png"),
        checkpoint_link="https://example.org/checkpoint",
    )
    assert missing(text) == []
    assert (tmp_path / "bundle" / "screenshot.png").read_bytes() == b"picture"
    assert not (tmp_path / "bundle" / "error.txt").exists()
    assert (tmp_path / "bundle" / "checkpoint_link.txt").read_text() == "https://example.org/checkpoint\n"
    assert text.count("without an address yet") == 1


def test_full_scores_go_before_others(run: Path, tmp_path: Path) -> None:
    write_scores(run, (30.0, 10.0, 5.0, 1.0, 14.0, 12.0))
    write_scores(run, (99.0,), "newer")
    assert "| full scores |" in bundle(run, tmp_path / "bundle")
    assert (tmp_path / "bundle" / "Results.csv").read_text().splitlines()[1].startswith("30,")


def test_incomplete_scores_are_not_called_full(run: Path, tmp_path: Path) -> None:
    write_scores(run, (30.0, 10.0, 5.0, None, 14.0), "some")
    text = bundle(run, tmp_path / "bundle")
    assert f"**not full scores**: incomplete: no score of humaneval, truthfulqa; `python -m scoring {run}" in text
    assert (tmp_path / "bundle" / "Results.csv").read_text().splitlines()[1].startswith("30,")


def test_scores_and_exports_of_other_weights_are_not_handed_in(run: Path, tmp_path: Path) -> None:
    path = run / "scores" / "sample" / "score.json"
    found = json.loads(path.read_text())
    write_json(path, found | {"asked": found["asked"] | {"weights": "others"}})
    write_json(run / "export" / "palmtop.json", {"data": []})
    text = bundle(run, tmp_path / "bundle")
    assert f"python -m scoring {run / 'model'}" in text
    assert "the export is of another model than the run has now" in text
    assert len(missing(text)) == 4


def test_a_run_without_anything_but_a_model(micro_model: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "bare", model=False)
    with pytest.raises(UserError, match="has no model yet; python train.py consolidate"):
        bundle(run, tmp_path / "bundle")
    shutil.copytree(micro_model, run / "model")
    text = bundle(run, tmp_path / "bundle")
    assert len(missing(text)) == 5
    assert f"python -m export {run / 'model'}\n" in text


def test_only_bundles_are_replaced(run: Path, tmp_path: Path) -> None:
    bundle(run, tmp_path / "bundle")
    bundle(run, tmp_path / "bundle")
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="holds no CHECKLIST.md"):
        bundle(run, tmp_path / "mine")
    with pytest.raises(UserError, match="holds the run itself"):
        bundle(run, run)
    with pytest.raises(UserError, match="--apk .*nowhere is no file"):
        bundle(run, tmp_path / "other", apk="nowhere")
    assert not (tmp_path / "other").exists()


def test_a_changed_file_is_found(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    bundle(run, out)
    (out / "mlc" / "params_shard_0.bin").write_bytes(bytes(999))
    with pytest.raises(UserError, match="mlc/params_shard_0.bin has changed"):
        check_sums(out)
    (out / "mlc" / "params_shard_0.bin").unlink()
    with pytest.raises(UserError, match="mlc/params_shard_0.bin is not there"):
        check_sums(out)


def test_a_bundle_answers_by_itself(run: Path, tmp_path: Path) -> None:
    bundle(run, tmp_path / "bundle", verify=True)
    verified = json.loads((tmp_path / "bundle.verified.json").read_text())
    assert verified["files"] == len((tmp_path / "bundle" / SUMS).read_text().splitlines())
    assert verified["sha256"] == hashlib.sha256((tmp_path / "bundle.tar").read_bytes()).hexdigest()
    assert not list(tmp_path.glob(".bundle*"))


def test_code_from_elsewhere_is_noticed(micro_model: Path, tmp_path: Path) -> None:
    """A bundle whose code is not whole must not be helped out by what is installed here."""
    copy = tmp_path / "bundle"
    shutil.copytree(micro_model, copy / "checkpoint")
    for name in ("scoring", "data", "models"):
        shutil.copytree(ROOT / name, copy / "source" / name)
    with pytest.raises(UserError, match="(?s)does not answer.*(not from the bundle|No module named)"):
        bundle_verify._score(copy)


def test_the_model_comes_to_the_app(tmp_path: Path) -> None:
    assert commands(Path("a.apk"), Path("mlc"), "demo")[-1] == [
        "shell",
        "mkdir -p /storage/emulated/0/Android/data/ai.mlc.mlcchat/files && "
        "mv /data/local/tmp/demo /storage/emulated/0/Android/data/ai.mlc.mlcchat/files/",
    ]
    folder = tmp_path / "bundle"
    write_json(folder / "mlc" / "mlc-chat-config.json", {})
    write_json(folder / "convert" / "mlc-package-config.json", {"model_list": [{"model_id": "demo"}]})
    shutil.copyfile(ROOT / "submit" / "bundle_weight.py", folder / "bundle_weight.py")
    (folder / "a.apk").touch()
    words = [sys.executable, "bundle_weight.py", "--apk-path", "a.apk", "--adb", "true"]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=True)
    assert "adb install -r a.apk" in done.stdout
    assert "choose demo" in done.stdout
