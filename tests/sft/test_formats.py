"""Examples of answer formats: what each says is computed again from its prompt and the rows."""

import ast
import gzip
import json
import re
from collections import Counter
from pathlib import Path

import pytest

from common.errors import UserError
from data.chat import Conversation
from sft.formats import make_examples, write_examples

KINDS = {
    "multiple choice": re.compile(r"Q:(?P<question>[^\n]+)  Answer Choices: (?P<options>A\. .+)\nA:", re.DOTALL),
    "order": re.compile(r"Q: Put these words into alphabetical order: (?P<words>.+)\nA: Let's think step by step\."),
    "longest": re.compile(
        r"Q: Which of these words has the most letters\?\nOptions:\n(?P<options>.+)\nA: Let's think step by step\.",
        re.DOTALL,
    ),
    "words": re.compile(
        r'Question: How many words are in the sentence "(?P<sentence>.+)"\?\nLet\'s think step by step\nAnswer:'
    ),
    "letters": re.compile(
        r'Question: How many letters are in the sentence "(?P<sentence>.+)"\?\nLet\'s think step by step\nAnswer:'
    ),
    "cloze": re.compile(
        r"(?P<passage>[^\n]*______[^\n]*)\n请选择______处所填的词\n(?P<options>A\. .+)\n"
        r"请从”A“，”B“，”C“，”D“，”E“，”F“，”G“中进行选择。答：",
        re.DOTALL,
    ),
    "function": re.compile(r"Complete the following python code:\n(?P<code>.+)", re.DOTALL),
}
OPTION = re.compile(r"^\(?([A-G])(?:\)|\.) (.+)$", re.MULTILINE)


def conversation(prompt: str, answer: str) -> Conversation:
    return Conversation((("user", prompt), ("assistant", answer)))


def kind_of(example: Conversation) -> str:
    (kind,) = [kind for kind, form in KINDS.items() if form.fullmatch(example.turns[0][1])]
    return kind


def letter_of(example: Conversation) -> str:
    """The letter that OpenCompass takes from the answer."""
    answer = example.turns[1][1]
    match kind_of(example):
        case "multiple choice":
            return re.findall(r"(?i)so the answer is\s*([A-P])", answer)[0]
        case "longest":
            return re.search(r"\(([A-Z])\)", answer.split("answer is ")[1])[1]
        case "cloze":
            return next(character for character in answer if character.isupper())
    raise AssertionError(f"{example} has no letters")


def numbers_in(text: str) -> dict[str, int]:
    """What a text says in the form ``word (3)``."""
    return {word: int(number) for word, number in re.findall(r"(\w+) \((\d+)\)", text)}


class Known:
    """What the rows say."""

    def __init__(self, rows: list[Conversation]):
        self.pairs = {tuple(text.strip() for _, text in row.turns) for row in rows}
        self.lines = {(" ".join(question.split()), answer.rstrip(".")) for question, answer in self.pairs}
        self.short_answers = {answer for _, answer in self.lines}
        self.text = "\n".join(answer for _, answer in self.pairs)
        self.words = [set(re.findall(r"\w+", answer)) for _, answer in self.pairs]


def check(example: Conversation, known: Known) -> None:
    """Compute again all that an example says."""
    (_, prompt), (_, answer) = example.turns
    kind = kind_of(example)
    asked = KINDS[kind].fullmatch(prompt).groupdict()
    if "options" in asked:
        options = dict(OPTION.findall(asked["options"]))
        assert "".join(options) == "ABCDEFG"[: 7 if kind == "cloze" else 5]
        check_choice(kind, asked, options, letter_of(example), answer, known)
    elif "sentence" in asked:
        assert asked["sentence"] in known.text
        check_count(kind, asked["sentence"].removesuffix(".").split(), answer)
    elif kind == "order":
        check_order(asked["words"].split(), answer, known)
    else:
        check_function(asked["code"], answer, known)


def check_choice(
    kind: str, asked: dict[str, str], options: dict[str, str], letter: str, answer: str, known: Known
) -> None:
    match kind:
        case "multiple choice":
            assert (asked["question"], options[letter]) in known.lines
            assert set(options.values()) <= known.short_answers
            assert len({option.lower() for option in options.values()}) == 5
            assert len({len(option.split()) for option in options.values()}) == 1
            assert f'"{options[letter]}" fits' in answer
        case "longest":
            lengths = {word: len(word) for word in options.values()}
            assert [word for word in lengths if lengths[word] == max(lengths.values())] == [options[letter]]
            assert numbers_in(answer) == lengths
            assert any(words >= set(lengths) for words in known.words)
        case "cloze":
            assert {len(option) for option in options.values()} == {4}
            passages = {option: asked["passage"].replace("______", word) for option, word in options.items()}
            assert [option for option, passage in passages.items() if passage in known.text] == [letter]
            assert answer == letter


def check_count(kind: str, words: list[str], answer: str) -> None:
    """The number that OpenCompass takes is the last one; those before it are the steps."""
    steps, said = answer.rsplit("\n", 1)
    number = len(words) if kind == "words" else sum(map(len, words))
    assert said == f"The answer is {number}"
    assert re.findall(r"-?\d+\.\d+|-?\d+", answer.split("Question:")[0])[-1] == str(number)
    if kind == "words":
        counted = ", ".join(f"{place} {word}" for place, word in enumerate(words, 1))
        assert steps == f"Count the words: {counted}.\nThere are {number} words."
    else:
        sums = [tuple(map(int, step)) for step in re.findall(r"(\d+) \+ (\d+) = (\d+)", steps)]
        assert numbers_in(steps) == {word: len(word) for word in words}
        assert [added for _, added, _ in sums] == [len(word) for word in words[1:]]
        assert all(before + added == after for before, added, after in sums)


def check_order(words: list[str], answer: str, known: Known) -> None:
    read = answer.split("answer is ")[1].split("\n")[0].removesuffix(".")
    assert read == " ".join(sorted(words))
    assert numbers_in(answer) == {word: "_abcdefghijklmnopqrstuvwxyz".index(word[0]) for word in words}
    assert any(known_words >= set(words) for known_words in known.words)


def check_function(head: str, answer: str, known: Known) -> None:
    """The answer is the function whose head was asked, and what OpenCompass would run compiles."""
    (code,) = re.findall(r"```\w*\n(.*?)```", answer, re.DOTALL)
    (asked,), (whole,) = ast.parse(head).body, ast.parse(code).body
    assert asked.name == whole.name
    assert ast.dump(asked.args) == ast.dump(whole.args)
    assert (ast.get_docstring(asked), code.removesuffix("\n")) in known.pairs
    compile(head + code, "prompt and answer", "exec")


SHORT = "red green blue white black brown grey pink gold plum".split()
NUMBERS = "one two three four five six seven eight nine ten".split()
PHRASES = "山清水秀 鸟语花香 风和日丽 万里无云 人山人海 车水马龙 欢声笑语 张灯结彩 锣鼓喧天 喜气洋洋".split()


@pytest.fixture(scope="module")
def rows() -> list[Conversation]:
    """Ten rows for each kind, and some for none."""
    made = []
    for short, number, phrase in zip(SHORT, NUMBERS, PHRASES, strict=True):
        made += [
            conversation(f"Name the colour.\n\nThe {number} doors are {short}.", f"{short.capitalize()}."),
            conversation(f"Tell me about {number}.", f"We saw {number} small dogs near the old mill. They ran away!"),
            conversation(f"写一写{number}。", f"第{number}次去那个地方的时候，{phrase}，大家都觉得非常高兴。"),
            conversation(f"How many doors are {short}?", f"There are {number} doors that are {short}."),
            conversation(f"Add {number} to it.", f"def add_{number}(x, y=2):\n    total = x + y\n    return total"),
            conversation(f"Use numpy for {number}.", "def mean(x):\n    return np.mean(x)"),
            conversation(f"Draw {number}.", "<nooutput>"),
        ]
    return made


def test_all_that_an_example_says_is_true(rows: list[Conversation]):
    examples = make_examples(rows, 50, seed=0)
    known = Known(rows)
    for example in examples:
        check(example, known)
    shares = Counter(map(kind_of, examples))
    assert shares["order"] + shares["longest"] == shares["words"] + shares["letters"] == 10
    assert {shares[kind] for kind in ("multiple choice", "cloze", "function")} == {10}


def test_examples_depend_on_rows_and_seed_alone(rows: list[Conversation]):
    assert make_examples(rows, 40, seed=3) == make_examples(list(rows), 40, seed=3)
    assert make_examples(rows, 20, seed=3) == make_examples(rows, 40, seed=3)[:20]
    assert make_examples(rows, 40, seed=3) != make_examples(rows, 40, seed=4)


def test_a_kind_that_is_used_up_leaves_its_share(rows: list[Conversation]):
    few = [row for row in rows if not row.turns[1][1].startswith("def add")][:60] + rows[4:5]
    shares = Counter(map(kind_of, make_examples(few, 40, seed=0)))
    assert shares["function"] == 1
    assert shares["order"] + shares["longest"] > 40 // 5


def test_functions_that_need_a_name_from_outside_are_left_out(rows: list[Conversation]):
    examples = make_examples(rows, 60, seed=0)
    assert not any("np." in example.text or "nooutput" in example.text for example in examples)


def test_too_few_rows_are_refused(rows: list[Conversation]):
    unfit = [conversation("Hi", "42"), Conversation((("system", "s"), *rows[0].turns)), Conversation(rows[0].turns * 2)]
    with pytest.raises(
        UserError, match="only 0 of 5 examples of answer formats can be made from 1 rows; ask for fewer"
    ):
        make_examples(unfit, 5, seed=0)
    with pytest.raises(UserError, match=r"only \d+ of 1,000 examples .* from 60 rows"):
        make_examples(rows, 1000, seed=0)


def test_written_examples_name_what_they_are_derived_from(rows: list[Conversation], tmp_path: Path):
    examples = make_examples(rows, 12, seed=0)
    write_examples(tmp_path / "formats.jsonl", examples, ["tatsu-lab/alpaca"])
    lines = (tmp_path / "formats.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["messages"] for line in lines] == [example.messages for example in examples]
    assert all(json.loads(line)["derived_from"] == ["tatsu-lab/alpaca"] for line in lines)
    assert "请选择" in "".join(lines)


def test_on_real_data(shared: Path):
    rows = []
    for name in ("alpaca/alpaca_data.json.gz", "alpaca_zh/alpaca_chinese_52k_v3.json.gz"):
        with gzip.open(shared / "datasets" / name, "rt", encoding="utf-8") as file:
            for row in json.load(file)[:20_000]:
                prompt = row["instruction"] + ("\n\n" + row["input"] if row["input"] else "")
                rows.append(conversation(prompt, row["output"]))
    examples = make_examples(rows, 250, seed=0)
    known = Known(rows)
    for example in examples:
        check(example, known)
    assert Counter(map(kind_of, examples)) == {
        **dict.fromkeys(["multiple choice", "cloze", "function"], 50),
        **dict.fromkeys(["order", "longest", "words", "letters"], 25),
    }
    for kind in ("multiple choice", "longest", "cloze"):
        letters = Counter(letter_of(example) for example in examples if kind_of(example) == kind)
        assert max(letters.values()) - min(letters.values()) <= 1, f"{kind}: {letters}"
