"""``python -m submit report | leaderboard | bundle``: show a run, compare runs, hand one in."""

import sys

from common.command import run_command

DESCRIPTION = """\
python -m submit report RUN                 one page of a run: curves, scores, speed, memory, settings
python -m submit leaderboard RUNS…          runs and published entries, ranked as the competition does
python -m submit bundle RUN --out DIR       what the competition asks a team to hand in
Each has --help.
"""

REPORT = """\
Write report.html into a run folder: one file that needs nothing else.

examples:
  python -m submit report runs/demo/prune/recovered
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
  python -m submit bundle runs/demo/prune/recovered --out bundle
"""


def main() -> None:
    """The command."""
    run_command(_main)


def _main() -> None:
    from common.settings import parse
    from common.words import no_command
    from submit.settings import BundleCommand, LeaderboardCommand, ReportCommand

    word, rest = (sys.argv[1:2] or [""])[0], sys.argv[2:]
    if word == "report":
        asked = parse(ReportCommand, rest, prog="python -m submit report", description=REPORT, positional="run")
        from submit.report import report_command

        report_command(asked)
    elif word == "leaderboard":
        prog = "python -m submit leaderboard"
        runs = parse(LeaderboardCommand, rest, prog=prog, description=LEADERBOARD, positional="runs")
        from submit.leaderboard import leaderboard_command

        leaderboard_command(runs)
    elif word == "bundle":
        bundle = parse(BundleCommand, rest, prog="python -m submit bundle", description=BUNDLE, positional="run")
        from submit.bundle import bundle_command

        bundle_command(bundle)
    elif word in ("", "-h", "--help"):
        print(DESCRIPTION, end="")
    else:
        raise no_command("python -m submit", word, ("report", "leaderboard", "bundle"))


if __name__ == "__main__":
    main()
