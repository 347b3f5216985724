"""``python -m sft MODEL``: fine-tune a model folder; ``python -m sft chat MODEL``: talk to one."""

from common import signals

DESCRIPTION = """\
Fine-tune a model folder on conversations, by default Alpaca and Chinese Alpaca, and write a model folder.

examples:
  python -m sft runs/1b/model                                      both Alpacas from the hub, three epochs
  python -m sft runs/1b/model --data alpaca_data.json.gz=1,alpaca_zh.json=1
  python -m sft runs/1b/model --show 3                             what is learned, token by token
  python -m sft Llama-3-8B --lora.rank 16 --devices 8              adapters, merged at the end
  python -m sft pruned --teacher Llama-3-8B --tokens 50M           recover a pruned model from the whole one
  python -m sft runs/demo/pretrain/model --data sample --epochs 20      offline, on a CPU, in a minute
The same command again goes on with the run where it stopped.

python -m sft chat MODEL                        talk to a model in the terminal
python -m sft formats --out formats.jsonl       examples of answer formats, made from the Alpacas, to mix in
"""


def main() -> None:
    """The command: fine-tune, and exit with 128 + the number of the signal that stopped it, if one did."""
    import sys

    from common.command import run_command

    word, rest = (sys.argv[1:2] or [""])[0], sys.argv[2:]
    if word == "chat":
        from sft.chat import chat_command

        run_command(lambda: chat_command(rest))
        return
    if word == "formats":
        from sft.formats_command import formats_command

        run_command(lambda: formats_command(rest))
        return
    # What trains saves when it is signalled. Before anything heavy: SLURM may signal during the imports below.
    signals.install()
    from train.launch import end_with_parent

    end_with_parent()
    run_command(_main)


def _main() -> None:
    import sys
    from pathlib import Path

    from common.settings import parse
    from models.folder import check_model
    from sft.settings import SftCommand, sft_settings

    command = parse(
        SftCommand,
        sys.argv[1:],
        prog="python -m sft",
        description=DESCRIPTION,
        positional="model",
        commands=("chat", "formats"),
    )
    if command.show is not None:
        signals.clear()  # there is nothing to save
        from sft.finetune import show_data

        show_data(command)
        return
    for folder in filter(None, (command.model, command.teacher)):
        check_model(Path(folder))  # before the imports below, which take seconds
    from train.launch import join, prepare_environment

    prepare_environment()
    place = join(command.devices, command.nodes)
    from sft.finetune import finetune
    from train.rank import run_rank

    run_rank(lambda: finetune(sft_settings(command), place), place)


if __name__ == "__main__":
    main()
