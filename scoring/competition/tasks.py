"""The table of tasks, in the order of the competition's own table."""

from functools import partial
from types import MappingProxyType

from scoring.competition import extraction, metrics, prompts
from scoring.competition.task import Row, Scored, Task

FIXED_LENGTH = 512
"""New tokens of the tasks that OpenCompass's --max-out-len does not reach."""


def _answer(row: Row) -> str:
    return str(row["answer"])


def _judge_answer(extracted: str, row: Row) -> Scored:
    return metrics.exact(extracted, _answer(row))


def _gsm8k_gold(row: Row) -> str:
    """What follows ``#### ``, without commas."""
    return str(row["answer"]).split("#### ")[1].replace(",", "")


def _choice_gold(row: Row) -> str:
    """By the rule for what a model writes: three rows give the option's text in place of its letter."""
    return extraction.choice_of_bbh(row["target"])


def _free_form_gold(row: Row) -> str:
    return str(row["target"])


def _humaneval_program(row: Row, code: str) -> str:
    """The head of the function, what the model made of it, and the tests."""
    return f"{row['prompt']}{code}\n{row['test']}\ncheck({row['entry_point']})"


def _bbh(subtask: str, chance: float, rows: int = 250, *, choices: bool) -> Task:
    gold = _choice_gold if choices else _free_form_gold
    return Task(
        name=f"bbh_{subtask}",
        group="bbh",
        rows=rows,
        chance=chance,
        max_new_tokens=FIXED_LENGTH,
        files=(f"bbh/bbh/{subtask}.json", f"BBH/data/{subtask}.json"),
        turns=partial(prompts.ask_bbh, subtask=subtask),
        extract=extraction.choice_of_bbh if choices else extraction.free_form_of_bbh,
        finished=extraction.has_choice_of_bbh if choices else extraction.has_free_form_of_bbh,
        gold=gold,
        judge=lambda extracted, row: metrics.exact(extracted, gold(row)),
    )


# Chances are means over the rows of one in so many options.
_BBH = (
    _bbh("temporal_sequences", 25.0, choices=True),
    _bbh("disambiguation_qa", 33.2, choices=True),
    _bbh("date_understanding", 17.2, choices=True),
    _bbh("tracking_shuffled_objects_three_objects", 33.3, choices=True),
    _bbh("penguins_in_a_table", 20.0, rows=146, choices=True),
    _bbh("geometric_shapes", 9.8, choices=True),
    _bbh("snarks", 50.0, rows=178, choices=True),
    _bbh("ruin_names", 25.0, choices=True),
    _bbh("tracking_shuffled_objects_seven_objects", 14.3, choices=True),
    _bbh("tracking_shuffled_objects_five_objects", 20.0, choices=True),
    _bbh("logical_deduction_three_objects", 33.3, choices=True),
    _bbh("hyperbaton", 50.0, choices=True),
    _bbh("logical_deduction_five_objects", 20.0, choices=True),
    _bbh("logical_deduction_seven_objects", 14.3, choices=True),
    _bbh("movie_recommendation", 24.6, choices=True),
    _bbh("salient_translation_error_detection", 16.7, choices=True),
    _bbh("reasoning_about_colored_objects", 12.1, choices=True),
    _bbh("multistep_arithmetic_two", 0.0, choices=False),
    _bbh("navigate", 50.0, choices=False),
    _bbh("dyck_languages", 0.0, choices=False),
    _bbh("word_sorting", 0.0, choices=False),
    _bbh("sports_understanding", 50.0, choices=False),
    _bbh("boolean_expressions", 50.0, choices=False),
    _bbh("object_counting", 0.0, choices=False),
    _bbh("formal_fallacies", 50.0, choices=False),
    _bbh("causal_judgement", 50.0, rows=187, choices=False),
    _bbh("web_of_lies", 50.0, choices=False),
)

_ALL = (
    Task(
        name="commonsense_qa",
        group="commonsense_qa",
        rows=1_221,
        chance=20.0,
        max_new_tokens=None,
        files=("commonsenseqa/dev_rand_split.jsonl",),
        turns=prompts.ask_commonsense_qa,
        extract=extraction.letter_of_commonsense_qa,
        finished=extraction.has_letter_of_commonsense_qa,
        gold=_answer,
        judge=_judge_answer,
        leading_newline=True,
    ),
    *_BBH,
    Task(
        name="gsm8k",
        group="gsm8k",
        rows=1_319,
        chance=0.0,
        max_new_tokens=FIXED_LENGTH,
        files=("gsm8k/test.jsonl",),
        turns=prompts.ask_gsm8k,
        extract=extraction.last_number,
        finished=extraction.asks_again,
        gold=_gsm8k_gold,
        judge=lambda extracted, row: metrics.same_number(extracted, _gsm8k_gold(row)),
    ),
    Task(
        name="humaneval",
        group="humaneval",
        rows=164,
        chance=0.0,
        max_new_tokens=FIXED_LENGTH,
        files=("humaneval/HumanEval.jsonl", "humaneval/human-eval-v2-20210705.jsonl"),
        turns=prompts.ask_humaneval,
        extract=extraction.code_of_humaneval,
        finished=extraction.has_code_block,
        gold=lambda row: str(row["canonical_solution"]),
        judge=None,
        program=_humaneval_program,
    ),
    Task(
        name="chid",
        group="chid",
        rows=2_002,
        chance=100 / 7,
        max_new_tokens=None,
        files=("chid/test_public.json", "FewCLUE/chid/test_public.json"),
        turns=prompts.ask_chid,
        extract=extraction.first_capital,
        finished=extraction.has_capital,
        gold=_answer,
        judge=_judge_answer,
    ),
    Task(
        name="truthfulqa",
        group="truthfulqa",
        rows=817,
        chance=0.0,
        max_new_tokens=None,
        files=("truthfulqa/TruthfulQA.csv", "TruthfulQA/TruthfulQA.csv", "TruthfulQA.csv"),
        turns=prompts.ask_truthfulqa,
        extract=extraction.whole,
        finished=extraction.never,
        gold=lambda row: str(row["best_answer"]),
        judge=metrics.more_like_the_truth,
    ),
)

TASKS = MappingProxyType({task.name: task for task in _ALL})
"""All 32 by name."""

GROUPS = MappingProxyType(
    {group: tuple(task.name for task in _ALL if task.group == group) for group in dict.fromkeys(t.group for t in _ALL)}
)
"""The six of the competition's table, each with the names of its tasks."""
