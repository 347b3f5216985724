"""What the competition's starting kit asks a team to hand in, built from a run.

The bundle is a folder and an archive of it, and needs nothing outside of itself: it holds the code that scores its
model.
"""

import shutil
import tarfile
from pathlib import Path

from common.console import Console
from common.errors import UserError
from common.files import (
    gigabytes,
    new_folder,
    readable_disk_errors,
    require_space,
    sha256,
    sync,
    write_json,
    write_text,
)
from common.run_folder import COMMIT_FILE, git_commit
from scoring.opencompass.submission import CONFIG, RUN, WRAPPER, Form, Submission, write_submission
from submit.bundle_verify import verify
from submit.checklist import CHECKLIST, SUMS, Item, write_checklist
from submit.rules import judge
from submit.run import Run, data_of, lineage
from submit.settings import BundleCommand

CHECKOUT = Path(__file__).absolute().parent.parent

FOLDERS = ("docs", "recipes", "slurm")
"""Of the checkout, beside the packages."""

LINK = "put the address here before it is handed in"


def bundle_command(command: BundleCommand) -> None:
    """Write the bundle of a run, and prove that it stands alone.

    Raises:
        UserError: the run has no model, a given file is not there, the folder holds something else, or the bundle does
            not pass its own check; then its folder stays, to be looked at.
    """
    assert command.run is not None
    run, console = Run(Path(command.run)), Console()
    out = Path(command.out) if command.out is not None else run.path / "bundle"
    _check(command, run, out)
    needed = sum(file.stat().st_size for folder in (run.path / "model", _mlc(run)) for file in folder.rglob("*"))
    require_space(out.absolute(), (2 + command.verify) * needed, "the bundle, its archive and the check of it")
    with new_folder(out) as folder:
        items = _Bundle(command, run, folder).write()
    archive = out.with_name(f"{out.name}.tar")
    _pack(out, archive)
    for item in items:
        state = "there" if item.there else "MISSING" if item.applies else "not applicable"
        console.say(f"{state.ljust(14)}  {item.what}" + (f": {item.path}" if item.there else ""))
    if command.verify:
        console.say("\nunpacking it elsewhere, to check every file and to score the model with what is in it")
        checked = verify(archive)
        write_json(out.with_name(f"{out.name}.verified.json"), checked)
        console.say(
            f"verified: {checked['files']:,} checksums; the model loads and answers ({checked['seconds']:.0f} s)"
        )
    console.say(f"\nbundle: {out}, {archive} ({gigabytes(archive.stat().st_size)})\nchecklist: {out / CHECKLIST}")
    for item in items:
        if item.command is not None and not item.there:
            console.say(f"next: {item.command}")


def _check(command: BundleCommand, run: Run, out: Path) -> None:
    if not (run.path / "model" / "config.json").exists():
        raise UserError(
            f"{run.path} has no model yet; python train.py consolidate {run.path} makes one of a checkpoint"
        )
    if out.absolute() in (run.path, *run.path.parents):
        raise UserError(f"--out {out} holds the run itself; choose another folder")
    if out.exists() and not (out / CHECKLIST).exists():
        raise UserError(f"{out} is there already and holds no {CHECKLIST}; choose another --out")
    for name in ("apk", "screenshot"):
        given = getattr(command, name)
        if given is not None and not Path(given).is_file():
            raise UserError(f"--{name} {given} is no file")


def _mlc(run: Run) -> Path:
    """The run's export."""
    return run.path / "export" / "mlc"


class _Bundle:
    """The items, each written where it can be."""

    def __init__(self, command: BundleCommand, run: Run, out: Path) -> None:
        self.command, self.run, self.out = command, run, out
        self.export = run.path / "export"
        self.exported = run.results("export.json")

    def write(self) -> list[Item]:
        """Write everything, the checklist last; returns its items."""
        items = [
            self._checkpoint(),
            self._conversion(),
            self._mlc(),
            self._tokenizer_model(),
            self._apk(),
            self._bundle_weight(),
            self._screenshot(),
            self._link("checkpoint", "checkpoint", self.command.checkpoint_link),
            self._link("compiled_model", "mlc", self.command.compiled_link),
            self._source(),
            self._opencompass(),
            self._results(),
        ]
        self._record()
        write_text(self.out / "README.md", self._readme())
        write_checklist(self.out, f"{self.run.name}: what is handed in", items, self._notes())
        return items

    def _checkpoint(self) -> Item:
        shutil.copytree(self.run.path / "model", self.out / "checkpoint")
        return Item("configuration and checkpoint of the Hugging Face model", "checkpoint", "plain transformers")

    def _conversion(self) -> Item:
        what = "code for converting the model to MLC"
        if not self.exported:
            return Item(what, None, "the export has it", self._export_command)
        (self.out / "convert").mkdir()
        for name in ("README.md", "mlc-package-config.json", "config.json", "export.json"):
            if (self.export / name).exists():
                shutil.copyfile(self.export / name, self.out / "convert" / name)
        return Item(what, "convert", "MLC-LLM's own commands; ours are `source/export`")

    def _mlc(self) -> Item:
        what = "converted MLC files (mlc-chat-config.json, ndarray-cache.json, params_shard_*.bin, tokenizer)"
        if not self.exported:
            return Item(what, None, "the run has no export", self._export_command)
        if not _same(self.export / "palmtop.json", self.run.path / "model" / "palmtop.json"):
            return Item(what, None, "the export is of another model than the run has now", self._export_command)
        shutil.copytree(self.export / "mlc", self.out / "mlc")
        parity = self.exported.get("parity")
        said = parity.get("summary") if isinstance(parity, dict) else parity
        return Item(what, "mlc", f"parity with transformers: {said}")

    def _tokenizer_model(self) -> Item:
        note = (
            "the tokenizer is a byte-level BPE: `tokenizer.json` holds all of it, and there is no SentencePiece model"
        )
        own = self.run.path / "model" / "tokenizer.model"
        return Item(
            "tokenizer.model", "checkpoint/tokenizer.model" if own.exists() else None, note, applies=own.exists()
        )

    def _apk(self) -> Item:
        built = self.export / "mlc-llm" / "MLCChat.apk"
        given = Path(self.command.apk) if self.command.apk is not None else built
        if not given.exists():
            command = f"{self._export_command} --with-mlc --mlc-source MLC_LLM_SOURCE"
            return Item("APK", None, "MLC-LLM, the Android SDK and NDK build it", command)
        shutil.copyfile(given, self.out / "MLCChat.apk")
        return Item("APK", "MLCChat.apk")

    def _bundle_weight(self) -> Item:
        shutil.copyfile(Path(__file__).with_name("bundle_weight.py"), self.out / "bundle_weight.py")
        return Item("the script that brings the MLC files to the APK", "bundle_weight.py", "over adb")

    def _screenshot(self) -> Item:
        what = "a screenshot, or error.txt with the reasons"
        if self.command.screenshot is not None:
            name = f"screenshot{Path(self.command.screenshot).suffix}"
            shutil.copyfile(self.command.screenshot, self.out / name)
            return Item(what, name)
        phone = self.run.results("phone.json")
        measured = bool(phone) and not phone.get("emulated")
        tried = "The model was measured on a phone with palmtop's own runner (record/phone.json), " if measured else ""
        reason = (
            f"{tried}{'but the' if tried else 'The'} app has not been run on a phone, so there is no picture of it.\n"
        )
        write_text(self.out / "error.txt", reason)
        command = f"adb exec-out screencap -p > screenshot.png  # then: {self._again} --screenshot screenshot.png"
        return Item(what, None, "`error.txt` gives the reason in its place", command)

    def _link(self, name: str, folder: str, link: str | None) -> Item:
        what = f"download link of the {name.replace('_', ' ')}"
        file = f"{name}_link.txt"
        write_text(self.out / file, f"{link or LINK}\n")
        flag = "--checkpoint-link" if name == "checkpoint" else "--compiled-link"
        return Item(what, file, "" if link else f"**without an address yet**: upload `{folder}/` and give {flag} URL")

    def _source(self) -> Item:
        source = self.out / "source"
        source.mkdir()
        ignored = shutil.ignore_patterns("__pycache__", ".*")
        for path in sorted(CHECKOUT.iterdir()):
            if path.is_file() and (
                path.suffix in (".py", ".md", ".toml", ".txt") or path.name in ("LICENSE", "Makefile")
            ):
                shutil.copyfile(path, source / path.name)
            elif path.name in FOLDERS or (path / "__init__.py").exists():
                shutil.copytree(path, source / path.name, ignore=ignored)
        commit = git_commit()
        write_text(source / COMMIT_FILE, f"{commit or ''}\n")
        made_by = self.run.environment.get("git")
        note = "" if made_by == commit else f"of commit {commit}; the run was made by {made_by}"
        return Item("source code with a readme", "source", note)

    def _opencompass(self) -> Item:
        found = self.run.score
        asked = {} if found is None else found.found.get("asked") or {}
        form: Form = "chat" if asked.get("form") == "chat" else "base"
        submission = Submission(self.out / "checkpoint", form, asked.get("max_out_len") or 1024)
        write_submission(submission, self.out / "opencompass")
        return Item(
            "OpenCompass's model wrapper and configuration",
            "opencompass",
            f"`{WRAPPER}`, `{CONFIG}`; `{RUN}` runs them, in {form} form",
        )

    def _results(self) -> Item:
        what = "Results.csv with the scores, Throughput and Memory-Usage"
        command = f"python -m scoring {self.run.path / 'model'}"
        found = self.run.score
        if found is None:
            return Item(what, None, "the run's model has not been scored on the competition's tasks", command)
        tables = sorted(found.path.parent.glob("Results*.csv"))
        if not tables:
            return Item(what, None, f"{found.path.parent} has no table", command)
        shutil.copyfile(tables[0], self.out / "Results.csv")
        caveats = "; ".join(found.caveats)
        return Item(
            what, "Results.csv", f"**not full scores**: {caveats}; `{command}` makes them" if caveats else "full scores"
        )

    def _record(self) -> None:
        """How the run was made, for whoever wants to know."""
        record = self.out / "record"
        record.mkdir()
        for path in (
            *(self.run.path / name for name in ("config.yaml", "env.json", "metrics.jsonl", "report.html")),
            *(self.export / name for name in ("bench.json", "phone.json")),
            *(score.path for score in [self.run.score] if score is not None),
        ):
            if path.exists():
                shutil.copyfile(path, record / path.name)

    def _notes(self) -> list[str]:
        verdict = judge(data_of(lineage(self.run)))
        rules = "what it was trained on is not known" if verdict is None else verdict.text
        return [f"Rules: {rules}.", f"Made from the run {self.run.name} by `{self._again}`."]

    def _readme(self) -> str:
        return f"""\
# {self.run.name}

`{CHECKLIST}` says what of the competition's list is here, with sizes and checksums. To score the model with nothing but
this folder and the packages in `source/pyproject.toml`:

```bash
sha256sum --check {SUMS}
cd source && python -m scoring ../checkpoint --suite sample --limit 2
```
"""

    @property
    def _export_command(self) -> str:
        return f"python -m export {self.run.path / 'model'}"

    @property
    def _again(self) -> str:
        out = f" --out {self.command.out}" if self.command.out is not None else ""
        return f"python -m submit bundle {self.command.run}{out}"


def _same(one: Path, other: Path) -> bool:
    """Whether two files are there with the same contents, or neither is."""
    if not (one.exists() and other.exists()):
        return one.exists() == other.exists()
    return sha256(one) == sha256(other)


def _pack(out: Path, archive: Path) -> None:
    """Write a folder as an uncompressed archive, for weights do not get smaller; whole or not at all."""
    temporary = archive.with_name(f".{archive.name}.tmp")
    with readable_disk_errors(archive):
        with tarfile.open(temporary, "w") as tar:
            tar.add(out, arcname=out.name)
        sync(temporary)
        temporary.replace(archive)
