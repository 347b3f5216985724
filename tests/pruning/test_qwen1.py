"""A first-generation Qwen imported, held to a forward pass written from its description alone."""

import base64
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.errors import UserError
from models.hf import WeightFiles
from pruning.qwen1 import SPECIAL, byte_level_bpe, convert, is_qwen1, qwen2_config, read_ranks
from pruning.shapes import Shape, parameters

CONFIG: dict[str, Any] = {
    "architectures": ["QWenLMHeadModel"],
    "auto_map": {"AutoConfig": "configuration_qwen.QWenConfig"},
    "bf16": False,
    "fp16": False,
    "hidden_size": 32,
    "intermediate_size": 96,
    "kv_channels": 8,
    "layer_norm_epsilon": 1e-6,
    "max_position_embeddings": 64,
    "model_type": "qwen",
    "no_bias": True,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "seq_length": 24,
    "tie_word_embeddings": False,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "vocab_size": 520,
}
PAIRS = [
    b"th",
    b"he",
    b"the",
    b" t",
    b" the",
    b"in",
    b"ing",
    "画".encode()[:2],
    "画".encode(),
    b"  ",
    b"\n\n",
    b"aa",
    b"aaa",
]
RANKS = [bytes([one]) for one in range(256)] + PAIRS


def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    width, ffn, vocab = CONFIG["hidden_size"], CONFIG["intermediate_size"] // 2, CONFIG["vocab_size"]
    shapes = {"transformer.wte.weight": (vocab, width), "lm_head.weight": (vocab, width)}
    for layer in range(CONFIG["num_hidden_layers"]):
        block = {"attn.c_attn.weight": (3 * width, width), "attn.c_attn.bias": (3 * width,)}
        block |= {"attn.c_proj.weight": (width, width), "ln_1.weight": (width,), "ln_2.weight": (width,)}
        block |= {"mlp.w1.weight": (ffn, width), "mlp.w2.weight": (ffn, width), "mlp.c_proj.weight": (width, ffn)}
        shapes |= {f"transformer.h.{layer}.{name}": shape for name, shape in block.items()}
    shapes["transformer.ln_f.weight"] = (width,)
    return {name: torch.randn(shape) * 0.3 + (1 if "ln_" in name else 0) for name, shape in shapes.items()}


def write_qwen(folder: Path, *, chat: bool = False, **changes: Any) -> Path:
    """A folder as it lies on the hub, in two shards, its code left out."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    generation = {"chat_format": "chatml" if chat else "raw", "eos_token_id": 151643, "pad_token_id": 151643}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    names = list(tensors().items())
    for number, part in enumerate((names[:9], names[9:]), 1):
        save_file(dict(part), folder / f"model-{number:05d}-of-00002.safetensors", metadata={"format": "pt"})
    lines = [base64.b64encode(token) + f" {rank}".encode() for rank, token in enumerate(RANKS)]
    (folder / "qwen.tiktoken").write_bytes(b"\n".join(lines) + b"\n")
    return folder


def original_logits(ids: Tensor) -> Tensor:
    """What a first-generation Qwen computes within the length it was trained on.

    x + c_proj(attention(ln_1(x))), then x + c_proj(w1(y) * silu(w2(y))) of y = ln_2(x); each head's halves turned by
    the angles position / base^(2i/N).
    """
    w = {name.removeprefix("transformer."): tensor.double() for name, tensor in tensors().items()}
    heads, size, count = CONFIG["num_attention_heads"], CONFIG["kv_channels"], len(ids)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return weight * x / (x.pow(2).mean(-1, keepdim=True) + CONFIG["layer_norm_epsilon"]).sqrt()

    angles = torch.outer(torch.arange(count), 1.0 / CONFIG["rotary_emb_base"] ** (torch.arange(0, size, 2) / size))
    turn = torch.polar(torch.ones_like(angles, dtype=torch.double), angles.double())

    def turned(x: Tensor) -> Tensor:
        pairs = torch.complex(x[..., : size // 2], x[..., size // 2 :]) * turn
        return torch.cat([pairs.real, pairs.imag], -1)

    x = w["wte.weight"][ids]
    for layer in range(CONFIG["num_hidden_layers"]):
        block = {name.removeprefix(f"h.{layer}."): part for name, part in w.items() if name.startswith(f"h.{layer}.")}
        mixed = norm(x, block["ln_1.weight"]) @ block["attn.c_attn.weight"].T + block["attn.c_attn.bias"]
        query, key, value = (part.view(count, heads, size).transpose(0, 1) for part in mixed.split(heads * size, -1))
        scores = turned(query) @ turned(key).transpose(1, 2) / math.sqrt(size)
        scores = scores.masked_fill(torch.ones(count, count).triu(1).bool(), -math.inf)
        attended = (scores.softmax(-1) @ value).transpose(0, 1).reshape(count, -1)
        x = x + attended @ block["attn.c_proj.weight"].T
        y = norm(x, block["ln_2.weight"])
        gated = (y @ block["mlp.w1.weight"].T) * torch.nn.functional.silu(y @ block["mlp.w2.weight"].T)
        x = x + gated @ block["mlp.c_proj.weight"].T
    return norm(x, w["ln_f.weight"]) @ w["lm_head.weight"].T


def tiktoken_ids(word: bytes) -> list[int]:
    """tiktoken's rule: join the neighbours whose joint token has the lowest rank, the leftmost first."""
    ranks = {token: rank for rank, token in enumerate(RANKS)}
    if word in ranks:
        return [ranks[word]]
    parts = [bytes([one]) for one in word]
    while True:
        joint = [
            (ranks[parts[at] + parts[at + 1]], at) for at in range(len(parts) - 1) if parts[at] + parts[at + 1] in ranks
        ]
        if not joint:
            return [ranks[part] for part in parts]
        _, at = min(joint)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("qwen")
    said: list[str] = []
    convert(write_qwen(folder / "Qwen"), folder / "out", said.append)
    return folder / "out", said


def test_the_import_computes_what_the_original_does(imported: tuple[Path, list[str]]) -> None:
    model = AutoModelForCausalLM.from_pretrained(imported[0], dtype=torch.float64).eval()
    ids = torch.randint(CONFIG["vocab_size"], (CONFIG["seq_length"],), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(model(ids[None]).logits[0], original_logits(ids), rtol=0, atol=1e-5)


def test_the_folder_is_a_plain_qwen2(imported: tuple[Path, list[str]]) -> None:
    folder, said = imported
    values = json.loads((folder / "config.json").read_text())
    assert values["architectures"] == ["Qwen2ForCausalLM"]
    assert "auto_map" not in values
    assert (values["intermediate_size"], values["rope_theta"], values["max_position_embeddings"]) == (48, 1e4, 24)
    assert "the context is 24 tokens, the length it was trained on: the original reaches 64" in said[-1]
    files = WeightFiles(folder)
    assert sum(files.read(name).numel() for name in files.names) == parameters(values, Shape.of(values))
    assert json.loads((folder / "palmtop.json").read_text())["data"] == [
        {"stage": "unknown", "from": str(folder.parent / "Qwen")}
    ]


def test_the_tokenizer_encodes_as_tiktoken_does(imported: tuple[Path, list[str]]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(imported[0])
    text = "the thing in the aaaaa baaaab painting  \n\n\n 画蛇添足 12 he'll the"
    words = re.findall(r"'ll| ?[A-Za-z]+| ?[一-鿿]+|\d|\s*\n+|\s+(?!\S)|\s", text)
    assert "".join(words) == text
    expected = [one for word in words for one in tiktoken_ids(word.encode())]
    assert tokenizer(text)["input_ids"] == expected
    assert tokenizer.decode(expected) == text
    assert tokenizer("e\u0301")["input_ids"] == tokenizer("é")["input_ids"]  # NFC
    assert len(tokenizer) == len(RANKS) + len(SPECIAL)
    assert tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|endoftext|>") == len(RANKS)
    assert tokenizer.chat_template is None


def test_merges_are_every_way_to_cut_a_token() -> None:
    ranks = {token: rank for rank, token in enumerate(RANKS)}
    content = json.loads(byte_level_bpe(ranks).to_str())
    assert [pair for pair in content["model"]["merges"] if "".join(pair) in ("the", "aaa")] == [
        ["t", "he"], ["th", "e"], ["a", "aa"], ["aa", "a"],
    ]  # fmt: skip


def test_a_chat_model_has_its_template(tmp_path: Path) -> None:
    convert(write_qwen(tmp_path / "chat", chat=True), tmp_path / "out", lambda text: None)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.eos_token == "<|im_end|>"
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [
        tokenizer.convert_tokens_to_ids(one) for one in ("<|im_end|>", "<|endoftext|>")
    ]
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "ho"},
        {"role": "user", "content": "?"},
    ]
    spoken = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nho<|im_end|>\n<|im_start|>user\n?<|im_end|>\n"
    system = "<|im_start|>system\n{}<|im_end|>\n"
    rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert rendered == system.format("You are a helpful assistant.") + spoken + "<|im_start|>assistant\n"
    own = [{"role": "system", "content": "Be brief."}, *turns]
    rendered = tokenizer.apply_chat_template(own, tokenize=False, add_generation_prompt=True)
    assert rendered == system.format("Be brief.") + spoken + "<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"no_bias": False}, "biases beside those of queries, keys and values, which Qwen2 has not"),
        ({"rotary_pct": 0.5}, "partial rotary embedding"),
        ({"kv_channels": 16}, "heads that do not make up the width"),
        ({"architectures": ["LlamaForCausalLM"]}, "is a LlamaForCausalLM, not a first-generation Qwen"),
        ({"quantization_config": {"bits": 4}}, "weights are quantised"),
        ({"vocab_size": 400}, "make 477 tokens, more than the 400 rows"),
    ],
)
def test_what_qwen2_is_not_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = write_qwen(tmp_path / "Qwen", **changes)
    with pytest.raises(UserError, match=message):
        convert(folder, tmp_path / "out", lambda text: None)
    assert not (tmp_path / "out").exists()


def test_damaged_folders_are_named(tmp_path: Path) -> None:
    folder = write_qwen(tmp_path / "Qwen")
    for content, message in (
        (b"AA== 1\n", "do not run from 0"),
        (b"?? 0\n", "cannot be read as base64"),
        (None, "copy it"),
    ):
        (folder / "qwen.tiktoken").unlink()
        if content is not None:
            (folder / "qwen.tiktoken").write_bytes(content)
        with pytest.raises(UserError, match=message):
            read_ranks(folder / "qwen.tiktoken")
    with pytest.raises(UserError, match="config.json has no 'seq_length'"):
        qwen2_config({name: value for name, value in CONFIG.items() if name != "seq_length"})
    assert not is_qwen1({})
