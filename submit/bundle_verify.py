"""Prove that a bundle stands alone: unpack it elsewhere, check its sums, score its model with its own code."""

import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import sha256
from submit.checklist import check_sums

CHECKOUT = Path(__file__).absolute().parent.parent

QUESTIONS = "--suite sample --only commonsense_qa --limit 2 --max-out-len 16 --speed false".split()
"""Enough to load the model and its tokenizer, to ask, to read the answer and to score it."""

ALONE = """
import runpy, sys
source, ours, *sys.argv[1:] = sys.argv[1:]
runpy.run_module("scoring", run_name="__main__", alter_sys=True)
named = [module for name, module in sys.modules.items() if name.split(".")[0] in ours.split()]
files = [getattr(module, "__file__", None) for module in named]
outside = [file for file in files if file is not None and not file.startswith(source)]
sys.exit(f"this code is not from the bundle: {outside}" if outside else 0)
"""
"""Scores, and then says whether any of the project's modules came from elsewhere."""


def verify(archive: Path) -> dict[str, Any]:
    """Check an archive; returns what was done.

    Raises:
        UserError: a file differs from its sum, or the model does not load or answer.
    """
    began = time.monotonic()
    with tempfile.TemporaryDirectory(dir=archive.absolute().parent, prefix=f".{archive.name}-") as folder:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        (bundle,) = Path(folder).iterdir()
        files = check_sums(bundle)
        _score(bundle.resolve())
    return {"archive": archive.name, "sha256": sha256(archive), "files": files, "seconds": time.monotonic() - began}


def _score(bundle: Path) -> None:
    """Score the checkpoint with the bundle's code, offline."""
    source = bundle / "source"
    ours = " ".join(path.parent.name for path in CHECKOUT.glob("*/__init__.py"))
    words = [sys.executable, "-P", "-c", ALONE, str(source), ours, "checkpoint", *QUESTIONS, "--out", "answers"]
    done = subprocess.run(
        words,
        cwd=bundle,
        env=os.environ | {"PYTHONPATH": str(source), "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode or not (bundle / "answers" / "score.json").exists():
        said = "\n".join((done.stdout + done.stderr).strip().splitlines()[-12:])
        raise UserError(f"the model does not answer when there is nothing but the bundle:\n{said}")
