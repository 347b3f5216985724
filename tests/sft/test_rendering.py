"""Which tokens a conversation has, and which of them are learned."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from common.errors import UserError
from data.chat import Conversation
from sft.rendering import Renderer, show, stops_of
from sft.sources import conversation_of
from tests.sft.conftest import ROWS, conversation

CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|system|>You help.<|turn_end|>\n' }}{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|turn_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""A template from elsewhere: a system turn of its own, a line break after each turn, which nobody has to learn."""

THINKING = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}"
    "{{ message['content'] + '<|turn_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""One that shows the last answer otherwise than earlier ones."""


def with_template(tokenizer, folder: Path, template: str | None) -> Renderer:
    tokenizer.copy_to(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return Renderer(folder)


def learned(renderer: Renderer, one: Conversation) -> list[str]:
    """The text that is learned, a string for each stretch of it."""
    (rendered,) = renderer.render([one])
    parts = np.split(np.arange(len(rendered.ids)), np.flatnonzero(np.diff(rendered.trained)) + 1)
    return [
        renderer.tokenizer.decode(rendered.ids[part].tolist(), special=True)
        for part in parts
        if rendered.trained[part[0]]
    ]


GOLDEN = """\
- <|begin|>|<|user|>|N|a|m|e| a| c|o|l|our|.|<|turn_end|>|<|assistant|>
+ R|e|d|.|<|turn_end|>
- <|begin|>|<|user|>|Write| it| in| c|a|p|it|a|l|s|.|\\n|\\n|w|ater|<|turn_end|>|<|assistant|>
+ W|A|T|E|R|<|turn_end|>
- <|begin|>|<|user|>|说⟨3⟩|出⟨3⟩|一⟨3⟩|种⟨3⟩|水⟨3⟩|果⟨3⟩|。⟨3⟩|<|turn_end|>|<|assistant|>
+ 苹⟨3⟩|果⟨3⟩|。⟨3⟩|<|turn_end|>
- <|begin|>|<|user|>|翻⟨3⟩|译⟨3⟩|成⟨3⟩|英⟨3⟩|文⟨3⟩|。⟨3⟩|\\n|\\n|谢⟨3⟩|谢⟨3⟩|<|turn_end|>|<|assistant|>
+ Than|k| |y|ou|.|<|turn_end|>"""


def test_the_mask_token_by_token(renderer: Renderer) -> None:
    conversations = [conversation_of(row) for row in ROWS]
    shown = "\n".join(show(one, renderer.tokenizer) for one in renderer.render(conversations))
    assert shown == GOLDEN


text = st.text(st.characters(codec="utf-8"), min_size=1, max_size=30).filter(lambda text: text.strip())


@settings(max_examples=60, deadline=None)
@given(question=text, other=text, answer=text)
def test_the_question_never_changes_what_is_learned(renderer: Renderer, question: str, other: str, answer: str) -> None:
    one, two = renderer.render([conversation(question, answer), conversation(other, answer)])
    assert one.ids[one.trained].tolist() == two.ids[two.trained].tolist()
    assert learned(renderer, conversation(question, answer)) == [answer.strip() + "<|turn_end|>"]


@settings(max_examples=40, deadline=None)
@given(texts=st.lists(text, min_size=2, max_size=5))
def test_the_tokens_are_those_of_transformers(renderer: Renderer, texts: list[str]) -> None:
    """Ours are encoded in pieces; theirs as one text."""
    turns = [("system", texts[0])]
    for number, one in enumerate(texts[1:]):
        turns += [("user", one), ("assistant", f"{number} {one}")]
    (rendered,) = renderer.render([Conversation(tuple(turns))])
    theirs = AutoTokenizer.from_pretrained(renderer.tokenizer.folder)
    messages = Conversation(tuple(turns)).messages
    assert rendered.ids.tolist() == theirs.apply_chat_template(messages, return_dict=False)
    prompt = theirs.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
    assert renderer.prompt(messages[:-1]) == prompt
    assert rendered.ids.tolist()[: len(prompt)] == prompt


def test_every_answer_of_a_chat_is_learned(renderer: Renderer) -> None:
    turns = (("system", "Be brief."), ("user", "1?"), ("assistant", "one"), ("user", "2?"), ("assistant", "two"))
    assert learned(renderer, Conversation(turns)) == ["one<|turn_end|>", "two<|turn_end|>"]


def test_a_template_from_elsewhere_is_kept(tokenizer, tmp_path: Path) -> None:
    renderer = with_template(tokenizer, tmp_path, CHATML)
    turns = (("user", "1?"), ("assistant", "one"), ("user", "2?"), ("assistant", "two"))
    assert learned(renderer, Conversation(turns)) == ["one<|turn_end|>", "two<|turn_end|>"]
    (rendered,) = renderer.render([Conversation(turns)])
    whole = renderer.tokenizer.decode(rendered.ids.tolist(), special=True)
    assert whole == (
        "<|system|>You help.<|turn_end|>\n<|user|>1?<|turn_end|>\n<|assistant|>one<|turn_end|>\n"
        "<|user|>2?<|turn_end|>\n<|assistant|>two<|turn_end|>"
    )
    (tmp_path / "out").mkdir()
    renderer.write(tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == CHATML


def test_where_earlier_answers_look_otherwise_only_the_last_is_learned(tokenizer, tmp_path: Path) -> None:
    renderer = with_template(tokenizer, tmp_path, THINKING)
    turns = (("user", "1?"), ("assistant", "one"), ("user", "2?"), ("assistant", "two"))
    assert learned(renderer, Conversation(turns[:2])) == ["<think></think>one<|turn_end|>"]
    assert learned(renderer, Conversation(turns)) == ["<think></think>two<|turn_end|>"]


def test_without_a_template_there_is_one_in_plain_text(tokenizer, tmp_path: Path) -> None:
    renderer = with_template(tokenizer, tmp_path, None)
    assert renderer.stops == [renderer.tokenizer.end]
    (rendered,) = renderer.render([Conversation((("system", "Be brief."), ("user", "1?"), ("assistant", "one")))])
    whole = renderer.tokenizer.decode(rendered.ids.tolist(), special=True)
    assert whole == "<|begin|>Be brief.\n\n### Instruction:\n1?\n\n### Response:\none<|end|>"
    assert learned(renderer, conversation("1?", "one")) == ["one<|end|>"]
    (tmp_path / "out").mkdir()
    renderer.write(tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    messages = [{"role": "user", "content": "1?"}]
    prompt = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert prompt == renderer.prompt(messages)


def test_a_template_in_a_file_of_its_own_moves_into_the_configuration(tokenizer, tmp_path: Path) -> None:
    """Where MLC-LLM, OpenCompass and older readers look for it."""
    renderer = with_template(tokenizer, tmp_path, None)
    (tmp_path / "chat_template.jinja").write_text(CHATML, encoding="utf-8")
    renderer = Renderer(tmp_path)
    (tmp_path / "out").mkdir()
    renderer.write(tmp_path / "out")
    assert not (tmp_path / "out" / "chat_template.jinja").exists()
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["chat_template"] == CHATML


def test_what_a_template_refuses_is_none(tokenizer, tmp_path: Path) -> None:
    no_system = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + CHATML
    renderer = with_template(tokenizer, tmp_path, no_system)
    turns = (("system", "Be brief."), ("user", "1?"), ("assistant", "one"))
    refused, taken = renderer.render([Conversation(turns), Conversation(turns[1:])])
    assert refused is None
    assert taken is not None
    with pytest.raises(UserError, match="refuses a question: no system turn"):
        renderer.prompt(Conversation(turns[:2]).messages)


def test_a_tokenizer_that_begins_every_text_with_a_space_is_refused(tokenizer, tmp_path: Path) -> None:
    """As Llama-2's: an answer alone would become other tokens than behind its question."""
    tokenizer.copy_to(tmp_path)
    values = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    values["normalizer"] = {"type": "Prepend", "prepend": "_"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(values), encoding="utf-8")
    config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": None}), encoding="utf-8")
    with pytest.raises(UserError, match="encodes a conversation otherwise than its turns one by one"):
        Renderer(tmp_path)


def test_text_that_spells_a_special_token_is_left_out(renderer: Renderer) -> None:
    fits = conversation("What is <user>?", "A mark.")
    assert renderer.misfits([fits, conversation("Say <|turn_end|>.", "No."), conversation("Hi", "<|user|>")]) == [
        None,
        "special token in the text",
        "special token in the text",
    ]


def test_generation_stops_at_the_turns_end(renderer: Renderer) -> None:
    ids = {name: renderer.tokenizer.vocabulary[name] for name in ("<|turn_end|>", "<|end|>")}
    assert renderer.stops == list(ids.values())
    assert stops_of({}, [6, 2]) == [6, 2]
    assert stops_of({"eos_token_id": 2}, [6, 2]) == [6, 2]
    assert stops_of({"eos_token_id": [2, 9]}, [6]) == [6, 2, 9]


def test_a_real_template(smollm2: Path) -> None:
    """SmolLM2's own: ChatML, whose token for the end of a turn is the tokenizer's end token."""
    renderer, theirs = Renderer(smollm2), AutoTokenizer.from_pretrained(smollm2)
    for row in ROWS:
        one = conversation_of(row)
        assert learned(renderer, one) == [row["output"] + "<|im_end|>"]
        (rendered,) = renderer.render([one])
        *whole, line_break = theirs.apply_chat_template(one.messages, return_dict=False)
        assert rendered.ids.tolist() == whole
        assert theirs.decode(line_break) == "\n"
    assert renderer.stops == [theirs.eos_token_id]


def test_real_weights_are_ours(smollm2: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from models.foreign import Architecture
    from models.hf import load_model

    assert Architecture.of(smollm2).own is not None
    (rendered,) = Renderer(smollm2).render([conversation("What is the capital of France?", "Paris.")])
    ids = torch.tensor([rendered.ids.tolist()])
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(smollm2)(ids).logits
        difference = (load_model(smollm2)(ids) - theirs).abs().max().item()
    assert difference < 1e-3 * theirs.abs().max().item()
