"""Batched answers against transformers' own, one prompt at a time; plans; model folders."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
)

from common.errors import UserError
from data.tokenizer import Tokenizer
from models.foreign import Foreign
from models.sizes import ModelConfig
from models.transformer import Transformer
from scoring.batches import Batch, common_prefix, from_json, make_plan, to_json
from scoring.generation import GenerationSettings, Generator, end_tokens, without
from scoring.loading import in_memory, load, load_tokenizer
from scoring.requests import Key, Request

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "phi": PhiConfig,
    "mistral": lambda **values: MistralConfig(**values, sliding_window=16),
    "gemma2": lambda **values: Gemma2Config(**values, sliding_window=16),
    "gpt2": lambda **values: GPT2Config(
        vocab_size=values["vocab_size"], n_embd=32, n_layer=2, n_head=4, initializer_range=0.3, eos_token_id=2
    ),
}

SHOTS = "".join(f"Question: how many are {n} and {n}? Answer: they are {2 * n}.\n" for n in range(4))


@pytest.fixture(scope="module")
def hf_tokenizer(tokenizer: Tokenizer) -> Any:
    return load_tokenizer(tokenizer.folder)


def build(kind: str, vocab: int) -> Any:
    """A random model, in fp64 no two tokens are so nearly equal that company decides between them.

    Gemma's attention takes the softmax in fp32, where fp64's mask is infinite and padding becomes NaN.
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind](vocab_size=vocab, **SMALL)).eval()
    return model if kind == "gemma2" else model.double()


@pytest.fixture(scope="module")
def model(hf_tokenizer: Any) -> Any:
    return build("llama", len(hf_tokenizer))


def requests_of(task: str, count: int, length: int = 12, shots: str = SHOTS, **more: Any) -> list[Request]:
    return [Request(task, row, f"{shots}Question: {'so ' * (row % 3)}{row}?", length, **more) for row in range(count)]


def answers(generator: Generator, requests: list[Request]) -> dict[Key, str]:
    found: dict[Key, str] = {}

    def keep(request: Request, output: str) -> None:
        assert request.key not in found
        found[request.key] = output

    generator.generate(requests, keep)
    return found


def one_by_one(model: Any, tokenizer: Any, requests: list[Request], limit: int = 10_000) -> dict[Key, str]:
    found = {}
    for request in requests:
        ids = torch.tensor([tokenizer(request.prompt)["input_ids"][-limit:]])
        options = {"max_new_tokens": request.max_new_tokens, "do_sample": False, "pad_token_id": 0}
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        found[request.key] = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    return found


@pytest.mark.parametrize("kind", CONFIGS)
def test_answers_are_those_of_transformers_one_prompt_at_a_time(kind: str, hf_tokenizer: Any) -> None:
    model = build(kind, len(hf_tokenizer))
    requests = requests_of("shots", 4, 12) + requests_of("bare", 4, 6, shots="")
    generator = Generator(model, hf_tokenizer, GenerationSettings(batch_size=3))
    slides = kind in ("mistral", "gemma2")
    assert {batch.prefix > 0 for batch in generator.plan(requests) if batch.task == "shots"} == {not slides}
    assert answers(generator, requests) == one_by_one(model, hf_tokenizer, requests)


def test_rows_end_at_end_tokens_on_their_own(model: Any, hf_tokenizer: Any) -> None:
    requests = requests_of("t", 6, 20)
    free = one_by_one(model, hf_tokenizer, requests)
    written = [hf_tokenizer(text, add_special_tokens=False)["input_ids"] for text in free.values()]
    named = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = [2, written[0][3], written[1][7], written[2][11]]
    try:
        found = answers(Generator(model, hf_tokenizer, GenerationSettings(batch_size=6)), requests)
        assert found == one_by_one(model, hf_tokenizer, requests)
        assert len({len(text) for text in found.values()}) > 2
    finally:
        model.generation_config.eos_token_id = named


def test_prompts_are_cut_from_the_left(model: Any, hf_tokenizer: Any) -> None:
    requests = requests_of("t", 4)
    generator = Generator(model, hf_tokenizer, GenerationSettings(max_seq_len=40))
    assert [batch.prefix for batch in generator.plan(requests)] == [0]
    assert answers(generator, requests) == one_by_one(model, hf_tokenizer, requests, limit=40)


def test_a_repetition_penalty_of_the_model_counts(model: Any, hf_tokenizer: Any) -> None:
    requests = requests_of("t", 4)
    without_it = one_by_one(model, hf_tokenizer, requests)
    model.generation_config.repetition_penalty = 1.3
    try:
        found = answers(Generator(model, hf_tokenizer), requests)
        assert found == one_by_one(model, hf_tokenizer, requests) != without_it
    finally:
        model.generation_config.repetition_penalty = None


def test_early_stop_only_leaves_out_what_comes_later(model: Any, hf_tokenizer: Any) -> None:
    whole = answers(Generator(model, hf_tokenizer), requests_of("t", 6, 40))
    requests = requests_of("t", 6, 40, finished=lambda text: len(text) > 30)
    early = answers(Generator(model, hf_tokenizer), requests)
    assert all(whole[key].startswith(text.rstrip("\ufffd")) for key, text in early.items())
    assert all(30 < len(text) < len(whole[key]) for key, text in early.items())
    assert answers(Generator(model, hf_tokenizer, GenerationSettings(early_stop=False)), requests) == whole


def test_a_resumed_run_repeats_whole_batches_and_keeps_what_is_missing(model: Any, hf_tokenizer: Any) -> None:
    requests, generator = requests_of("t", 7), Generator(model, hf_tokenizer, GenerationSettings(batch_size=3))
    plan, whole = generator.plan(requests), answers(generator, requests)
    done = {*plan[0].keys, plan[1].keys[1]}
    found: dict[Key, str] = {}
    generator.follow(plan, requests, lambda request, output: found.update({request.key: output}), done)
    assert found == {key: text for key, text in whole.items() if key not in done}


def test_an_empty_prompt_has_a_beginning(model: Any, hf_tokenizer: Any) -> None:
    assert answers(Generator(model, hf_tokenizer), [Request("t", 0, "", 3)]).keys() == {("t", 0)}


def test_a_chat_ends_at_the_tokenizers_end_token_too(model: Any, hf_tokenizer: Any) -> None:
    assert end_tokens(model, hf_tokenizer, chat=False) == {2}
    assert end_tokens(model, hf_tokenizer, chat=True) == {2, hf_tokenizer.eos_token_id}


def test_a_chat_is_read_up_to_the_text_of_an_end_token(model: Any, hf_tokenizer: Any) -> None:
    generator = Generator(model, hf_tokenizer, GenerationSettings(chat=True))
    (request,), end = requests_of("t", 1, 12), hf_tokenizer.decode([2])
    found = answers(generator, [request])[request.key]
    ids = torch.tensor([hf_tokenizer(request.prompt, add_special_tokens=False)["input_ids"]])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert found == hf_tokenizer.decode(out[0, ids.shape[1] :]).partition(end)[0]


def test_a_tokenizer_of_another_model_is_refused(hf_tokenizer: Any) -> None:
    with pytest.raises(UserError, match="do not belong together"):
        answers(Generator(build("llama", 40), hf_tokenizer), requests_of("t", 1))


def test_layers_that_are_no_attention_are_refused(hf_tokenizer: Any) -> None:
    config = MambaConfig(vocab_size=100, hidden_size=16, num_hidden_layers=1, state_size=4)
    with pytest.raises(UserError, match="--engine vllm"):
        Generator(AutoModelForCausalLM.from_config(config), hf_tokenizer)


@given(st.lists(st.booleans(), min_size=1))
def test_rows_that_stay_move_into_gaps_only(over: list[bool]) -> None:
    kept = without(over)
    assert sorted(kept) == [row for row, ended in enumerate(over) if not ended]
    assert all(new == old or (over[new] and old >= len(kept)) for new, old in enumerate(kept))


@given(
    st.dictionaries(st.tuples(st.sampled_from("abc"), st.integers(0, 50)), st.integers(1, 90), min_size=1),
    st.integers(1, 9),
    st.integers(50, 100),
)
def test_a_plan_has_every_prompt_once(lengths: dict[Key, int], size: int, limit: int) -> None:
    requests = [Request(task, row, "", 10 + row % 2) for task, row in lengths]
    ids = {key: [7] * min(length, limit - 1) + [key[1]] for key, length in lengths.items()}
    plan = make_plan(requests, ids, size, limit)
    assert sorted(key for batch in plan for key in batch.keys) == sorted(lengths)
    for batch in plan:
        assert len(batch.rows) <= size
        assert len({row % 2 for row in batch.rows}) == 1
        assert len({tuple(ids[key][: batch.prefix]) for key in batch.keys}) == 1
        assert all(batch.prefix < len(ids[key]) for key in batch.keys)
    assert from_json(json.loads(json.dumps(to_json(plan)))) == plan


@given(st.lists(st.integers(0, 1), max_size=70), st.lists(st.lists(st.integers(0, 1), max_size=5), min_size=1))
def test_a_common_prefix_is_shared_by_all_and_leaves_each_a_token(shared: list[int], ends: list[list[int]]) -> None:
    rows = [[*shared, *end, 9] for end in ends]
    longest = 0
    while all(longest < len(row) - 1 and row[: longest + 1] == rows[0][: longest + 1] for row in rows):
        longest += 1
    assert common_prefix(rows) == (rows[0][:longest] if longest >= 32 else [])


def test_cut_prompts_do_not_keep_the_others_from_their_prefix() -> None:
    ids = {("t", row): [*range(40), row] for row in range(3)} | {("t", 3): list(range(1, 60))}
    plan = make_plan([Request("t", row, "", 5) for row in range(4)], ids, 8, limit=59)
    assert plan == [Batch("t", (3,), 0), Batch("t", (0, 1, 2), 40)]


def test_our_model_in_memory_shares_its_weights(tokenizer: Tokenizer) -> None:
    for tied, qk_norm in ((True, True), (False, False)):
        model = Transformer(ModelConfig(2, 32, 2, 1, 16, 64, tokenizer.vocab_size, 64, tied=tied, qk_norm=qk_norm))
        twin, tokens = in_memory(model), torch.randint(tokenizer.vocab_size, (2, 9))
        for _ in range(2):
            with torch.no_grad():
                torch.testing.assert_close(twin(tokens).logits, model(tokens), rtol=1e-4, atol=1e-4)
                for parameter in model.parameters():  # as a step of training does
                    parameter.mul_(1.1)
        assert all(parameter.requires_grad for parameter in model.parameters())


def test_our_model_in_training_answers_and_trains_on(tokenizer: Tokenizer, hf_tokenizer: Any) -> None:
    model = Transformer(ModelConfig(2, 32, 2, 1, 16, 64, tokenizer.vocab_size, 512, tied=False, qk_norm=True)).train()
    generator = Generator(in_memory(model), hf_tokenizer)
    with torch.autocast("cpu", torch.bfloat16):
        assert len(answers(generator, requests_of("t", 3))) == 3
    assert model.training
    model(torch.zeros(1, 5, dtype=torch.long)).sum().backward()


def test_a_foreign_model_in_memory_is_itself() -> None:
    values = LlamaConfig(vocab_size=64, **SMALL).to_dict() | {"architectures": ["LlamaForCausalLM"]}
    model = Foreign(values)
    assert in_memory(model) is model.hf


def test_a_folder_is_loaded_and_answers(micro_model: Path) -> None:
    model, tokenizer = load(micro_model, "cpu")
    assert model.dtype == torch.float32
    assert not model.training
    assert len(answers(Generator(model, tokenizer), requests_of("t", 3, shots=""))) == 3


def empty(folder: Path, *patterns: str) -> None:
    for pattern in patterns:
        for file in folder.glob(pattern):
            file.unlink()


def as_pickle(folder: Path) -> None:
    empty(folder, "*.safetensors")
    torch.save({}, folder / "pytorch_model.bin")


def without_end(folder: Path) -> None:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token": None}))


def of_another_shape(folder: Path) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_hidden_layers": 3}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: empty(folder, "config.json"), "no model folder"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be read"),
        (lambda folder: empty(folder, "*.safetensors"), "has no weights"),
        (as_pickle, "Convert it to safetensors"),
        (lambda folder: empty(folder, "tokenizer.json"), "has no tokenizer"),
        (without_end, "names no eos_token"),
        (of_another_shape, "do not fit its config.json"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"cut"), "cannot be loaded"),
    ],
)
def test_what_is_no_model_folder_is_named(micro_model: Path, tmp_path: Path, spoil: Any, message: str) -> None:
    folder = shutil.copytree(micro_model, tmp_path / "model")
    spoil(folder)
    with pytest.raises(UserError, match=message):
        load(folder, "cpu")
