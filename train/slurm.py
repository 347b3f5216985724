"""SLURM: submit a run, and put its job into the queue again when its time is up."""

import subprocess
import sys
from collections.abc import Mapping


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
