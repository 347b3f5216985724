"""SLURM: what to ask of it, and how a job gets into its queue again. Imports nothing heavy."""

import re
import subprocess
import sys
from collections.abc import Mapping
from typing import Any, ClassVar

from jsonargparse.typing import register_type


class Request:
    """What ``--slurm`` asks for: ``nodes=4,gpus=8,time=24:00:00``. The rest stands in slurm/train.sbatch."""

    KEYS: ClassVar = {
        "nodes": ("nodes", r"[1-9]\d*"),
        "gpus": ("gpus-per-node", r"\d+"),
        "tasks": ("ntasks-per-node", r"[1-9]\d*"),
        "cpus": ("cpus-per-task", r"[1-9]\d*"),
        "time": ("time", r"\d+|\d+:\d+(:\d+)?|\d+-\d+(:\d+){0,2}"),
        "signal": ("signal", r"\d{1,5}"),
        "mem": ("mem", r"\d+[KMGT]?"),
        "partition": ("partition", r"\S+"),
        "account": ("account", r"\S+"),
        "qos": ("qos", r"\S+"),
        "constraint": ("constraint", r"\S+"),
    }
    """Key, sbatch's option for it, and what a value looks like."""

    def __init__(self, values: Mapping[str, str]) -> None:
        self.values = dict(values)
        """The keys as they were written."""

    @classmethod
    def parse(cls, value: Any) -> "Request":
        """Read a request; ValueError says what is wrong with it."""
        values: dict[str, str] = {}
        for word in re.split(r",(?=\w+=)", str(value).strip()):  # a value may hold commas: partition=a,b
            key, _, text = word.partition("=")
            if key not in cls.KEYS:
                raise ValueError(
                    f"{word!r} is none of {', '.join(f'{known}=' for known in cls.KEYS)}; "
                    "write other options of sbatch into slurm/train.sbatch"
                )
            if key in values:
                raise ValueError(f"{key}= stands twice in {str(value)!r}")
            if not re.fullmatch(cls.KEYS[key][1], text):
                raise ValueError(
                    f"{word!r} is nothing that SLURM takes; write for example nodes=4,gpus=8,time=24:00:00"
                )
            values[key] = text
        if values.get("gpus") == "0" and "tasks" not in values:
            raise ValueError("without GPUs (gpus=0) it needs tasks=N, the number of processes on a node")
        return cls(values)

    def options(self) -> dict[str, str | None]:
        """sbatch's long options and their values; None for one to leave out."""
        options: dict[str, str | None] = {self.KEYS[key][0]: value for key, value in self.values.items()}
        if "signal" in self.values:
            options["signal"] = f"USR1@{self.values['signal']}"
        if "gpus" in self.values:
            options.setdefault("ntasks-per-node", self.values["gpus"])  # a process for each GPU
            if self.values["gpus"] == "0":
                options["gpus-per-node"] = None
        return options

    def __str__(self) -> str:
        return ",".join(f"{key}={value}" for key, value in self.values.items())


register_type(Request, serializer=str, deserializer=Request.parse)


def seconds(limit: str) -> int:
    """A time limit in SLURM's words: minutes, minutes:seconds, h:m:s, days-h, days-h:m or days-h:m:s."""
    days, dash, rest = limit.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    units = (3600, 60, 1) if dash or len(parts) == 3 else (60, 1)
    return 86_400 * int(days or 0) + sum(part * unit for part, unit in zip(parts, units, strict=False))


def requeue(environment: Mapping[str, str]) -> None:
    """Ask SLURM to run this job again from the start of its script; outside SLURM nothing happens.

    The run goes on from its checkpoint then, for its name has the job's id in it, which stays.
    """
    job = environment.get("SLURM_JOB_ID")
    if job is None:
        return
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        print(f"job {job} was not put into the queue again: {error}", file=sys.stderr)
        return
    if done.returncode:
        reason = (done.stderr or done.stdout).strip()
        print(f"SLURM refuses to requeue job {job}: {reason}. Submit it again, the run goes on", file=sys.stderr)
    else:
        print(f"job {job} is in the queue again", flush=True)
