"""Rows that hold evaluation questions are found, and only they."""

import csv
import gzip
import json
from pathlib import Path

import pytest

from common.errors import UserError
from sft import overlap as overlap_module
from sft.overlap import Match, Overlap

ENGLISH = "The blue lamp is useful for reading late at night, but it also warns the whole street of something what?"
CHINESE = "小镇的集市每逢初一便#idiom#,远近的人都挑着担子,赶来换些盐米。孩子们跟在后面,笑声不断。"
SHORT = "Where would nobody keep wet paint brushes tonight?"  # 8 tokens
CODE = 'def widest_gap(heights, limit):\n    """ Give the widest gap between two heights that is under the limit."""\n'


def write_lines(path: Path, records: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The six tasks in their published formats, a question or two each."""
    root = tmp_path_factory.mktemp("eval")
    choices = [{"label": "A", "text": "an answer of very many words that could be found in any row of training data"}]
    question = {"question_concept": "lamp", "choices": choices, "stem": ENGLISH}
    write_lines(root / "commonsenseqa/dev.jsonl", [{"id": "1", "answerKey": "A", "question": question}])
    write_lines(
        root / "commonsenseqa/train.jsonl.gz",
        [{"question": {"stem": "This question of the training part is long enough but it is not scored by any task."}}],
    )
    write_lines(root / "chid/test_public.json", [{"id": 0, "content": CHINESE, "candidates": [], "answer": 1}] * 2)
    write_lines(root / "humaneval/HumanEval.jsonl.gz", [{"task_id": "HumanEval/0", "prompt": CODE, "test": "assert"}])
    answer = "He picked 30 minus 4 which is 26 pears by noon, so 56 pears altogether in both gardens. #### 56"
    write_lines(root / "gsm8k/test.jsonl", [{"question": SHORT, "answer": answer}, {"question": "How many?"}])
    document = {"canary": "never train on this", "examples": [{"input": "Is it true that " * 4, "target": "no"}]}
    (root / "bbh").mkdir()
    (root / "bbh/logic.json").write_text(json.dumps(document, indent=2))
    write_lines(root / "bbh/cot-prompts/logic.json", [{"input": "one two three four five six seven eight nine ten"}])
    with open(root / "TruthfulQA.csv", "w", encoding="utf-8-sig", newline="") as file:
        table = csv.writer(file)
        table.writerow(["Question", "Best Answer"])
        table.writerow(["Is it so, really, that old bridges\nhum at dawn?", "Nothing much happens to anyone at all"])
    return root


@pytest.fixture(scope="module")
def overlap(folder: Path) -> Overlap:
    return Overlap.of(folder)


def test_every_published_format_is_read(overlap: Overlap):
    assert len(overlap) == 7
    assert overlap.too_short == 1, "How many?"


@pytest.mark.parametrize(
    ("text", "file"),
    [
        (f"Answer this: {ENGLISH} Of fog.", "commonsenseqa/dev.jsonl"),
        (ENGLISH.upper().replace(",", " --").replace(" ", "\n"), "commonsenseqa/dev.jsonl"),
        ("他说：“远近的人，都挑着担子、赶来换些盐米！孩子”。", "chid/test_public.json"),
        (f"Say it: {SHORT.replace(' ', '  ')}", "gsm8k/test.jsonl"),
        (CODE.replace('"""', "'''"), "humaneval/HumanEval.jsonl.gz"),
        ("Is it true that is it true that is it true that is it?", "bbh/logic.json"),
        ("is it so really that old bridges hum at dawn", "TruthfulQA.csv"),
    ],
)
def test_a_planted_question_is_found(overlap: Overlap, text: str, file: str):
    assert overlap.find(["Nothing is here.", text, ""]) == [1]
    assert [match.file for match in overlap.matches(text)] == [file]


@pytest.mark.parametrize(
    "text",
    [
        "the blue lamp is useful for reading late at night but it",  # 12 words
        "都挑着担子,赶来换些盐米",  # 11 characters
        "Where would nobody keep wet paint brushes",  # 7 words of 8
        "Is an answer of very many words that could be found in any row of training data?",
        "He picked 30 minus 4 which is 26 pears by noon, so 56 pears altogether in both gardens. #### 56",
        "Nothing much happens to anyone at all",
        "This question of the training part is long enough but it is not scored by any task.",
        "one two three four five six seven eight nine ten",
        "how many",
        "",
    ],
)
def test_what_is_no_question_is_not_found(overlap: Overlap, text: str):
    assert overlap.find([text]) == []
    assert overlap.matches(text) == []


def test_the_words_that_match_are_shown_as_they_stand(overlap: Overlap):
    shared_words = "useful for READING late at night, but it also warns the whole street"
    text = f"Such lamps are {shared_words} and so on. 他说：远近的人都挑着担子,赶来换些盐米!!"
    assert overlap.matches(text) == [
        Match(shared_words, "commonsenseqa/dev.jsonl"),
        Match("远近的人都挑着担子,赶来换些盐米", "chid/test_public.json"),
    ]


def test_a_question_split_over_two_texts_is_in_neither(overlap: Overlap, monkeypatch: pytest.MonkeyPatch):
    words = ENGLISH.split()
    assert overlap.find([" ".join(words[:10]), " ".join(words[10:])]) == []
    monkeypatch.setattr(overlap_module, "_BATCH", 2)
    assert overlap.find(["nothing", "", "nothing", ENGLISH, SHORT]) == [3, 4]


def test_words_decide_where_hashes_collide(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(overlap_module, "_hash", len)
    of_like_lengths = " ".join("x" * len(word.strip(",?")) for word in ENGLISH.split())
    overlap = Overlap.of(folder)
    assert overlap._suspects([of_like_lengths]) == [0]
    assert overlap.find([of_like_lengths, ENGLISH]) == [1]


def test_a_folder_without_questions_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="there is no folder"):
        Overlap.of(tmp_path / "missing")
    write_lines(tmp_path / "rows.jsonl", [{"answer": ENGLISH}, {"question": "How many?"}])
    with pytest.raises(UserError, match="holds no questions of 8 words or more"):
        Overlap.of(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", b'{"question": '),
        ("a.jsonl.gz", b"no gzip"),
        ("a.jsonl.gz", gzip.compress(b"[]", mtime=0)[:-9]),
        ("a.csv", b"\xff"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: bytes):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name} cannot be read as evaluation data"):
        Overlap.of(tmp_path)


def test_on_real_data(shared: Path):
    """Every long question of CommonsenseQA is found in an Alpaca row, and few rows hold one as they are."""
    six = ("commonsenseqa", "bbh", "gsm8k", "humaneval", "chid", "truthfulqa")
    texts = (shared / "datasets" / "eval" / name for name in six)
    overlap = Overlap.of(shared / "datasets" / "eval" / "commonsenseqa")
    assert all(len(Overlap.of(folder)) > 50 for folder in texts)
    with gzip.open(shared / "datasets/alpaca/alpaca_data.json.gz", "rt", encoding="utf-8") as file:
        rows = ["\n".join(row.values()) for row in json.load(file)[:5000]]
    lines = (shared / "datasets/eval/commonsenseqa/dev_rand_split.jsonl").read_text(encoding="utf-8").splitlines()
    questions = [json.loads(line)["question"]["stem"] for line in lines]
    long_ones = [question for question in questions if len(overlap_module._TOKEN.findall(question)) >= 13]
    planted = [f"{row}\n{question}\n{row}" for row, question in zip(rows, long_ones, strict=False)]
    assert len(long_ones) > 500
    assert overlap.find(planted) == list(range(len(long_ones)))

    found = overlap.find(rows)
    print(
        f"\n{len(found)} of {len(rows):,} rows of Alpaca overlap:", *(overlap.matches(rows[i]) for i in found), sep="\n"
    )
    assert len(found) < 3
