"""The table of shapes, held to transformers: every legal one is built."""

from dataclasses import replace

import pytest
import torch
import transformers

from common.errors import UserError
from models.hf_config import with_rope_at_top
from pruning.shapes import Shape, check, head_counts, parameters, resized, step

SMALL = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "vocab_size": 120,
    "max_position_embeddings": 64,
}
SCALED = {
    "rope_theta": 5e5,
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
MODELS = {
    "llama": ("llama", {"tie_word_embeddings": True}),
    "llama-with-everything": (
        "llama",
        {"rope_parameters": SCALED, "attention_bias": True, "mlp_bias": True, "head_dim": 12},
    ),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-untied": ("qwen2", {"tie_word_embeddings": False}),
    "qwen3": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3-with-biases": ("qwen3", {"head_dim": 8, "attention_bias": True, "tie_word_embeddings": False}),
    "phi": ("phi", {"num_key_value_heads": 6, "partial_rotary_factor": 0.4}),
    "phi-with-norms": ("phi", {"num_key_value_heads": 6, "qk_layernorm": True}),
}
LLAMA_3 = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_theta": 5e5,
}
QWEN2 = LLAMA_3 | {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18944,
    "vocab_size": 152064,
}
PHI_2 = LLAMA_3 | {
    "architectures": ["PhiForCausalLM"],
    "model_type": "phi",
    "hidden_size": 2560,
    "num_key_value_heads": 32,
    "intermediate_size": 10240,
    "vocab_size": 51200,
    "max_position_embeddings": 2048,
    "partial_rotary_factor": 0.4,
}


def values_of(name: str) -> dict:
    """A ``config.json`` as transformers writes it."""
    kind, changes = MODELS[name]
    config = transformers.AutoConfig.for_model(kind, **(SMALL | changes))
    with torch.device("meta"):
        config.architectures = [type(transformers.AutoModelForCausalLM.from_config(config)).__name__]
    return config.to_dict()


def built(values: dict) -> transformers.PreTrainedModel:
    config = transformers.AutoConfig.for_model(**values)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("name", MODELS)
def test_every_legal_shape_is_built_and_counted(name: str) -> None:
    values = values_of(name)
    now = Shape.of(values)
    assert step(values) == 8
    cuts = [{"layers": 1}, {"ffn": 24}, {"vocab": 64}, {"layers": 2, "ffn": 8, "vocab": 72}]
    head_cuts = [{"heads": heads, "kv_heads": kv} for heads, kv in head_counts(values)]
    for changes in [*cuts, *head_cuts, cuts[-1] | head_cuts[-1]]:
        shape = replace(now, **changes)
        check(values, shape)
        model = built(resized(values, shape))
        assert sum(parameter.numel() for parameter in model.parameters()) == parameters(values, shape), shape
        assert Shape.of(model.config.to_dict()) == shape
        assert model.model.layers[0].self_attn.head_dim == built(values).model.layers[0].self_attn.head_dim
    assert parameters(values, now) == built(values).num_parameters()


@pytest.mark.parametrize(
    ("values", "count"), [(LLAMA_3, 8_030_261_248), (QWEN2, 7_615_616_512), (PHI_2, 2_779_683_840)]
)
def test_real_models_have_as_many_parameters_as_published(values: dict, count: int) -> None:
    assert parameters(values, Shape.of(values)) == count
    assert step(values) == 64


def test_heads_are_cut_where_both_readers_take_it() -> None:
    assert head_counts(values_of("llama")) == [(6, 3), (4, 2), (3, 3), (2, 2), (2, 1), (1, 1)]  # those that divide 48
    wide = values_of("llama") | {"hidden_size": 40}
    assert head_counts(wide) == [(6, 3), (4, 2), (2, 2), (2, 1), (1, 1)]
    assert head_counts(values_of("qwen3")) == [(6, 3), (4, 2), (3, 3), (2, 2), (2, 1), (1, 1)]
    assert head_counts(values_of("qwen3") | {"hidden_size": 40})[2] == (3, 3)
    assert head_counts(values_of("qwen2")) == [(6, 3)]
    assert head_counts(values_of("phi")) == [(6, 6)]


def test_transformers_refuses_what_the_table_leaves_out() -> None:
    with pytest.raises(Exception, match="multiple|divisible"):
        built(resized(values_of("llama") | {"hidden_size": 40, "head_dim": 8}, Shape(3, 80, 3, 3, 120)))


@pytest.mark.parametrize("name", MODELS)
def test_rotary_settings_stand_where_mlc_reads_them(name: str) -> None:
    """transformers writes ``rope_parameters`` alone, and MLC-LLM falls back to other values without a word."""
    values = values_of(name)
    small = resized(values, replace(Shape.of(values), layers=1, ffn=24, vocab=64))
    assert small["rope_theta"] == values["rope_parameters"]["rope_theta"]
    assert small == with_rope_at_top(small)
    if "everything" in name:
        assert small["rope_scaling"] == {key: value for key, value in SCALED.items() if key != "rope_theta"}
    else:
        assert small["rope_scaling"] is None  # MLC-LLM takes no other type than llama3
    if name == "phi":
        assert small["partial_rotary_factor"] == 0.4
    assert len(small.get("layer_types") or [0]) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 0}, "--layers takes 1 to 3, which the model has, not 0"),
        ({"layers": 4}, "--layers takes 1 to 3, which the model has, not 4"),
        ({"ffn": 88}, "--ffn takes 1 to 80, which the model has, not 88"),
        ({"ffn": 42}, "ffn 42 is no multiple of 8; the nearest that is, is 40"),
        ({"vocab": 101}, "vocab 101 is no multiple of 8; the nearest that is, is 104"),
        ({"heads": 5}, "5 query heads on 3 key/value heads cannot be cut .* take 6/3, 4/2, 3/3"),
        ({"kv_heads": 2}, "6 query heads on 2 key/value heads"),
    ],
)
def test_what_is_no_legal_cut_is_refused(changes: dict[str, int], message: str) -> None:
    values = values_of("llama")
    with pytest.raises(UserError, match=message):
        check(values, replace(Shape.of(values), **changes))


def test_other_models_are_refused() -> None:
    with pytest.raises(UserError, match="is a GPT2LMHeadModel; pruning takes LlamaForCausalLM, Qwen2"):
        Shape.of({"architectures": ["GPT2LMHeadModel"]})
    with pytest.raises(UserError, match="config.json has no 'num_hidden_layers'"):
        Shape.of({"architectures": ["PhiForCausalLM"]})
    with pytest.raises(UserError, match="sliding windows"):
        Shape.of(values_of("qwen2") | {"use_sliding_window": True})
