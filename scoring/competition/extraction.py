"""The answer in what a model wrote, by the rules of OpenCompass 0.3.1, and when it is final.

Every rule has a second function that says of a text, which may go on, whether the answer in it can still change:
generation may stop there. The rules are copied to the letter where they are odd, as scores are compared with theirs.
"""

import re

_SO_THE_ANSWER_IS = re.compile(r"(?i)so the answer is\s*([A-P])")
_NUMBER = re.compile(r"-?\d+\.\d+|-?\d+")
_CODE_BLOCK = re.compile(r"```\w*\n(.*?)```", re.DOTALL)
_BRACKETED = re.compile(r"\(([A-Z])")
_CAPITAL = re.compile(r"[A-Z]")
_BOLD = re.compile(r"\*\*(.*?)\*\*")

_QUESTION = "Question:"
_ANSWER_IS = "answer is "


def letter_of_commonsense_qa(text: str) -> str:
    """The letter after the first ``so the answer is``, in the case it was written in; empty without one."""
    match = _SO_THE_ANSWER_IS.search(text)
    return match.group(1) if match else ""


def has_letter_of_commonsense_qa(text: str) -> bool:
    """Whether :func:`letter_of_commonsense_qa` is final: the first match counts."""
    return _SO_THE_ANSWER_IS.search(text) is not None


def first_capital(text: str) -> str:
    """The first upper-case character, of whatever alphabet; empty without one."""
    return next((character for character in text if character.isupper()), "")


def has_capital(text: str) -> bool:
    """Whether :func:`first_capital` is final."""
    return first_capital(text) != ""


def last_number(text: str) -> str:
    """The last number before the model asks itself another question; ``NULL`` without one.

    A comma ends a number, so ``1,000`` gives ``000``.
    """
    numbers = _NUMBER.findall(text.partition(_QUESTION)[0])
    return numbers[-1] if numbers else "NULL"


def asks_again(text: str) -> bool:
    """Whether :func:`last_number` is final."""
    return _QUESTION in text


def choice_of_bbh(text: str) -> str:
    """The letter of a multiple-choice answer.

    Looked for in what stands between the first two ``answer is``, else in the whole text: the first capital after
    an opening bracket, else the first capital, else all of it, which is never right.
    """
    answer = _after_answer_is(text)
    bracketed, capital = _BRACKETED.search(answer), _CAPITAL.search(answer)
    if bracketed:
        return bracketed.group(1)
    return capital.group() if capital else answer


def has_choice_of_bbh(text: str) -> bool:
    """Whether :func:`choice_of_bbh` is final: a capital without a bracket yields to a later one with a bracket."""
    parts = text.split(_ANSWER_IS)
    return len(parts) > 2 or (len(parts) == 2 and _BRACKETED.search(parts[1]) is not None)


def free_form_of_bbh(text: str) -> str:
    """The first line of what stands between the first two ``answer is``, else of the whole text.

    Without its final full stop; and where a part of it is bold, the first such part alone.
    """
    answer = _after_answer_is(text).split("\n")[0].strip()
    answer = answer.removesuffix(".").strip()
    bold = _BOLD.search(answer)
    return bold.group(1) if bold else answer


def has_free_form_of_bbh(text: str) -> bool:
    """Whether :func:`free_form_of_bbh` is final: its line has ended."""
    parts = text.split(_ANSWER_IS)
    return len(parts) > 2 or (len(parts) == 2 and "\n" in parts[1].lstrip())


def code_of_humaneval(text: str) -> str:
    """The first fenced block of code, else the whole text; nothing else is cut off."""
    block = _CODE_BLOCK.search(text)
    return block.group(1) if block else text


def has_code_block(text: str) -> bool:
    """Whether :func:`code_of_humaneval` is final: a block has been closed."""
    return _CODE_BLOCK.search(text) is not None


def whole(text: str) -> str:
    """The output itself."""
    return text


def never(text: str) -> bool:
    """Of an answer that every further word changes."""
    return False


def _after_answer_is(text: str) -> str:
    """What stands between the first two ``answer is``; the text as it is where there is none."""
    parts = text.split(_ANSWER_IS)
    return parts[1].strip() if len(parts) > 1 else text
