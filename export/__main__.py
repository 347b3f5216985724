"""``python -m export MODEL``: make what a phone takes; ``bench DIR`` and ``phone DIR``: measure it here and there."""

DESCRIPTION = """\
Export a model folder for phones: weights and configuration for MLC-LLM in fp16, compiled libraries, proof of parity.
Takes Llama, Qwen2, Qwen3, Phi and our own.

examples:
  python -m export runs/1b/model                                   for MLC-LLM, with a library for this machine
  python -m export runs/1b/model --target host,android-cpu         and one to measure on a phone over adb
  python -m export Llama-3-8B --parity skip                        larger than this machine's memory
  python -m export runs/1b/model --with-mlc                        with MLC-LLM's own tools, where they are installed

python -m export bench runs/1b/export                              throughput here
python -m export phone runs/1b/export                              throughput on a connected phone
"""

BENCH = """\
Measure prefill, decode, first token and memory of an exported folder on this machine, transformers beside it.

example:
  python -m export bench runs/1b/export --threads 1,2
"""

PHONE = """\
Measure an exported folder on a phone that is connected over adb. Without one nothing is measured, and the exit code
is 3.

example:
  python -m export phone runs/1b/export
"""


def main() -> None:
    """The command."""
    from common.command import run_command

    run_command(_main)


def _main() -> None:
    import sys

    from common.settings import parse
    from export.settings import BenchCommand, ExportCommand, PhoneCommand, checked_folders

    word, rest = (sys.argv[1:2] or [""])[0], sys.argv[2:]
    if word == "bench":
        bench = parse(BenchCommand, rest, prog="python -m export bench", description=BENCH, positional="folder")
        from export.bench import bench_command

        bench_command(bench)
    elif word == "phone":
        phone = parse(PhoneCommand, rest, prog="python -m export phone", description=PHONE, positional="folder")
        from export.phone import phone_command

        phone_command(phone)
    else:
        asked = parse(
            ExportCommand,
            sys.argv[1:],
            prog="python -m export",
            description=DESCRIPTION,
            positional="model",
            commands=("bench", "phone"),
        )
        checked_folders(asked)  # before the imports below, which take seconds
        from export.command import export_command

        export_command(asked)


if __name__ == "__main__":
    main()
