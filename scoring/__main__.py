"""``python -m scoring MODEL``: score a model folder; ``prompts`` and ``rescore``: open books."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from common.command import run_command
from common.errors import UserError

if TYPE_CHECKING:
    from scoring.settings import PromptsSettings, RescoreSettings, ScoreCommand

DESCRIPTION = """\
Score a model folder and write score.json and Results.csv.

examples:
  python -m scoring runs/1b/model                                  the competition's six tasks, data from the hub
  python -m scoring runs/1b/model --data eval --limit 50           local data, 50 rows of each task
  python -m scoring runs/1b/model --suite quick,c4                 likelihood tasks, and perplexity on C4
  python -m scoring Llama-3-8B --engine vllm                       with vLLM, where it is installed
  python -m scoring runs/demo/sft/model --suite sample             offline, on a CPU, in a minute
The same command again goes on where it stopped.

python -m scoring prompts --data eval --out prompts.jsonl       every prompt as it would be sent
python -m scoring rescore answers.jsonl --data eval             score answers that were made elsewhere
"""


def main() -> None:
    """The command."""
    run_command(_main)


def _main() -> None:
    from common.settings import parse
    from scoring.settings import PromptsSettings, RescoreSettings, ScoreCommand

    word, rest = (sys.argv[1:2] or [""])[0], sys.argv[2:]
    if word == "prompts":
        about = "Write every prompt as it would be sent: JSON lines of task, row, prompt.\n\nexample:\n  "
        about += "python -m scoring prompts --suite competition --data eval --out prompts.jsonl\n"
        _write_prompts(parse(PromptsSettings, rest, prog="python -m scoring prompts", description=about))
        return
    if word == "rescore":
        about = "Score given answers, JSON lines of task, row, output, without a model.\n\nexample:\n  "
        about += "python -m scoring rescore answers.jsonl --data eval\n"
        prog = "python -m scoring rescore"
        _rescore(parse(RescoreSettings, rest, prog=prog, description=about, positional="answers"))
        return
    command = parse(
        ScoreCommand,
        sys.argv[1:],
        prog="python -m scoring",
        description=DESCRIPTION,
        positional="model",
        commands=("prompts", "rescore"),
    )
    _score(command)


def _score(command: "ScoreCommand") -> None:
    from common.console import Console
    from common.settings import to_dict
    from models.folder import check_model
    from scoring.settings import data_folder, out_folder

    if not command.model:
        raise UserError("which model? python -m scoring MODEL, a model folder such as runs/NAME/model")
    console, folder = Console(), Path(command.model)
    check_model(folder)  # these two before the settings are shown, and before an import that takes seconds
    data_folder(command.data)
    console.settings(f"score {folder}", to_dict(command))
    from scoring.score import score

    found = score(folder, command, console)
    out = out_folder(folder, command)
    console.table(f"{folder}" + "".join(f" · {mark}" for mark in found.marks), found.rows())
    console.say(f"\nscores: {out / 'score.json'}, {out / found.csv_name}")
    console.say(f"check:  python -m scoring rescore {out / 'answers.jsonl'} --data DIR, with the data of this run")


def _write_prompts(settings: "PromptsSettings") -> None:
    from scoring.competition import TASKS
    from scoring.competition.open_books import write_prompts
    from scoring.sample import FOLDER

    template = None
    if settings.template_of is not None:
        from scoring.harness import render_chat
        from scoring.loading import load_tokenizer

        tokenizer = load_tokenizer(Path(settings.template_of))
        template = lambda messages: render_chat(tokenizer, messages)  # noqa: E731
    data = _data(settings.suite, settings.data)
    names = [
        name for name, task in TASKS.items() if data != FOLDER or any((data / file).exists() for file in task.files)
    ]
    count = write_prompts(Path(settings.out), data, names, settings.limit, seed=settings.seed, template=template)
    print(f"{count:,} prompts: {settings.out}")


def _rescore(settings: "RescoreSettings") -> None:
    from common.console import Console
    from common.files import write_json
    from scoring.competition.open_books import rescore

    if not settings.answers:
        raise UserError("which answers? python -m scoring rescore answers.jsonl")
    answers, console = Path(settings.answers), Console()
    out = Path(settings.out) if settings.out else answers.with_suffix(".scored.jsonl")
    summary = out.with_suffix(".json")
    if summary.absolute() in (out.absolute(), answers.absolute()):
        raise UserError(
            f"the summary of --out {out} would be written over {summary}; choose another name, ending in .jsonl"
        )
    data = _data(settings.suite, settings.data)
    found = rescore(answers, data, out=out, unsafe=settings.unsafe_code_execution)
    for warning in found["warnings"]:
        console.warn(warning)
    shown = {name: "not run" if score is None else f"{score:6.2f}" for name, score in found["groups"].items()}
    console.table(f"{answers}" + (" · sample, no benchmark" if settings.suite == "sample" else ""), shown)
    write_json(summary, found)
    console.say(f"\neach answer: {out}\nsummary:     {summary}")


def _data(suite: str, data: str | None) -> "Path | None":
    from scoring.sample import FOLDER
    from scoring.settings import data_folder

    return FOLDER if suite == "sample" else data_folder(data)


if __name__ == "__main__":
    main()
