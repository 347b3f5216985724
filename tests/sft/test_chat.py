"""The chat: what the model is sent, what is shown and when, and how it ends."""

import io
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.errors import UserError
from data.tokenizer import Tokenizer
from models.hf import write_model
from models.sizes import ModelConfig
from models.transformer import Transformer
from sft.chat import Assistant, History, Streamer, chat_command, talk
from sft.chat_settings import ChatSettings
from tests.conftest import ROOT

CHAT = [sys.executable, "-c", "from sft.chat import chat_command; import sys; chat_command(sys.argv[1:])"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}

ASSISTANT, TURN_END = 5, 6
"""Ids of ``<|assistant|>``, which opens an answer, and ``<|turn_end|>``, which closes it."""

ANSWER = "再见，ok"
"""Eleven bytes of Chinese, none of them twice."""


def rigged(folder: Path, tokenizer: Tokenizer, ids: list[int]) -> Path:
    """A model that, greedy, says ``ids`` after an answer's opening: a token that comes again goes on as before.

    Its blocks add nothing, so the last hidden state is the last token's embedding; the head's row of each
    token is the sum of the embeddings of its predecessors.
    """
    config = ModelConfig(1, 64, 2, 1, 32, 32, tokenizer.vocab_size, 2**20, tied=False, qk_norm=False)
    state = Transformer(config, seed=0).state_dict()
    for name in ("attention.out", "ffn.down"):
        state[f"blocks.0.{name}.weight"].zero_()
    random = torch.randn(state["embedding.weight"].shape, generator=torch.Generator().manual_seed(0))
    embedding = torch.nn.functional.normalize(random, dim=1)
    state["embedding.weight"], state["head.weight"] = embedding, torch.zeros_like(embedding)
    for before, after in zip([ASSISTANT, *ids], ids, strict=False):
        state["head.weight"][after] += embedding[before]
    folder.mkdir()
    write_model(state, config, folder, bos=tokenizer.begin, eos=TURN_END, pad=tokenizer.pad)
    tokenizer.copy_to(folder)
    return folder


@pytest.fixture(scope="module")
def polite(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that answers everything with ANSWER and ends its turn."""
    ids = tokenizer.encode(ANSWER)
    assert len(set(ids)) == len(ids) > len(ANSWER)  # characters are spread over tokens
    return rigged(tmp_path_factory.mktemp("polite") / "model", tokenizer, [*ids, TURN_END])


@pytest.fixture(scope="module")
def assistant(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Assistant:
    """A random model that sees 64 tokens; its head is its own, for a tied one would echo the last token for ever."""
    config = ModelConfig(2, 32, 2, 1, 16, 64, tokenizer.vocab_size, 64, tied=False, qk_norm=False)
    state = Transformer(config, seed=0).state_dict()
    state["head.weight"] = torch.randn(state["head.weight"].shape, generator=torch.Generator().manual_seed(0))
    folder = tmp_path_factory.mktemp("random")
    write_model(state, config, folder, bos=tokenizer.begin, eos=tokenizer.end, pad=tokenizer.pad)
    tokenizer.copy_to(folder)
    return Assistant.load(ChatSettings(str(folder), temperature=0, max_tokens=8, device="cpu"))


def count(messages: list[dict[str, str]]) -> list[int]:
    """An encoding with a token a character."""
    return [ord(character) for message in messages for character in message["content"]]


def test_a_pipe_is_answered_line_by_line(polite: Path) -> None:
    lines = [
        "你好",
        "",
        "/reset",
        "/system 说中文",
        "  /etc is a folder  ",
        b"\xff\xfe\xe4 bytes",
        "/nothing",
        "/help",
        "bye",
    ]
    typed = b"\n".join(line.encode() if isinstance(line, str) else line for line in lines)
    words = [polite, "--temperature", "0", "--system", b"\xff\xe4"]
    done = subprocess.run([*CHAT, *words], input=typed, capture_output=True, cwd=ROOT, env=ENVIRONMENT, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")
    said = done.stdout.decode().splitlines()
    head = ["chat", "model", "parameters", "device", "context", "answers", "commands"]
    assert [line.split()[0] for line in said[:7]] == head
    assert "1,048,576 tokens, of which an answer takes at most 512" in said[4]
    fresh = "(a new conversation, with a system turn)"
    assert said[7:12] == [ANSWER, fresh, fresh, ANSWER, ANSWER]
    assert said[12] == "error: there is no command /nothing; /help lists them"
    assert said[13].split()[0] == "/reset"
    assert said[-1] == ANSWER


def test_ctrl_c_stops_an_answer_and_ctrl_d_ends_the_chat(tokenizer: Tokenizer, tmp_path: Path) -> None:
    endless = tokenizer.encode("再见")
    model = rigged(tmp_path / "model", tokenizer, [*endless, endless[0]])
    terminal, child = pty.openpty()
    words = [*CHAT, model, "--temperature", "0", "--max-tokens", "500000"]  # not over before the test is
    started = time.monotonic()
    with subprocess.Popen(
        words, stdin=child, stdout=child, stderr=child, cwd=ROOT, env=ENVIRONMENT, start_new_session=True,
        preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)),  # becomes the controlling terminal
    ) as process:  # fmt: skip
        os.close(child)
        shown = b""

        def wait_for(text: str) -> None:
            nonlocal shown
            while text.encode() not in shown:
                assert time.monotonic() < started + 60, shown.decode(errors="replace")
                shown += os.read(terminal, 4096)
            shown = shown.partition(text.encode())[2]

        for _ in range(2):
            wait_for("> ")
            os.write(terminal, "你好\n".encode())
            wait_for("再见再见")
            os.write(terminal, b"\x03")
        wait_for("> ")
        os.write(terminal, b"\x04")
        assert process.wait(10) == 0
    os.close(terminal)
    assert b"Traceback" not in shown


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    program = """if True:
        import sys
        from sft.chat import chat_command
        try:
            chat_command(["--help"])
        finally:
            assert not {"torch", "transformers", "datasets"} & set(sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "python -m sft chat runs/my-chat/model" in done.stdout
    assert "--max-tokens" in done.stdout


def test_greedy_answers_are_those_of_generate(assistant: Assistant) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = assistant.settings.model
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for question in ("what do they say", "你好", "1 2 3"):
        ids = assistant.encode([{"role": "user", "content": question}])
        assert tokenizer.decode(ids) == f"<|begin|><|user|>{question}<|turn_end|><|assistant|>"
        streamer = Streamer(assistant.tokenizer)
        assistant.answer(ids, streamer)
        prompt = torch.tensor([ids])
        full = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False)
        expected = tokenizer.decode(full[0, len(ids) :], skip_special_tokens=True)
        assert streamer.text == expected.rstrip("\ufffd") != ""


def test_a_seed_repeats_an_answer(micro_model: Path) -> None:
    answers = []
    for seed in (1, 1, 2):
        assistant = Assistant.load(ChatSettings(str(micro_model), max_tokens=20, seed=seed, device="cpu"))
        streamer = Streamer(assistant.tokenizer)
        assistant.answer(assistant.encode([{"role": "user", "content": "hello"}]), streamer)
        answers.append(streamer.text)
    assert answers[0] == answers[1] != answers[2]


@pytest.mark.parametrize("family", ["Qwen2", "Phi"])
def test_models_of_other_families_answer(family: str, micro_model: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    import transformers

    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, **heads}
    ids = {"bos_token_id": tokenizer.begin, "eos_token_id": tokenizer.end, "pad_token_id": tokenizer.pad}
    config = getattr(transformers, f"{family}Config")(vocab_size=tokenizer.vocab_size, **shape, **ids)
    getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(tmp_path)
    tokenizer.copy_to(tmp_path)
    other = Assistant.load(ChatSettings(str(tmp_path), max_tokens=4, device="cpu"))
    assert type(other.model).__name__ == f"{family}ForCausalLM"
    other.answer(other.encode([{"role": "user", "content": "hello"}]), Streamer(other.tokenizer))


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("你好，再见。", ["你", "好", "，", "再", "见", "。"]),
        ("ひらがな", ["ひ", "ら", "が", "な"]),
        ("😀é", ["😀", "é"]),
        ("  x\n    y", None),  # whatever the tokens are
    ],
)
def test_text_is_shown_as_soon_as_its_characters_are_whole(
    text: str, pieces: list[str] | None, assistant: Assistant, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = assistant.tokenizer.encode(text, add_special_tokens=False)
    streamer = Streamer(assistant.tokenizer)
    streamer.put(torch.tensor([[1, 4, 6, ASSISTANT]]))
    shown = []
    for token in [*ids, TURN_END]:
        streamer.put(torch.tensor([token]))
        shown.append(capsys.readouterr().out)
    assert streamer.text == "".join(shown) == text
    assert shown[-1] == ""  # a special token
    if pieces is None:
        assert "" not in shown[:-1]
    else:
        assert [piece for piece in shown if piece] == pieces
        assert shown[len(text[:1].encode()) - 1] == pieces[0]  # with the character's last byte, not later
    streamer.end()
    assert capsys.readouterr().out == "\n"


def test_half_a_character_is_never_shown(assistant: Assistant, capsys: pytest.CaptureFixture[str]) -> None:
    streamer = Streamer(assistant.tokenizer)
    streamer.put(torch.tensor([[1]]))
    for token in assistant.tokenizer.encode("见见", add_special_tokens=False)[:-1]:
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert capsys.readouterr().out == "见\n"
    assert streamer.text == "见"


def test_a_question_comes_after_all_that_was_said() -> None:
    seen = []
    history = History(lambda messages: seen.append(messages) or [1], 100, 10, "Be brief.")
    history.ask("one")
    history.turns.append(("one", "1"))
    history.ask("two")
    roles = ["system", "user", "assistant", "user"]
    assert seen[1] == [
        {"role": role, "content": text} for role, text in zip(roles, ["Be brief.", "one", "1", "two"], strict=True)
    ]


def test_the_oldest_turns_make_room_but_never_the_system_turn() -> None:
    history = History(count, 30, 10, "SS", [("aaaa", "bbbb"), ("cc", "dd"), ("e", "f")])
    assert history.ask("12345") == (count([{"content": "SSccddef12345"}]), 1)
    assert history.turns == [("cc", "dd"), ("e", "f")]
    assert history.ask("123456789012") == (count([{"content": "SSccddef123456789012"}]), 0)  # just fits
    with pytest.raises(UserError) as refused:
        history.ask("x" * 19)
    assert str(refused.value) == (
        "too long: 21 tokens with the system turn, where the context of 30 has 20 beside an answer of up to 10"
    )
    assert history.turns == [("cc", "dd"), ("e", "f")]
    assert history.ask("x" * 18)[1] == 2
    assert history.turns == []


def test_surrogates_do_not_reach_the_tokenizer(assistant: Assistant) -> None:
    history = History(assistant.encode, 64, 8, "\udcff", [("a\udce4", "\ud83d")])
    ids, _ = history.ask("ok \udc80")
    assert "<|user|>ok ?<|turn_end|>" in assistant.tokenizer.decode(ids)


@pytest.fixture
def type_in(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    return lambda *lines: monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))


def test_a_long_conversation_stays_in_the_context(
    assistant: Assistant, type_in: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    assert (assistant.context, assistant.room) == (64, 8)
    history = History(assistant.encode, assistant.context, assistant.room)
    type_in(*(["hello"] * 8), "长" * 40, "hello", " /quit", "/quit", "never read")
    talk(assistant, history, interactive=False)
    said = capsys.readouterr().out
    assert "(the context is full: forgot the oldest turns, 1 of " in said
    assert "error: too long: 124 tokens, where the context of 64 has 56 beside an answer of up to 8" in said
    assert [question for question, _ in history.turns][-2:] == ["hello", "/quit"]
    assert len(history.encode(history._messages(0, ""))) <= 64
    assert sys.stdin.read() == "never read"


def test_half_of_a_short_context_is_kept_for_the_question(micro_model: Path) -> None:
    assert Assistant.load(ChatSettings(str(micro_model), device="cpu")).room == 32


class Interrupted(Assistant):
    """An assistant that is interrupted after some tokens."""

    ids: tuple[int, ...] = ()

    def answer(self, ids: list[int], streamer: Streamer) -> None:
        streamer.put(torch.tensor([ids]))
        for token in self.ids:
            streamer.put(torch.tensor([token]))
        signal.raise_signal(signal.SIGINT)


def test_what_was_said_before_ctrl_c_is_kept(
    assistant: Assistant, type_in: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    stopped = Interrupted(assistant.model, assistant.tokenizer, assistant.settings)
    history = History(stopped.encode, 64, 8)
    type_in("stopped before a word")
    talk(stopped, history, interactive=True)
    assert history.turns == []
    stopped.ids = tuple(assistant.tokenizer.encode("of the", add_special_tokens=False))
    type_in("hello")
    talk(stopped, history, interactive=True)
    assert history.turns == [("hello", "of the")]
    assert capsys.readouterr().out == "> \n> \n> of the\n> \n"
    type_in("hello")
    with pytest.raises(KeyboardInterrupt):  # of a pipe it ends the command
        talk(stopped, history, interactive=False)


def test_a_template_that_refuses_is_one_line(
    assistant: Assistant,
    type_in: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}hello"
    monkeypatch.setattr(assistant.tokenizer, "chat_template", template)
    type_in("/system Be brief.", "hello", "/system", "hello")
    history = History(assistant.encode, 64, 8)
    talk(assistant, history, interactive=False)
    assert "error: the model's chat template refuses this conversation: no system turns\n" in capsys.readouterr().out
    assert history.system is None


def _cut(model: Path) -> None:
    weights = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(weights[:-100])


def _drop_a_tensor(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def _misshape_a_tensor(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(7)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def _drop_the_template(model: Path) -> None:
    config = json.loads((model / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (model / "tokenizer_config.json").write_text(json.dumps(config))


def _need_code(model: Path) -> None:
    (model / "config.json").write_text('{"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}')


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (shutil.rmtree, "there is no model folder"),
        (lambda model: (model / "config.json").unlink(), "it has no config.json"),
        (lambda model: (model / "config.json").write_text("{"), "config.json cannot be read: "),
        (_need_code, "cannot be loaded: .* contains custom code"),
        (lambda model: (model / "tokenizer.json").unlink(), "has no tokenizer"),
        (lambda model: (model / "tokenizer.json").write_text("{"), "the tokenizer of .* cannot be loaded"),
        (_drop_the_template, "no chat template; fine-tune it first with `python -m sft "),
        (lambda model: (model / "model.safetensors").unlink(), "has no weights: model.safetensors is missing"),
        (_cut, "the model in .* cannot be loaded: .*not fully covered"),
        (_drop_a_tensor, "do not fit its config.json: model.norm.weight"),
        (_misshape_a_tensor, "do not fit its config.json: model.norm.weight"),
    ],
)
def test_a_folder_that_cannot_talk_is_one_line(
    spoil: Callable[[Path], None], says: str, micro_model: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(micro_model, model)
    spoil(model)
    with pytest.raises(UserError, match=says) as error:
        chat_command([str(model)])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--temperature", "-1"], "--temperature must be at least 0"),
        (["--top-p", "0"], "--top-p must be above 0"),
        (["--max-tokens", "0"], "--max-tokens must be at least 1"),
        (["--seed", "-1"], "--seed must be at least 0"),
        (["--device", "tpu"], "--device"),
    ],
)
def test_settings_that_make_no_sense_are_refused(words: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        chat_command(["model", *words])


def test_the_model_must_be_named() -> None:
    with pytest.raises(UserError, match="MODEL is missing"):
        chat_command([])


def test_a_gpu_that_is_not_there_is_refused(micro_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="torch sees no CUDA device"):
        chat_command([str(micro_model), "--device", "cuda"])
