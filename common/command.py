"""How a command ends."""

import sys
from collections.abc import Callable

from common.errors import UserError


def run_command(main: Callable[[], None]) -> None:
    """Run a command's main function; a UserError becomes one message and exit code 2."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(130)
