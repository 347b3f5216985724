"""A stage that takes no time: it writes what it has read, and does as its settings say."""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

from common.settings import parse


@dataclass
class StandIn:
    """A command for tests."""

    source: str | None = None
    """File to read."""
    text: str = ""
    """What is written behind it."""
    out: str = "out"
    """Folder to write."""
    seconds: float = 0.0
    """How long it takes."""
    code: int = 0
    """How it ends."""


def main() -> None:
    asked = parse(StandIn, sys.argv[1:], prog="", description="")
    out = Path(asked.out)
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "starts", "a") as file:
        file.write("started\n")
    print(f"reading {asked.source}")
    time.sleep(asked.seconds)
    if asked.code:
        print("it cannot be done", file=sys.stderr)
        sys.exit(asked.code)
    read = (Path(asked.source) / "result" if Path(asked.source).is_dir() else Path(asked.source)).read_text()
    (out / "result").write_text(read + asked.text)


if __name__ == "__main__":
    main()
