"""The configuration: MLC-LLM's own, with the model's rotary values and chat template."""

import json
from pathlib import Path

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from common.errors import UserError
from data.chat import CHAT_TEMPLATE, PLAIN_TEMPLATE
from data.tokenizer import Tokenizer
from export.conversation import PLAIN, SYSTEM, Conversation, UnlikeError, conversation
from export.mlc_config import mlc_config, read_chat, stop_tokens
from export.positions import Rotary
from models.hf_config import read_values
from tests.export.conftest import KINDS, Folder
from tests.export.test_shards import REFERENCE
from tests.models.test_foreign import SCALED

CHATML = """\
{% for message in messages %}{% if loop.first and message['role'] != 'system' %}{{
'<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}{{
'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}{%
if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

THINKS = """\
{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{%
if message['role'] == 'assistant' %}{{ message['content'].split('</think>')[-1] }}{% else %}{{ message['content'] }}{%
endif %}{{ '<|im_end|>\n' }}{% endfor %}{%
if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"""

BRACKETS = """\
{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{
'[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{
' ' + message['content'] + eos_token }}{% else %}{{ raise_exception('no system turn') }}{% endif %}{% endfor %}"""

COUNTS = "{% for message in messages %}{{ loop.index ~ ': ' + message['content'] + '\n' }}{% endfor %}"


def derived(template: str, begin: str = "<|begin|>") -> Conversation:
    """What is read off a template."""

    def fail(reason: str) -> None:
        raise ValueError(reason)

    jinja = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    jinja.globals["raise_exception"] = fail
    compiled = jinja.from_string(template)
    tokens = {"bos_token": begin, "eos_token": "<|end|>"}

    def render(messages: list[dict[str, str]], answer: bool) -> str:
        return compiled.render(messages=messages, add_generation_prompt=answer, **tokens)

    return conversation(template, render, begin)


@pytest.mark.parametrize("name", REFERENCE)
def test_the_configuration_is_that_of_mlc(name: str, shared: Path) -> None:
    reference = shared / "reference" / "mlc" / name
    theirs = json.loads((reference / "mlc" / "mlc-chat-config.json").read_text())
    chat, _ = read_chat(reference / "hf")
    ours = mlc_config(reference / "hf", chat, context=512, prefill_chunk=128)
    assert list(ours) == list(theirs)
    if name == "qwen2":
        assert theirs["active_vocab_size"] == 2049  # more than its matrices have: never ours
        theirs["active_vocab_size"] = 2048
    assert ours == theirs


def test_our_own_template() -> None:
    found = derived(CHAT_TEMPLATE)
    assert found.begins
    assert (found.user, found.assistant, found.seps) == ("<|user|>", "<|assistant|>", ("<|turn_end|>",))
    assert (found.system_template, found.system_message) == (SYSTEM, "")
    assert found.marks == {"<|user|>", "<|assistant|>", "<|turn_end|>"}
    turns = [("user", "Why?"), ("assistant", "Because."), ("user", "So?")]
    said = "<|user|>Why?<|turn_end|><|assistant|>Because.<|turn_end|><|user|>So?<|turn_end|><|assistant|>"
    assert found.prompt(turns) == said


def test_the_plain_template() -> None:
    found = derived(PLAIN_TEMPLATE)
    assert found.prompt([("user", "Why?")]) == "### Instruction:\nWhy?\n\n### Response:\n"
    assert found.seps == ("\n\n", "<|end|>\n\n")


def test_a_template_with_a_system_turn_of_its_own() -> None:
    found = derived(CHATML)
    assert found.system_template == "<|im_start|>system\n{system_message}<|im_end|>\n"
    assert found.system_message == "You are a helpful assistant."
    assert not found.begins
    assert "system_prefix_token_ids" not in found.as_json(begin=1, stop=[2])
    assert derived(CHATML, begin="<|im_start|>") == found  # as SmolLM2's tokenizer has it


def test_a_template_of_a_model_that_reasons() -> None:
    found = derived(THINKS)
    assert found.strips_reasoning
    object_ = found.as_json(begin=None, stop=[2])
    assert object_["roles"]["assistant"] + object_["role_empty_sep"] == "<|im_start|>assistant\n<think>\n"
    assert found.written == ""


def test_a_template_without_role_words() -> None:
    found = derived(BRACKETS)
    turns = [("user", "Why?"), ("assistant", "Because."), ("user", "So?")]
    assert found.prompt(turns) == "[INST] Why? [/INST] Because.<|end|>[INST] So? [/INST]"
    assert found.as_json(begin=1, stop=[2])["system_prefix_token_ids"] == [1]


@pytest.mark.parametrize("template", [COUNTS, "{{ messages[0]['content'] }}", "{{ raise_exception('never') }}"])
def test_a_template_that_mlc_cannot_follow(template: str) -> None:
    with pytest.raises(UnlikeError):
        derived(template)


def test_answers_end_where_the_model_ends_them(folder: Folder, tokenizer: Tokenizer) -> None:
    model = folder("qwen3", eos_token_id=tokenizer.end)
    chat, problem = read_chat(model)
    assert problem is None
    ids = tokenizer.vocabulary
    assert set(stop_tokens(model, chat)) == {ids["<|end|>"], ids["<|turn_end|>"]}
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 6], "temperature": 0.7}))
    assert stop_tokens(model, chat)[:2] == [5, 6]
    config = mlc_config(model, chat, context=64, prefill_chunk=128)
    assert config["conv_template"]["stop_token_ids"][:2] == config["eos_token_id"] == [5, 6]
    assert config["conv_template"]["system_prefix_token_ids"] == [ids["<|begin|>"]]
    assert (config["temperature"], config["prefill_chunk_size"]) == (0.7, 64)
    assert config["active_vocab_size"] == tokenizer.vocab_size


def test_a_folder_without_a_template_goes_on_with_the_text(folder: Folder) -> None:
    model = folder("llama")
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": None}))
    assert read_chat(model) == (PLAIN, None)
    (model / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": COUNTS}))
    chat, problem = read_chat(model)
    assert chat == PLAIN
    assert problem is not None


@pytest.mark.parametrize("kind", KINDS)
def test_rotary_values_are_found_wherever_they_are(kind: str, folder: Folder) -> None:
    partial = {"partial_rotary_factor": 0.25} if kind == "phi" else {}
    scaled = SCALED if kind == "llama" else {"rope_type": "default"}
    model = folder(kind, rope_parameters={**scaled, "rope_theta": 5e5, **partial})
    nested = read_values(model)
    assert "rope_theta" not in nested
    found = Rotary.of(nested, model)
    assert found.theta == 5e5
    assert found.partial == partial.get("partial_rotary_factor", 1.0)
    assert (found.scaling or {}).get("factor") == (8.0 if kind == "llama" else None)
    top = {name: value for name, value in nested.items() if name != "rope_parameters"} | found.at_top
    assert Rotary.of(top, model) == Rotary.of(nested | found.at_top, model) == found
    chat, _ = read_chat(model)
    config = mlc_config(model, chat, context=64, prefill_chunk=64)["model_config"]
    assert config["rope_theta" if kind.startswith("qwen") else "position_embedding_base"] == 5e5
    for name, other in (("rope_theta", 1e4), ("rope_scaling", {"rope_type": "linear", "factor": 2.0})):
        with pytest.raises(UserError, match=f"contradicts itself: {name} is"):
            Rotary.of(nested | {name: other}, model)


def test_a_folder_that_names_no_rotary_values_has_the_usual_ones() -> None:
    assert Rotary.of({"model_type": "phi"}, Path()) == Rotary(1e4, 0.5, None)
    assert Rotary.of({"model_type": "llama", "rope_scaling": None}, Path()) == Rotary(1e4, 1.0, None)
    old = {"rope_scaling": {"type": "llama3", "factor": 8.0}}
    assert Rotary.of(old, Path()).scaling == {"rope_type": "llama3", "factor": 8.0}
