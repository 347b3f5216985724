"""``python -m sft formats``: examples of answer formats, made from conversations, to mix into their fine-tuning."""

from dataclasses import dataclass
from pathlib import Path

from common.settings import Count, option, parse, to_dict
from data.settings import Mix

DESCRIPTION = """\
Make examples of the forms that answers are scored in (a lettered choice, "the answer is", a Chinese cloze, a Python
function) from conversations alone, so that a model trained on them stays within the rules on data.

example:
  python -m sft formats --data alpaca=1,alpaca_zh=1 --count 5000 --out formats.jsonl
  python -m sft runs/1b/model --data alpaca=0.45,alpaca_zh=0.45,formats.jsonl=0.1
"""


@dataclass
class FormatsSettings:
    """What to make the examples of."""

    data: Mix = option(Mix.parse("alpaca=1,alpaca_zh=1"))
    """Sources as python -m sft takes them; weights do not count."""
    count: Count = option(Count(5_000))
    """Examples to make, of every form as many."""
    seed: int = 0
    """Decides which rows they are made of."""
    out: str = "formats.jsonl"
    """File to write, JSON lines of messages."""

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"--count must be at least 1, not {self.count}")


def formats_command(argv: list[str]) -> None:
    """Parse, make the examples and write them."""
    settings = parse(FormatsSettings, argv, prog="python -m sft formats", description=DESCRIPTION)
    from common.console import Console
    from sft.formats import make_examples, write_examples
    from sft.sources import open_sources

    console = Console()
    console.settings("examples of answer formats", to_dict(settings))
    sources = open_sources(settings.data)
    conversations = [one for source in sources for one in source.train]  # what is held out stays so
    examples = make_examples(conversations, settings.count, settings.seed)
    write_examples(Path(settings.out), examples, [source.origin for source in sources])
    question, answer = examples[0].turns
    console.say(f"the first of {len(examples):,}:\n{question[1]}\n→ {answer[1]}")
    console.say(f"examples: {settings.out}\nnext: python -m sft MODEL --data '{settings.data},{settings.out}=0.1'")
