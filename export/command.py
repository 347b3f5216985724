"""What ``python -m export`` does: check, write the configuration, compile, write the weights, prove parity, report."""

import importlib.metadata
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common.console import Console
from common.files import gigabytes, new_folder, require_space, sha256, write_json, write_text
from common.run_folder import command as typed
from common.run_folder import git_commit
from common.settings import to_dict
from export import library, mlc, parity
from export.check import check
from export.mlc_config import CONFIG, TOKENIZER_FILES, mlc_config
from export.settings import FILE, ExportCommand, checked_folders
from export.shards import Written, write_weights

LIBRARY_SPACE = 50_000_000
"""Bytes on the disk that libraries and the tokenizer need at most."""


def export_command(command: ExportCommand) -> None:
    """Export a model folder as asked.

    Raises:
        UserError: anything that the user can put right; no folder is left half-written.
    """
    console, (folder, out) = Console(), checked_folders(command)
    mlc_llm = mlc.program() if command.with_mlc else []
    source = mlc.checkout(command.mlc_source) if command.with_mlc else None
    export = _Export(command, folder, out, console)
    console.settings("export", to_dict(command) | {"out": str(out)})
    export.run()
    if command.with_mlc:
        export.record["mlc_llm"] = mlc.run_mlc(mlc_llm, source, out, export.checked, console.say)
        write_json(out / FILE, export.record)
    console.table(f"{out}", export.rows())
    console.say(f"\nexport: {out}\nnext: python -m export bench {out}")


class _Export:
    """One run of the command."""

    def __init__(self, command: ExportCommand, folder: Path, out: Path, console: Console) -> None:
        self.command, self.folder, self.out, self.console = command, folder, out, console
        self.record: dict[str, Any] = {}
        self._seconds: dict[str, float] = {}
        with self._timed("check"):
            self.checked = check(folder, command)

    def run(self) -> None:
        """Write the folder, whole or not at all."""
        for warning in self.checked.warnings:
            self.console.warn(warning)
        needed = self.checked.memory.weights + LIBRARY_SPACE
        require_space(self.out.absolute().parent, needed, "the export")
        if self.command.parity != "skip":
            parity.require_memory(self.checked.memory.weights, parity.available_memory())
        with new_folder(self.out) as temporary:
            self._configuration(temporary)
            # Before the weights: a compiler that is not there costs nothing.
            libraries = self._libraries(temporary / "lib")
            written = self._weights(temporary / "mlc")
            found = self._parity(temporary)
            self.record = self._record(written, libraries, found)
            write_json(temporary / FILE, self.record)

    def rows(self) -> dict[str, str]:
        """The export in a few lines."""
        checked, found = self.checked, self.record["parity"]
        held = f"{gigabytes(checked.memory.weights)} of weights, {gigabytes(checked.memory.cache)} of cache"
        return {
            "model": f"{self.record['model']['architecture']}, {checked.size:,} parameters",
            "on a phone": f"{held} ({checked.context:,} tokens)",
            "MLC's OpenCL gate": "passes" if checked.memory.passes else "does not pass",
            "libraries": ", ".join(one["file"] for one in self.record["libraries"]),
            "parity": "unchecked (--parity skip)" if found == "unchecked" else found["summary"],
            "took": ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in self._seconds.items()),
        }

    def _weights(self, folder: Path) -> Written:
        with self._timed("weights"), self._progress("weights") as progress:
            return write_weights(self.folder, folder, progress)

    def _configuration(self, folder: Path) -> None:
        """Everything that is neither weights nor libraries."""
        checked, name = self.checked, self.name
        (folder / "mlc").mkdir()
        sizes = {"context": checked.context, "prefill_chunk": checked.prefill_chunk}
        config = mlc_config(self.folder, checked.chat, **sizes)
        write_text(folder / "mlc" / CONFIG, json.dumps(config, indent=2))
        for file in TOKENIZER_FILES:
            if (self.folder / file).exists():
                shutil.copyfile(self.folder / file, folder / "mlc" / file)
        if (self.folder / "palmtop.json").exists():
            shutil.copyfile(self.folder / "palmtop.json", folder / "palmtop.json")
        write_json(folder / "config.json", checked.values)
        write_json(folder / mlc.PACKAGE_CONFIG, mlc.package_config(self.out, name, checked))
        write_text(folder / "README.md", mlc.readme(name, checked))

    @property
    def name(self) -> str:
        """What the model is called on a phone: by its run, or by its folder."""
        folder = self.folder.absolute()
        return folder.parent.name if folder.name == "model" else folder.name

    def _libraries(self, folder: Path) -> list[dict[str, Any]]:
        """Compile for every target; returns a record of each file."""
        folder.mkdir()
        found = []
        with self._timed("libraries"):
            for target in self.command.targets:
                self.console.say(f"compiling for {target}")
                made = library.build(
                    self.checked.values, target, self.command.dtype, folder, context=self.checked.context
                )
                found += [{"target": target, "file": f"lib/{file.name}", **_content(file)} for file in made]
        return found

    def _parity(self, folder: Path) -> Any:
        """Compare the host's library with transformers; ``unchecked`` where it was not asked for."""
        if self.command.parity == "skip":
            return "unchecked"
        self.console.say("comparing the library with transformers")
        with self._timed("parity"):
            return parity.check(self.folder, folder)

    def _record(self, written: Written, libraries: list[dict[str, Any]], found: Any) -> dict[str, Any]:
        checked = self.checked
        return {
            "command": typed(),
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "git": git_commit(),
            "model": {
                "folder": str(self.folder.absolute()),
                "architecture": checked.values["architectures"][0],
                "parameters": checked.size,
            },
            "weights": {"dtype": "float16", "bytes": written.bytes, "shards": written.shards},
            "context": checked.context,
            "prefill_chunk": checked.prefill_chunk,
            "memory": asdict(checked.memory) | {"passes_opencl_gate": checked.memory.passes},
            "libraries": libraries,
            "dtype": self.command.dtype,
            "parity": found,
            "tvm": importlib.metadata.version("apache-tvm"),
            "warnings": list(checked.warnings),
            "seconds": self._seconds,
        }

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._seconds[stage] = round(time.perf_counter() - start, 3)

    @contextmanager
    def _progress(self, what: str) -> Iterator[Callable[[int, int], None]]:
        """Progress over bytes, ten lines at most where there is no terminal."""
        self.console.start(self.checked.memory.weights, 0)
        shown = -1

        def progress(done: int, total: int) -> None:
            nonlocal shown
            if 10 * done // total > shown:
                shown = 10 * done // total
                self.console.progress(done, total, {what: f"{gigabytes(done)} of {gigabytes(total)}"})

        try:
            yield progress
        finally:
            self.console.stop()


def _content(file: Path) -> dict[str, Any]:
    """A file's size and checksum."""
    return {"bytes": file.stat().st_size, "sha256": sha256(file)}
