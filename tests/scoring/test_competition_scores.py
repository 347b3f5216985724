"""The rules of extraction and the metrics, each on cases that tell it from its neighbours."""

import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scoring.competition import GROUPS, TASKS, Scored, extraction, group_score, score_rows, task_extras, task_score
from scoring.competition.data import read_rows
from scoring.competition.metrics import bleu, same_number

NGPT = {
    "temporal_sequences": 12.80,
    "disambiguation_qa": 26.80,
    "date_understanding": 17.60,
    "tracking_shuffled_objects_three_objects": 32.80,
    "tracking_shuffled_objects_five_objects": 21.20,
    "tracking_shuffled_objects_seven_objects": 11.20,
    "penguins_in_a_table": 15.75,
    "geometric_shapes": 0.00,
    "snarks": 52.81,
    "ruin_names": 20.80,
    "logical_deduction_three_objects": 31.60,
    "logical_deduction_five_objects": 16.00,
    "logical_deduction_seven_objects": 10.00,
    "hyperbaton": 52.80,
    "movie_recommendation": 25.60,
    "salient_translation_error_detection": 0.80,
    "reasoning_about_colored_objects": 16.80,
    "sports_understanding": 45.20,
    "boolean_expressions": 23.20,
    "formal_fallacies": 12.80,
    "causal_judgement": 3.74,
    "web_of_lies": 3.20,
    "multistep_arithmetic_two": 0.0,
    "navigate": 0.0,
    "dyck_languages": 0.0,
    "word_sorting": 0.0,
    "object_counting": 0.0,
}
"""Published BBH scores of a model of the competition, whose mean was given as 16.80."""


@pytest.mark.parametrize(
    ("rule", "text", "expected"),
    [
        ("commonsense_qa", "A: It burns. So the answer is C.\nQ: next So the answer is D.", "C"),  # the first
        ("commonsense_qa", "SO THE ANSWER IS\n\n B", "B"),
        ("commonsense_qa", "so the answer is a stove.", "a"),  # lower case is caught, and is wrong
        ("commonsense_qa", "So the answer is (C).", ""),
        ("commonsense_qa", "The answer is C.", ""),
        ("commonsense_qa", "So the answer is zebra. So the answer is E", "E"),
        ("chid", "选C。", "C"),
        ("chid", "HJT异质结电池", "H"),  # whatever letter it is
        ("chid", "答案是：É", "É"),
        ("chid", "不共戴天", ""),
        ("gsm8k", "He has 3 + 4 = 7.\nThe answer is 7", "7"),
        ("gsm8k", "It costs $1,000.", "000"),  # commas end a number
        ("gsm8k", "between 3 and -2.50", "-2.50"),
        ("gsm8k", "18\n\nQuestion: 5 and 6?\nThe answer is 11", "18"),  # goes on to ask itself
        ("gsm8k", "Question: 18", "NULL"),
        ("gsm8k", "eighteen", "NULL"),
        ("gsm8k", "18.", "18"),
        ("humaneval", "Sure:\n```python\n    return 1\n```\nor\n```\n    return 2\n```", "    return 1\n"),
        ("humaneval", "    return 1\n\ndef other():\n    pass", "    return 1\n\ndef other():\n    pass"),
        ("humaneval", "```python\n    return 1", "```python\n    return 1"),  # cut off before its end
        ("bbh_snarks", "I think (B). So the answer is (A).", "A"),
        ("bbh_snarks", "So the answer is (A). And the answer is (B).", "A"),
        ("bbh_snarks", "So the answer is B, not (A).", "A"),  # brackets before capitals
        ("bbh_snarks", "So the answer is Both.", "B"),
        ("bbh_snarks", "I say (B) or (A)", "B"),
        ("bbh_snarks", "none of them", "none of them"),
        ("bbh_snarks", "So the answer is none (A", "A"),
        ("bbh_navigate", "We are back. So the answer is Yes.", "Yes"),
        ("bbh_navigate", "So the answer is Yes.\nQ: next", "Yes"),
        ("bbh_navigate", "So the answer is Yes. Q: next", "Yes. Q: next"),  # nothing else ends the line
        ("bbh_navigate", "So the answer is \n No.", "No"),
        ("bbh_navigate", "So the answer is **Yes** indeed.", "Yes"),
        ("bbh_navigate", "So the answer is yes.", "yes"),
        ("bbh_navigate", "Yes\nbecause", "Yes"),
        ("bbh_dyck_languages", "So the answer is ] } ..", "] } ."),  # one full stop
        ("truthfulqa", " As it is.\n", " As it is.\n"),
    ],
)
def test_extraction(rule: str, text: str, expected: str) -> None:
    assert TASKS[rule].extract(text) == expected


_PIECES = [
    *("answer is ", "answer is", "so the answer is", "So the answer is ", "Question:", "Question", "```", "```py\n"),
    *("\n", " ", ".", "(A)", "(B", "A", "b", "(c)", "**", "1,000", "-3.5", "x = 1", "Yes", "不", "É", "\r\n", "\u2028"),
]


@pytest.mark.parametrize("rule", ["commonsense_qa", "chid", "gsm8k", "humaneval", "bbh_snarks", "bbh_navigate"])
@settings(max_examples=150, deadline=None)
@given(pieces=st.lists(st.sampled_from(_PIECES), max_size=12), cut=st.integers(0, 12))
def test_an_early_stop_never_changes_what_is_extracted(rule: str, pieces: list[str], cut: int) -> None:
    task = TASKS[rule]
    so_far, whole = "".join(pieces[:cut]), "".join(pieces)
    if task.finished(so_far):
        assert task.extract(so_far) == task.extract(whole)
        assert task.finished(whole)


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        ("commonsense_qa", "A: It burns. So the answer is C"),
        ("chid", "答：C"),
        ("gsm8k", "The answer is 7\n\nQuestion:"),
        ("humaneval", "```python\nreturn 1\n```"),
        ("bbh_snarks", "So the answer is (A"),
        ("bbh_navigate", "So the answer is Yes.\n"),
    ],
)
def test_generation_stops_as_soon_as_the_answer_is_final(rule: str, text: str) -> None:
    assert TASKS[rule].finished(text)
    assert not TASKS[rule].finished(text[:-1])


def test_nothing_stops_an_answer_to_truthfulqa() -> None:
    assert not TASKS["truthfulqa"].finished("Nothing happens.\n\nQuestion: A")


@pytest.mark.parametrize(
    ("text", "gold", "correct"),
    [
        *[("18", "18", True), ("18.0", "18", True), ("18.0000001", "18", True), ("18.00001", "18", False)],
        *[("000", "1000", False), ("-18", "18", False), ("NULL", "18", False), ("٣", "3", True)],
    ],
)
def test_numbers_are_compared_as_numbers(text: str, gold: str, correct: bool) -> None:
    assert same_number(text, gold) == Scored(text, correct)


def test_gold_answers_go_through_their_rules() -> None:
    assert TASKS["gsm8k"].gold({"answer": "He <<1000+70=1070>>pays.\n#### 1,070"}) == "1070"
    assert TASKS["bbh_snarks"].gold({"target": "(A)"}) == "A"
    assert TASKS["bbh_movie_recommendation"].gold({"target": "Monsters, Inc"}) == "M"
    assert TASKS["bbh_navigate"].gold({"target": "No"}) == "No"


def test_exact_tasks_are_case_sensitive() -> None:
    rows = [{"answer": "A"}] * 3
    scored = score_rows(TASKS["commonsense_qa"], rows, ["So the answer is A", "So the answer is a", "A"])
    assert scored == [Scored("A", True), Scored("a", False), Scored("", False)]
    assert task_score(TASKS["commonsense_qa"], scored) == pytest.approx(100 / 3)


QUESTION = {
    "question": "What happens?",
    "best_answer": "Nothing happens to you at all",
    "correct_answers": ["Nothing happens to you at all", "It passes"],
    "incorrect_answers": ["You grow watermelons in your stomach", "You die"],
}


def test_truthfulqa_is_bleu_against_both_kinds_of_answers() -> None:
    task = TASKS["truthfulqa"]
    outputs = [
        "Nothing happens to you at all",
        "You grow watermelons in your stomach",
        "You die",  # too short for four words in a row: 0 against 0 is a miss
        " \n",  # blank: does not count
        "I have no comment.",  # correct even where it is not listed
    ]
    scored = score_rows(task, [QUESTION] * 5, outputs)
    assert [one.correct for one in scored] == [True, False, False, None, True]
    assert task_score(task, scored) == 50.0
    assert task_extras(task, scored) == {"bleu_max": 0.5, "bleu_diff": 0.25}
    assert task_score(task, scored[3:4]) is None
    assert QUESTION["correct_answers"] == ["Nothing happens to you at all", "It passes"]


def test_bleu_is_that_of_sacrebleu_without_smoothing() -> None:
    from sacrebleu.metrics import BLEU

    peer, rng = BLEU(smooth_method="none", tokenize="13a"), random.Random(0)
    words = "the cat sat on a mat , . isn't 3.5 1,000 9-5 &amp; \n (so) U.S.".split(" ")
    for _ in range(500):
        text, reference = (" ".join(rng.choices(words[: rng.randint(2, 16)], k=rng.randint(1, 14))) for _ in range(2))
        expected = peer.sentence_score(text, [reference]).score / 100
        assert bleu(text, reference) == pytest.approx(expected, abs=1e-9)
    assert bleu("the cat sat down", "The cat sat down") == 0.0
    assert bleu("<skipped>", "I have no comment.") == 0.0


def test_bbh_is_the_unweighted_mean_of_its_subtasks() -> None:
    scores = {f"bbh_{name}": score for name, score in NGPT.items()}
    assert set(scores) == set(GROUPS["bbh"])
    assert round(group_score("bbh", scores), 2) == 16.80
    assert group_score("bbh", scores | {"gsm8k": 100.0}) == group_score("bbh", scores)
    assert group_score("bbh", scores | {"bbh_snarks": None}) is None


@pytest.mark.parametrize(
    ("name", "right", "published"),
    [
        *[("commonsense_qa", 890, 72.89), ("chid", 1390, 69.43), ("humaneval", 112, 68.29), ("gsm8k", 1113, 84.38)],
        *[("chid", 262, 13.09), ("gsm8k", 18, 1.36), ("commonsense_qa", 109, 8.93)],
    ],
)
def test_published_scores_are_fractions_of_our_rows(name: str, right: int, published: float) -> None:
    task = TASKS[name]
    score = task_score(task, [Scored("", number < right) for number in range(task.rows)])
    assert round(score, 2) == published


def test_programs_that_were_not_run_do_not_count() -> None:
    rows = [{"prompt": "def f():\n", "test": "def check(f):\n    assert f() == 1\n", "entry_point": "f"}]
    task = TASKS["humaneval"]
    assert task.program(rows[0], "    return 1\n") == (
        "def f():\n    return 1\n\ndef check(f):\n    assert f() == 1\n\ncheck(f)"
    )
    scored = score_rows(task, rows, ["    return 1\n"])
    assert scored == [Scored("    return 1\n", None)]
    assert task_score(task, scored) is None


def test_chances_are_those_of_the_options_in_the_data(shared) -> None:
    for name in GROUPS["bbh"]:
        task, rows = TASKS[name], read_rows(TASKS[name], shared / "datasets" / "eval")
        if task.extract is extraction.choice_of_bbh:
            counts = [len(re.findall(r"^\([A-Z]\) ", row["input"].split("Options:")[-1], re.MULTILINE)) for row in rows]
            assert task.chance == pytest.approx(100 * sum(1 / count for count in counts) / len(counts), abs=0.3)
        else:
            answers = {row["target"] for row in rows}
            assert task.chance == (50.0 if len(answers) == 2 else 0.0)
