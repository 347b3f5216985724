"""What is refused before anything is written, and what is warned of."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from common.errors import UserError
from common.settings import Count
from export import check as checking
from export.check import Memory, check
from export.settings import MlcSettings
from models.budget import kv_cache_bytes
from models.hf_config import nearest_shape
from tests.export.conftest import KINDS, Folder
from tests.export.test_mlc_config import COUNTS


def edit(file: Path, **changes: object) -> None:
    """Change some values of a JSON file; None removes one."""
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))


def edit_weights(folder: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_a_sound_folder_passes(kind: str, folder: Folder) -> None:
    model = folder(kind)
    found = check(model, MlcSettings())
    assert (found.context, found.prefill_chunk, found.warnings) == (64, 64, ())
    assert found.memory.passes
    assert found.memory.weights == 2 * found.size
    assert found.memory.cache == kv_cache_bytes(nearest_shape(found.values, model), 64)
    assert found.values["rope_theta"] == 1e4
    smaller = check(model, MlcSettings(context=Count(32), prefill_chunk=Count(16)))
    assert (smaller.context, smaller.prefill_chunk) == (32, 16)


def test_the_gate_is_warned_of(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking, "Memory", lambda weights, cache: Memory(weights, cache, gate=1000))
    found = check(folder("llama"), MlcSettings())
    assert not found.memory.passes
    assert "MLC-LLM's engine refuses the model on OpenCL" in found.warnings[0]


def test_a_template_that_mlc_cannot_follow_is_warned_of(folder: Folder) -> None:
    model = folder("llama")
    edit(model / "tokenizer_config.json", chat_template=COUNTS)
    assert "cannot follow the chat template" in check(model, MlcSettings()).warnings[0]


def test_a_folder_that_still_has_old_tensors_passes(folder: Folder) -> None:
    model = folder("llama")
    edit_weights(
        model, lambda weights: weights.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, "f4")})
    )
    check(model, MlcSettings())


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("llama", {"architectures": ["GPT2LMHeadModel"]}, "is a GPT2LMHeadModel; this command takes"),
        ("llama", {"quantization_config": {"bits": 4}}, "are quantised"),
        ("llama", {"attention_bias": True}, "has attention biases, which MLC-LLM's LlamaForCausalLM does not have"),
        ("llama", {"hidden_act": "gelu"}, "has the activation gelu"),
        ("llama", {"rms_norm_eps": None}, "has no rms_norm_eps, which MLC-LLM needs"),
        ("llama", {"rope_theta": 5e5}, "contradicts itself: rope_theta is 500000.0 at the top level and 10000.0"),
        ("llama", {"num_key_value_heads": 3}, "4 query heads for 3 key/value heads"),
        ("llama", {"intermediate_size": 64}, "down_proj.weight is (32, 48), expected (32, 64)"),
        ("llama", {"num_hidden_layers": 3}, "lack 9 tensors, such as 'model.layers.2.input_layernorm.weight'"),
        ("llama", {"num_hidden_layers": 1}, "hold 9 tensors that a LlamaForCausalLM does not have"),
        ("qwen2", {"use_sliding_window": True}, "has sliding windows"),
        ("qwen2", {"head_dim": 16}, "4 heads of 16 at a width of 32"),
        ("qwen3", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rotary embedding stretched by yarn"),
        ("phi", {"tie_word_embeddings": True}, "a head tied to the embedding"),
        ("phi", {"qk_layernorm": True}, "norms of queries and keys"),
    ],
)
def test_a_configuration_that_mlc_does_not_have(
    kind: str, changes: dict[str, object], message: str, folder: Folder
) -> None:
    model = folder(kind)
    edit(model / "config.json", **changes)
    with pytest.raises(UserError) as error:
        check(model, MlcSettings())
    assert message in str(error.value)


def test_a_context_beyond_the_models(folder: Folder) -> None:
    with pytest.raises(UserError, match="--context 65 is longer than the model's context of 64"):
        check(folder("qwen3"), MlcSettings(context=Count(65)))


def test_weights_that_are_no_safetensors_or_no_floats(folder: Folder) -> None:
    model = folder("qwen3")
    edit_weights(model, lambda weights: weights.update({"model.norm.weight": np.ones(32, "i1")}))
    with pytest.raises(UserError, match=r"are quantised \(model\.norm\.weight is I8\)"):
        check(model, MlcSettings())
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(UserError, match="has its weights only as pickle"):
        check(model, MlcSettings())


def test_tokenizers_that_do_not_fit(folder: Folder) -> None:
    model = folder("qwen3")
    edit(
        model / "tokenizer_config.json", chat_template="{% for m in messages %}{{ '<|wer|>' + m.content }}{% endfor %}"
    )
    with pytest.raises(UserError, match=r"writes <\|wer\|>, which its tokenizer does not know"):
        check(model, MlcSettings())
    (model / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"holds no tokenizer\.json"):
        check(model, MlcSettings())
    with pytest.raises(UserError, match=r"has 512 tokens, the model only 300"):
        check(folder("llama", vocab_size=300), MlcSettings())
    with pytest.raises(UserError, match=r"ends its answers with token 600, but the model has only 512"):
        check(folder("phi", eos_token_id=600), MlcSettings())
