"""What each process of a training job does, and how it ends when it or another one fails."""

import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

import torch.distributed as dist

from common import signals
from common.distributed import is_lost_contact, lost_to, tell_failure
from common.errors import UserError
from train.launch import Place
from train.slurm import requeue


def run_rank(train: Callable[[], signal.Signals | None], place: Place) -> None:
    """Train; exits with 128 + the number of the signal that stopped the run, if one did.

    Args:
        train: returns that signal.
        place: of this process in its job.

    SIGUSR1 under SLURM means that the time is nearly up: the job is put into the queue again. SIGTERM
    does not: it comes from ``scancel`` too, whose user wants the job gone.
    """
    try:
        stopped = train()
    except BaseException as error:
        if place.world_size == 1:
            raise
        _end(error, place)
    signals.ignore()  # nothing is left to save, and Python at its end would give them back their deadly defaults
    if stopped == signal.SIGUSR1 and place.rank == 0:
        requeue(os.environ)
    if dist.is_initialized():
        if stopped is not None:
            dist.barrier()  # srun ends the job at the first rank that exits, and that must not be before the line above
        dist.destroy_process_group()
    if stopped is not None:
        sys.exit(128 + stopped)


def _end(error: BaseException, place: Place) -> NoReturn:
    """Say what happened, once over all ranks and the cause before its consequences; ends this process at once.

    At once, because an orderly end would wait for threads and process groups that wait for lost ranks.
    """
    code = 1
    if isinstance(error, UserError):
        code = 2
        # Before the ranks have met each finds the same errors, and rank 0 speaks for all.
        if tell_failure(error) and (dist.is_initialized() or place.rank == 0):
            print(f"error: {error}", file=sys.stderr)
    elif is_lost_contact(error):
        cause = lost_to()
        if cause is None:  # killed, or its machine is gone; or it is no lost contact at all
            traceback.print_exception(error)
            cause = f"another rank was killed, or its machine is gone, if it is not this: {error}"
        print(f"rank {place.rank} ends, for it lost contact: {cause}", file=sys.stderr)
    elif isinstance(error, KeyboardInterrupt):
        code = 130
    else:
        tell_failure(error)
        print(f"rank {place.rank} failed:\n{''.join(traceback.format_exception(error))}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
