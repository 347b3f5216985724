"""``python -m pruning MODEL``: cut a model folder; ``python -m pruning import MODEL``: make a Qwen one that can be."""

DESCRIPTION = """\
Cut a model folder to a smaller plain one: fewer layers, feed-forward units, heads or tokens, the same architecture.
Takes Llama, Qwen2, Qwen3, Phi and our own. A model may be larger than memory: it goes through block by block.

examples:
  python -m pruning Llama-3-8B --phone-memory 8GB --plan           the shapes that fit a phone, and nothing else
  python -m pruning Llama-3-8B --phone-memory 8GB --recover        cut, then learn from the whole model, on C4
  python -m pruning phi-2 --params 0.8 --score competition         20% fewer parameters, scored before and after
  python -m pruning phi-2 --params 0.8 --method l1 --repair false  the competition's baseline
  python -m pruning SmolLM2 --ffn 1016 --calibration c4-slice      a shape by hand, text in a folder
  python -m pruning runs/demo/sft/model --params 0.8 --calibration sample --score sample      offline, on a CPU

python -m pruning import Qwen-7B                                   a first-generation Qwen as an equal Qwen2
"""

IMPORT = """\
Make a first-generation Qwen (Qwen-7B, Qwen-1_8B, with or without -Chat) an equal Qwen2, without running its code.

example:
  python -m pruning import Qwen-7B --out Qwen-7B-qwen2
"""


def main() -> None:
    """The command."""
    from common.command import run_command

    run_command(_main)


def _main() -> None:
    import sys

    from common.settings import parse
    from pruning.settings import ImportCommand, PruneCommand

    word, rest = (sys.argv[1:2] or [""])[0], sys.argv[2:]
    if word == "import":
        prog = "python -m pruning import"
        command = parse(ImportCommand, rest, prog=prog, description=IMPORT, positional="model")
        from pruning.qwen1 import import_command

        import_command(command)
        return
    asked = parse(
        PruneCommand,
        sys.argv[1:],
        prog="python -m pruning",
        description=DESCRIPTION,
        positional="model",
        commands=("import",),
    )
    from pruning.outline import show_outline

    outline = show_outline(asked)
    if asked.plan:
        outline.console.say("next: the same command without --plan")
        return
    from pruning.command import prune_command

    prune_command(outline)


if __name__ == "__main__":
    main()
