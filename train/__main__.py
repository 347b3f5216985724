"""``python -m train``: pre-train a language model."""

from common import signals

DESCRIPTION = """\
Pre-train a compact language model from text, and write a model folder that transformers loads.

examples:
  python train.py --size 1b                                  C4 from the hub, about 20 tokens a parameter
  python train.py --size 125m --data DIR --tokens 2e9        a folder of shards in C4's layout
  python train.py --size tiny --data sample --tokens 1M      offline, on a CPU, in minutes
The same command again goes on with the run where it stopped.
"""


def main() -> None:
    """The command: parse, train, and exit with 128 + the number of the signal that stopped it, if one did."""
    signals.install()  # first: SLURM may signal while the imports below are still running
    from common.command import run_command

    run_command(_main)


def _main() -> None:
    import sys

    from common.settings import parse
    from train.settings import TrainSettings

    settings = parse(TrainSettings, sys.argv[1:], prog="python train.py", description=DESCRIPTION)
    from train.pretrain import pretrain

    stopped = pretrain(settings)
    if stopped is not None:
        sys.exit(128 + stopped)


if __name__ == "__main__":
    main()
