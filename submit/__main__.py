"""``python -m submit report | leaderboard | bundle``: show a run, compare runs, hand one in."""

import json
import sys
from collections.abc import Sequence

from common.command import run_command
from common.errors import UserError

DESCRIPTION = """\
python -m submit report RUN                 one page of a run: curves, scores, speed, memory, settings
python -m submit leaderboard RUNS…          runs and published entries, ranked as the competition does
python -m submit bundle RUN --out DIR       what the competition asks a team to hand in
Each has --help.
"""

REPORT = """\
Write report.html into a run folder: one file that needs nothing else.

examples:
  python -m submit report runs/demo
  python -m submit report runs/1b --serve          watch a running job in a browser
"""

LEADERBOARD = """\
Rank runs as the competition ranked its entries, beside what was published, and write a page.

examples:
  python -m submit leaderboard runs/125m-sft runs/1b-sft
  python -m submit leaderboard ours=runs/phi,runs/llama,runs/qwen      three compressed models are one entry of track 1
"""

BUNDLE = """\
Write what the competition's starting kit asks for, with a checklist of what is there and what is missing.

example:
  python -m submit bundle runs/demo --out bundle
"""


def main() -> None:
    """The command."""
    run_command(_main)


def _main() -> None:
    from common.settings import parse
    from submit.settings import BundleCommand, LeaderboardCommand, ReportCommand

    word, rest = (sys.argv[1:2] or [""])[0], sys.argv[2:]
    if word == "report":
        asked = parse(ReportCommand, _named("run", rest), prog="python -m submit report", description=REPORT)
        from submit.report import report_command

        report_command(asked)
    elif word == "leaderboard":
        words = [word for word in rest if word.startswith("--")]
        count = rest.index(words[0]) if words else len(rest)
        listed = ["--runs", json.dumps(rest[:count])] if count else []
        runs = parse(
            LeaderboardCommand,
            [*listed, *rest[count:]],
            prog="python -m submit leaderboard",
            description=LEADERBOARD,
        )
        from submit.leaderboard import leaderboard_command

        leaderboard_command(runs)
    elif word == "bundle":
        bundle = parse(BundleCommand, _named("run", rest), prog="python -m submit bundle", description=BUNDLE)
        from submit.bundle import bundle_command

        bundle_command(bundle)
    elif word in ("", "-h", "--help"):
        print(DESCRIPTION, end="")
    else:
        raise UserError(f"python -m submit {word} is no command; there are report, leaderboard and bundle")


def _named(name: str, words: Sequence[str]) -> list[str]:
    """The words with the flag of the first, where that is no flag itself."""
    return [f"--{name}", *words] if words and not words[0].startswith("-") else list(words)


if __name__ == "__main__":
    main()
