"""``--slurm``: fill in slurm/train.sbatch for a run, and submit it. Imports nothing heavy."""

import datetime
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from common.errors import UserError
from common.files import write_text
from common.settings import parse, read_yaml
from train.plan import share_of_rows
from train.settings import (
    TrainCommand,
    called_after,
    check_streams,
    model_config,
    resolve,
    run_name,
    run_path,
    run_settings,
    trains_ours,
)
from train.slurm import Request, seconds
from train.snapshot import CHECKOUT, take_snapshot

TEMPLATE = CHECKOUT / "slurm" / "train.sbatch"


@dataclass(frozen=True)
class Script:
    """A batch script."""

    text: str

    @property
    def options(self) -> dict[str, str]:
        """sbatch's options in it."""
        return dict(re.findall(r"^#SBATCH\s+--([\w-]+)=?(\S*)", self.text, re.M))

    @property
    def world_size(self) -> int:
        """The processes that it starts."""
        return int(self.options.get("nodes", 1)) * int(self.options.get("ntasks-per-node", 1))

    def with_options(self, options: Mapping[str, str | None]) -> "Script":
        """The script with these options in place of its own; those that it does not have are added."""
        lines: list[str] = []
        last = 0
        left = {name: f"#SBATCH --{name}={shlex.quote(value)}" for name, value in options.items() if value is not None}
        for line in self.text.splitlines():
            option = re.match(r"#SBATCH\s+--([\w-]+)", line)
            if option is not None and option[1] in options:
                line = left.pop(option[1], "")
                if not line:
                    continue
            lines.append(line)
            last = len(lines) if option is not None else last
        return Script("\n".join([*lines[:last], *left.values(), *lines[last:]]) + "\n")

    def with_variables(self, values: Mapping[str, str]) -> "Script":
        """The script with these values for the shell variables that it sets."""
        lines = self.text.splitlines()
        for name, value in values.items():
            places = [number for number, line in enumerate(lines) if line.startswith(f"{name}=")]
            if len(places) != 1:
                raise UserError(f"the batch script must set {name}= on one line of its own, for --slurm fills it in")
            lines[places[0]] = f"{name}={value}"
        return Script("\n".join(lines) + "\n")


def submit(command: TrainCommand, argv: Sequence[str]) -> None:
    """Check what can be checked here, put script and code into the run folder, and hand the script to ``sbatch``.

    Args:
        command: the parsed command, with ``slurm``.
        argv: its words; those of ``--slurm`` are left out in the job.

    Raises:
        UserError: the settings cannot work with so many processes, there is no SLURM, it refuses the job, or
            a job for this run is in its queue.
    """
    assert command.slurm is not None
    if shutil.which("sbatch") is None:
        raise UserError("--slurm needs sbatch on the PATH: run this on a login node of a SLURM cluster")
    words = _without_slurm(argv)
    if command.run is None:
        name = f"{called_after(command)}-{datetime.datetime.now():%Y-%m-%d-%H%M%S}"
        command.run, words = name, [*words, "--run", name]
    run = run_path(run_name(command))
    script = Script(TEMPLATE.read_text(encoding="utf-8")).with_options(command.slurm.options())
    _check(command, run, script)
    _refuse_second_job(run)
    new = not run.exists()
    try:
        _submit(command.slurm, run, script, words)
    except UserError:
        if new:
            shutil.rmtree(run, ignore_errors=True)
        raise


def _submit(request: Request, run: Path, script: Script, words: Sequence[str]) -> None:
    code, folder = take_snapshot(run), run.absolute()
    place = {"job-name": folder.name, "chdir": str(Path.cwd()), "output": str(folder / "slurm-%j.log")}
    filled = script.with_options(place).with_variables(
        {
            "words": f"({' '.join(map(shlex.quote, words))})",
            "python": shlex.quote(sys.executable),
            "code": shlex.quote(str(code)),
        }
    )
    path = run / "submit.sbatch"
    write_text(path, filled.text)
    job = sbatch(path)
    with suppress(UserError):  # the job is in the queue, whatever becomes of this note
        write_text(path, f"{filled.text}# Submitted as job {job}.\n")
    log = str(run / f"slurm-{job}.log")
    nodes, tasks = filled.options.get("nodes", "1"), filled.options.get("ntasks-per-node", "1")
    print(f"job {job}: the run {run} on {nodes} nodes × {tasks} processes ({request})")
    print(f"log:      tail -F {shlex.quote(log)}")
    print(f"queue:    squeue --jobs={job}")
    print(f"save now and queue again: scancel --signal=USR1 {job}")
    print(f"save and end:             scancel {job}")


def _without_slurm(argv: Sequence[str]) -> list[str]:
    """The words of the job's own command, which must not submit once more."""
    words: list[str] = []
    left = iter(argv)
    for word in left:
        if word == "--slurm":
            next(left, None)
        elif not word.startswith("--slurm="):
            words.append(word)
    if parse(TrainCommand, words, prog="python train.py", description="").slurm is not None:
        raise UserError("slurm belongs on the command line, as --slurm, and not into the file of --config")
    return words


def _check(command: TrainCommand, run: Path, script: Script) -> None:
    """Find now what would otherwise end the job after hours in the queue."""
    for flag, value in (("devices", command.devices), ("nodes", command.nodes)):
        if value is not None:
            raise UserError(f"--{flag} and --slurm both say how many processes there are; leave --{flag} out")
    _check_limit(script.options)
    settings, stored = run_settings(command), run / "config.yaml"
    if not stored.exists():
        resolve(settings, model_config(settings), script.world_size, own=trains_ours(settings))
        return
    before = read_yaml(stored)
    batch, seq_len = settings.batch_tokens or before["batch_tokens"], settings.seq_len or before["seq_len"]
    share_of_rows(batch, seq_len, script.world_size)
    check_streams(replace(settings.loader, streams=before["loader"]["streams"]), script.world_size)


def _check_limit(options: Mapping[str, str]) -> None:
    """A job that is told to stop before its first step would queue again for ever."""
    lead, limit = re.fullmatch(r"USR1@(\d+)", options.get("signal", "")), options.get("time", "")
    if lead is None or not re.fullmatch(Request.KEYS["time"][1], limit):
        return
    if seconds(limit) <= int(lead[1]) + 60:
        raise UserError(
            f"a time limit of {limit} leaves no time to train: SIGUSR1 comes {lead[1]} s before its end, and SLURM may "
            "be a minute early; give a longer time= or a shorter signal="
        )


def _refuse_second_job(run: Path) -> None:
    """Two jobs of one run would fight for its folder."""
    path = run / "submit.sbatch"
    jobs = re.findall(r"^# Submitted as job (\d+)", path.read_text(encoding="utf-8"), re.M) if path.exists() else []
    if jobs and ask("squeue", "--noheader", f"--jobs={jobs[-1]}").stdout.strip():
        raise UserError(
            f"job {jobs[-1]} of the run {run} waits in the queue or runs; let it, or end it with scancel {jobs[-1]}"
        )


def sbatch(path: Path, *options: str) -> str:
    """Submit a script, with options that are not in it; returns the job's number."""
    done = ask("sbatch", "--parsable", *options, str(path))
    if done.returncode:
        raise UserError(" ".join(done.stderr.split()).removeprefix("sbatch: error: ") or "sbatch refuses the job")
    return done.stdout.strip().partition(";")[0]


def ask(*words: str) -> subprocess.CompletedProcess[str]:
    """Run a command of SLURM's, as it would run outside of any job: a job's variables would be inherited."""
    kept = ("SLURM_CONF", "SLURM_CLUSTERS")
    outside = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_") or name in kept}
    try:
        return subprocess.run(words, env=outside, capture_output=True, text=True, timeout=120, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"{words[0]} does not answer: {error}") from error
