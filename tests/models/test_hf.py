"""The model folder: transformers reads what we write, and we read it back."""

import json
from pathlib import Path

import pytest
import torch
import transformers

from common.errors import UserError
from models import hf
from models.hf_config import from_config, nearest_shape, read_config, to_config
from models.sizes import ModelConfig
from models.transformer import Transformer

CONFIG = ModelConfig(
    layers=2, width=32, heads=4, kv_heads=2, head_width=16, ffn=48, vocab=61, context=32, tied=False, qk_norm=False
)


def model_with_lively_norms(config: ModelConfig) -> Transformer:
    """Norm weights away from one and matrices larger than at the start, so that every one of them shows."""
    model = Transformer(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
            else:
                parameter *= 5
    return model.eval()


def write(model: Transformer, folder: Path) -> None:
    hf.write_model(model.state_dict(), model.config, folder, bos=1, eos=2, pad=None)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("qk_norm", [False, True], ids=["llama", "qwen3"])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_transformers_computes_our_logits(tmp_path: Path, kv_heads: int, qk_norm: bool, tied: bool) -> None:
    config = ModelConfig(**{**vars(CONFIG), "kv_heads": kv_heads, "qk_norm": qk_norm, "tied": tied})
    ours = model_with_lively_norms(config)
    write(ours, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(theirs).__name__ == ("Qwen3ForCausalLM" if qk_norm else "LlamaForCausalLM")
    tokens = torch.randint(config.vocab, (3, 32), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(32).remainder(12).repeat(3, 1)
    with torch.no_grad():
        plain = ours(tokens)
        assert plain.std() > 0.5  # far from the flat logits of a fresh model
        torch.testing.assert_close(plain, theirs(tokens).logits, rtol=0, atol=2e-5)
        packed = theirs(tokens, position_ids=positions, use_cache=False).logits
        torch.testing.assert_close(ours(tokens, positions), packed, rtol=0, atol=2e-5)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("qk_norm", [False, True], ids=["llama", "qwen3"])
def test_a_folder_gives_the_model_back(tmp_path: Path, qk_norm: bool, tied: bool) -> None:
    config = ModelConfig(**{**vars(CONFIG), "qk_norm": qk_norm, "tied": tied, "rope_theta": 5e5})
    model = model_with_lively_norms(config)
    write(model, tmp_path)
    again = hf.load_model(tmp_path)
    assert again.config == config
    assert (again.head.weight is again.embedding.weight) == tied
    for name, value in model.state_dict().items():
        assert again.state_dict()[name].equal(value), name


def test_transformers_own_folder_is_read(tmp_path: Path) -> None:
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**to_config(CONFIG, bos=1, eos=2, pad=None)))
    theirs.save_pretrained(tmp_path)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(hf.load_model(tmp_path)(tokens), theirs(tokens).logits, rtol=0, atol=2e-5)


def test_config_has_rope_theta_in_both_places(tmp_path: Path) -> None:
    config = ModelConfig(**{**vars(CONFIG), "rope_theta": 123_456.0})
    write(Transformer(config), tmp_path)
    values = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert values["rope_theta"] == values["rope_parameters"]["rope_theta"] == 123_456.0
    assert values["rope_scaling"] is None
    ids = json.loads((tmp_path / "generation_config.json").read_text(encoding="utf-8"))
    assert ids == {"bos_token_id": 1, "eos_token_id": 2}


def test_large_weights_go_into_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_with_lively_norms(CONFIG)
    monkeypatch.setattr(hf, "SHARD_BYTES", 10_000)
    write(model, tmp_path)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    assert all(file.stat().st_size < 12_000 for file in files)  # the header comes on top
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert set(index["weight_map"].values()) == {file.name for file in files}
    assert index["metadata"]["total_size"] == 4 * sum(parameter.numel() for parameter in model.parameters())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), theirs(tokens).logits, rtol=0, atol=2e-5)
        assert hf.load_model(tmp_path)(tokens).equal(model(tokens))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["PhiForCausalLM"]}, "folder is a PhiForCausalLM; .* LlamaForCausalLM or Qwen3ForCausalLM"),
        ({"architectures": None}, "folder is a none named"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "uses rope scaling"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "uses rope scaling"),
        ({"attention_bias": True, "use_sliding_window": True}, "uses attention biases, sliding windows"),
        ({"mlp_bias": True}, "uses MLP biases"),
    ],
)
def test_a_foreign_config_is_refused(changes: dict[str, object], message: str) -> None:
    values = to_config(CONFIG, bos=1, eos=2, pad=None) | changes
    with pytest.raises(UserError, match=message):
        from_config(values, Path("folder"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 5, "num_key_value_heads": 2}, "5 query heads cannot share 2 key/value heads"),
        ({"num_attention_heads": 0, "head_dim": None}, "describes no model"),
        ({"hidden_size": "wide", "head_dim": None}, "describes no model"),
        ({"vocab_size": 0}, "vocab of at least 1"),
    ],
)
def test_a_config_of_no_possible_model_is_explained(changes: dict[str, object], message: str) -> None:
    values = to_config(CONFIG, bos=1, eos=2, pad=None) | changes
    for read in (from_config, nearest_shape):
        with pytest.raises(UserError, match=message):
            read(values, Path("folder"))


def test_a_config_without_a_field_names_it() -> None:
    values = to_config(CONFIG, bos=1, eos=2, pad=None)
    del values["hidden_size"]
    with pytest.raises(UserError, match=r"config\.json has no 'hidden_size'"):
        from_config(values, Path("folder"))


def test_older_configs_leave_things_out() -> None:
    values = to_config(CONFIG, bos=1, eos=2, pad=None)
    for name in ("rope_parameters", "num_key_value_heads", "head_dim", "tie_word_embeddings"):
        del values[name]
    config = from_config(values, Path("folder"))
    assert (config.kv_heads, config.head_width, config.tied) == (4, 8, False)


def test_a_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no model folder: it has no config\.json"):
        hf.load_model(tmp_path)
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        read_config(tmp_path)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    write(Transformer(CONFIG), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no weights: model\.safetensors is missing"):
        hf.load_model(tmp_path)


@pytest.mark.parametrize("kept", [0, 4, 100, 20_000])
def test_a_cut_weights_file(tmp_path: Path, kept: int) -> None:
    write(Transformer(CONFIG), tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        hf.load_model(tmp_path)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    write(Transformer(CONFIG), tmp_path)
    files = hf.WeightFiles(tmp_path)
    weights = {name: files.read(name) for name in files.names}
    del weights["model.layers.1.mlp.up_proj.weight"]
    hf.save_weights(weights, tmp_path)
    with pytest.raises(UserError, match=r"lack the tensor 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        hf.load_model(tmp_path)


def test_weights_of_another_shape(tmp_path: Path) -> None:
    write(Transformer(CONFIG), tmp_path)
    other = ModelConfig(**{**vars(CONFIG), "vocab": 64})
    hf.save_weights(hf.to_hugging_face(Transformer(other).state_dict(), other), tmp_path)
    with pytest.raises(UserError, match=r"do not have the shapes of its config\.json"):
        hf.load_model(tmp_path)
