"""``python -m train``: pre-train a language model; ``python -m train consolidate``: a checkpoint to a model folder."""

from common import signals

DESCRIPTION = """\
Pre-train a compact language model from text, and write a model folder that transformers loads.

examples:
  python train.py --size 1b                                  C4 from the hub, about 20 tokens a parameter
  python train.py --size 125m --data DIR --tokens 2e9        a folder of shards in C4's layout
  python train.py --size tiny --data sample --tokens 1M      offline, on a CPU, in minutes
  python train.py --size 1b --devices 8                      all eight GPUs of this machine
  python train.py --size 1b --plan --devices 8 --nodes 4 --gpu h100-80g --price 2.5
  python train.py --recipe galore-60m --optimizer.name muon  GaLore's protocol on C4, with another optimiser
  python train.py --size 1b --slurm nodes=4,gpus=8,time=24:00:00
  python train.py --init pruned --teacher Llama-3-8B --tokens 50M      recover a pruned model from the whole one
The same command again goes on with the run where it stopped.

python train.py consolidate RUN     makes a model folder of a run's newest checkpoint
"""


def main() -> None:
    """The command: parse, train, and exit with 128 + the number of the signal that stopped it, if one did."""
    signals.install()  # first: SLURM may signal while the imports below are still running
    from train.launch import end_with_parent

    end_with_parent()
    from common.command import run_command

    run_command(_main)


def _main() -> None:
    import sys

    if sys.argv[1:2] == ["consolidate"]:
        from train.consolidate import consolidate_command

        consolidate_command(sys.argv[2:])
        return
    from common.settings import parse
    from train.settings import TrainCommand, run_settings

    command = parse(
        TrainCommand, sys.argv[1:], prog="python train.py", description=DESCRIPTION, commands=("consolidate",)
    )
    if command.plan:
        from train.plan_table import print_plan

        print_plan(command)
        return
    if command.slurm is not None:
        from train.submit import submit

        submit(command, sys.argv[1:])
        return
    from train.launch import join, prepare_environment

    prepare_environment()
    place = join(command.devices, command.nodes)
    from train.pretrain import pretrain
    from train.rank import run_rank

    run_rank(lambda: pretrain(run_settings(command), place), place)


if __name__ == "__main__":
    main()
