"""How a command begins and ends."""

import os
import sys
from collections.abc import Callable

from common.errors import UserError

SPINS = "1000"
"""Rounds that a thread of OpenMP (libgomp, torch's on Linux) waits awake for the others of its program. With libgomp's
300,000 a second program on the same cores makes both ten times slower; alone they gain nothing (docs/log.md)."""


def run_command(main: Callable[[], None]) -> None:
    """Run a command's main function; a UserError becomes one message and exit code 2.

    Before torch is imported: libgomp reads its settings once.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(130)
