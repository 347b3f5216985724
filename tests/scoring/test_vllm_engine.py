"""vLLM's answers against ours, through a stand-in that has vLLM's interface."""

import json
import shutil
import sys

import pytest

from common.errors import UserError
from scoring import vllm_engine
from scoring.generation import GenerationSettings, Generator
from scoring.loading import load
from scoring.requests import Request
from scoring.vllm_engine import VllmGenerator
from tests.scoring import fake_vllm

PROMPTS = ["the of and", "a to in is that it was for on are", "", "there we can " * 60, "<|user|>12 7<|turn_end|>"]


@pytest.fixture
def vllm(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", fake_vllm)
    fake_vllm.ENGINES.clear()
    return fake_vllm


def requests_for(prompts, most=8):
    return [Request("gsm8k", row, prompt, most + row) for row, prompt in enumerate(prompts)]


def answers_of(engine, requests):
    answers = {}
    engine.generate(requests, lambda request, text: answers.update({request.row: text}))
    return answers


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("limit", [None, 16])
def test_same_answers_as_the_default_engine(vllm, micro_model, chat, limit):
    settings = GenerationSettings(chat=chat, max_seq_len=limit, early_stop=False)
    model, tokenizer = load(micro_model, "cpu", "float32")
    ours = answers_of(Generator(model, tokenizer, settings), requests_for(PROMPTS))
    theirs = answers_of(VllmGenerator(micro_model, settings, dtype="float32"), requests_for(PROMPTS))
    assert theirs == ours
    assert len(theirs) == len(PROMPTS)


def test_end_tokens_are_the_generation_configs(vllm, micro_model, tmp_path):
    folder = shutil.copytree(micro_model, tmp_path / "model")
    settings = GenerationSettings(early_stop=False)
    whole = answers_of(VllmGenerator(folder, settings, dtype="float32"), requests_for(["the of and"]))[0]
    engine = VllmGenerator(folder, settings, dtype="float32")
    second = engine.tokenizer(whole, add_special_tokens=False)["input_ids"][1]
    values = json.loads((folder / "generation_config.json").read_text()) | {"eos_token_id": [second]}
    (folder / "generation_config.json").write_text(json.dumps(values))
    cut = answers_of(VllmGenerator(folder, settings, dtype="float32"), requests_for(["the of and"]))[0]
    assert whole.startswith(cut)
    assert len(cut) < len(whole)


def test_an_answer_may_run_past_the_context(vllm, micro_model):
    context = 64  # of the micro model
    engine = VllmGenerator(micro_model, GenerationSettings(early_stop=False), dtype="float32")
    answers = answers_of(engine, requests_for(["there we can " * 60], most=12))
    assert vllm.ENGINES[-1].max_model_len == context + 12
    assert answers[0]


def test_answers_come_in_chunks_and_the_engine_stays(vllm, micro_model, monkeypatch):
    monkeypatch.setattr(vllm_engine, "CHUNK", 2)
    engine = VllmGenerator(micro_model, GenerationSettings(early_stop=False), dtype="float32")
    assert len(answers_of(engine, requests_for(PROMPTS))) == 5
    answers_of(engine, requests_for(PROMPTS[:1]))
    assert [one.calls for one in vllm.ENGINES] == [[2, 2, 1, 1]]


def test_what_was_kept_stays_when_a_later_chunk_fails(vllm, micro_model, monkeypatch):
    monkeypatch.setattr(vllm_engine, "CHUNK", 2)
    engine = VllmGenerator(micro_model, GenerationSettings(early_stop=False), dtype="float32")
    answers_of(engine, requests_for(PROMPTS))
    write = fake_vllm.LLM.generate

    def fails_later(self, prompts, *rest, **more):
        if len(self.calls) == 4:
            raise RuntimeError("the GPU is gone")
        return write(self, prompts, *rest, **more)

    monkeypatch.setattr(fake_vllm.LLM, "generate", fails_later)
    kept = []
    with pytest.raises(RuntimeError, match="the GPU is gone"):
        engine.generate(requests_for(PROMPTS), lambda request, text: kept.append(request.row))
    assert kept == [0, 1]


def test_says_that_there_is_no_early_stop(vllm, micro_model):
    said = []
    engine = VllmGenerator(micro_model, say=said.append)
    assert "no early stop" in said[0]
    assert engine.asked["engine"] == "vllm"


def test_without_vllm_the_message_says_how_to_get_it(micro_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match="pip install vllm"):
        VllmGenerator(micro_model)


def test_what_vllm_refuses_is_one_message(vllm, micro_model, monkeypatch):
    def refuses(self, model, **arguments):
        raise ValueError("Model architectures ['X'] are not\n supported")

    monkeypatch.setattr(fake_vllm.LLM, "__init__", refuses)
    engine = VllmGenerator(micro_model, GenerationSettings(early_stop=False))
    with pytest.raises(UserError, match=r"vLLM cannot run .*\['X'\] are not supported"):
        answers_of(engine, requests_for(PROMPTS[:1]))
