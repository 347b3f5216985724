"""Run a training command again and again, killing it, until it is finished.

Started as a program of its own with one JSON argument: ``argv`` of the command, the ``stage`` whose command it is
(``train`` unless given), and ``attempts``. Each of these has

* more ``argv``, its ``run`` folder, its ``world`` of ranks, ``devices`` of them a node;
* ``step`` and ``signal`` to kill all ranks with, or a ``rank`` and the ``operation`` of writing checkpoints at which it
  is killed;
* ``poison``: steps in which the loss of rank 1 is NaN.

``rows`` is a folder that every rank appends to what rows it took. The modules are imported once; each rank of each
attempt is a fork, so that an attempt costs a fraction of a second instead of the imports.
"""

import contextlib
import importlib
import json
import math
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def last_step(metrics: Path) -> int:
    """The last step in a run's metrics, 0 before there are any."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(json.loads(metrics.read_text().splitlines()[-1])["step"])
    return 0


def start(plan: dict, one: dict, rank: int, port: int) -> int:
    """Start a rank of an attempt in a child; returns its process id."""
    child = os.fork()
    if child:
        return child
    os.setpgid(0, 0)
    sys.argv = ["train.py", *plan["argv"], "--run", one["run"], *one["argv"]]
    world = one.get("world", 1)
    if world > 1:
        devices = one.get("devices", world)
        where = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank % devices, "LOCAL_WORLD_SIZE": devices}
        where |= {"GROUP_RANK": rank // devices, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in where.items()})
    code = 1
    try:
        if plan.get("rows"):
            record_rows(Path(plan["rows"]) / f"{time.time_ns()}-{rank}")
        if one.get("rank") == rank:
            die_at(one["operation"])
        if rank == 1 and one.get("poison"):
            from train import loop

            loop.training_step = spoiled(one["poison"])
        importlib.import_module(f"{plan.get('stage', 'train')}.__main__").main()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        sys.stdout.flush()
        os._exit(code)


def record_rows(path: Path) -> None:
    """Write a line for each step: the number of its first row and a hash of each row that this rank takes."""
    import xxhash

    from data.loader import Loader

    take = Loader.take

    def recorded(loader: Loader, rows: int) -> object:
        first = loader.rows
        taken = take(loader, rows)
        with open(path, "a") as file:
            hashes = [xxhash.xxh3_64_hexdigest(row.astype("int64").tobytes()) for row in taken]
            file.write(json.dumps([first, loader._rank, loader._world, hashes]) + "\n")
        return taken

    Loader.take = recorded  # type: ignore[method-assign]


def die_at(operation: int) -> None:
    """Kill this process before its so-manieth file operation on checkpoints that are being written."""
    count = 0

    def hook(event: str, args: tuple[object, ...]) -> None:
        nonlocal count
        if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir") and "/.step-" in str(args[0]):
            count += 1
            if count == operation:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def spoiled(steps: list[int]) -> Callable[..., Any]:
    """The training step, but that its loss is NaN the so-manieth times that it is called."""
    from train import loop

    real, count = loop.training_step, 0

    def training_step(training, rate, asks, watch):  # type: ignore[no-untyped-def]
        nonlocal count
        count += 1
        objective = training.objective

        def nothing(module, batch):  # type: ignore[no-untyped-def]
            loss, nll = objective(module, batch)
            return loss * math.nan, nll * math.nan

        training.objective = nothing if count in steps else objective
        figures = real(training, rate, asks, watch)
        training.objective = objective
        return figures

    return training_step


def attempt(plan: dict, one: dict, metrics: Path) -> list[int]:
    """Start all ranks, kill them where that is planned, and wait; returns their exit codes.

    When one fails the others are killed too, as a launcher does: at once after a kill, else when they have had time
    to say what happened to them.
    """
    world = one.get("world", 1)
    kill = None if one.get("step") is None else (one["step"], one["signal"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [start(plan, one, rank, port) for rank in range(world)]
    time.sleep(0.05)  # a forked Python drops signals that come before it has settled; a started one does not
    codes: dict[int, int] = {}
    end: float | None = None
    while len(codes) < world:
        for child in set(ranks) - codes.keys():
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                codes[child] = os.waitstatus_to_exitcode(status)
        end = end or (time.monotonic() + 8 * any(code > 0 for code in codes.values()) if any(codes.values()) else None)
        if end is not None and time.monotonic() > end and not all(code > 128 for code in codes.values()):
            for child in set(ranks) - codes.keys():
                os.kill(child, signal.SIGKILL)
        if kill is not None and not codes and last_step(metrics) >= kill[0]:
            for child in ranks:
                os.kill(child, getattr(signal, kill[1]))
            kill = None
        time.sleep(0.002)
    for child in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # data workers of a killed trainer
    return [codes[child] for child in ranks]


def main() -> None:
    """Attempt until finished; prints how each attempt ended."""
    plan = json.loads(sys.argv[1])
    from common import signals

    signals.install()  # inherited by the forks, as a real start has it from its first line
    import train.rank

    importlib.import_module({"train": "train.pretrain", "sft": "sft.finetune"}[plan.get("stage", "train")])
    if any("deepspeed" in word for one in plan["attempts"] for word in one["argv"]):
        import train.deepspeed  # noqa: F401

    for one in plan["attempts"]:
        metrics = Path(one["run"]) / "metrics.jsonl"
        began = last_step(metrics)
        codes = attempt(plan, one, metrics)
        print(json.dumps({"from": began, "to": last_step(metrics), "codes": codes}), flush=True)


if __name__ == "__main__":
    main()
