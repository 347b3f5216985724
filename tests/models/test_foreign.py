"""Models that ours cannot be, held to transformers."""

import json
from pathlib import Path

import pytest
import torch
import transformers

from common.errors import UserError
from models.foreign import Architecture, Foreign
from models.hf import WeightFiles
from models.hf_config import with_rope_at_top
from models.transformer import IGNORE, Transformer
from train.engine import fill, materialise

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 61,
    "max_position_embeddings": 64,
}
SCALED = {
    "rope_theta": 1e4,
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
FOREIGN = {
    "qwen2": {"tie_word_embeddings": True},
    "phi": {"num_key_value_heads": 4},
    "llama": {"rope_parameters": SCALED, "attention_bias": True},
}


def write_folder(kind: str, folder: Path, **changes: object) -> transformers.PreTrainedModel:
    """A folder of random weights, biases too, as transformers writes it."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **(SHAPE | FOREIGN.get(kind, {}) | changes))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0 if parameter.ndim > 1 else 0.5, 0.2)
    model.save_pretrained(folder)
    return model


def load(folder: Path) -> Transformer | Foreign:
    """As the engine does: built without memory, then filled."""
    architecture = Architecture.of(folder)
    with torch.device("meta"):
        model = architecture.build()
    materialise(model, torch.device("cpu"))
    fill(model, architecture.read(folder))
    return model.eval()


TOKENS = torch.randint(61, (2, 10), generator=torch.Generator().manual_seed(1))
POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 0, 1], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]])


@pytest.mark.parametrize("kind", FOREIGN)
def test_logits_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    theirs = write_folder(kind, tmp_path)
    ours = load(tmp_path)
    assert isinstance(ours, Foreign)
    with torch.no_grad():
        torch.testing.assert_close(ours(TOKENS), theirs(TOKENS).logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_what_ours_can_be_it_is(kind: str, tmp_path: Path) -> None:
    theirs = write_folder(kind, tmp_path, head_dim=8, rope_parameters={"rope_theta": 5e5, "rope_type": "default"},
                          attention_bias=False)  # fmt: skip
    ours = load(tmp_path)
    assert isinstance(ours, Transformer)
    with torch.no_grad():
        torch.testing.assert_close(ours(TOKENS), theirs(TOKENS).logits, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_packed_row_is_its_documents_one_by_one(kind: str, tmp_path: Path) -> None:
    """The loss of transformers on each document alone, from its own labels."""
    theirs, ours = write_folder(kind, tmp_path), load(tmp_path)
    documents = [TOKENS[0, :3], TOKENS[0, 3:8], TOKENS[0, 8:], TOKENS[1]]
    targets = torch.full_like(TOKENS, IGNORE)
    targets[:, :-1] = TOKENS[:, 1:]
    targets[0, [2, 7]] = IGNORE
    expected = sum(theirs(one[None], labels=one[None]).loss * (len(one) - 1) for one in documents)
    loss, nll = ours(TOKENS, POSITIONS, targets)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert nll.item() == pytest.approx(expected.item(), rel=1e-6)
    expected.backward()
    loss.backward()
    gradients = {name.removeprefix("hf."): parameter.grad for name, parameter in ours.named_parameters()}
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", FOREIGN)
def test_recomputation_changes_nothing(kind: str, tmp_path: Path) -> None:
    write_folder(kind, tmp_path)
    gradients = []
    for mode in ("none", "full"):
        model = load(tmp_path).train()
        model.checkpointing = mode
        model(TOKENS, POSITIONS, TOKENS)[0].backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", FOREIGN)
def test_weights_go_back_under_their_names(kind: str, tmp_path: Path) -> None:
    write_folder(kind, tmp_path)
    files, architecture = WeightFiles(tmp_path), Architecture.of(tmp_path)
    named = architecture.hugging_face(dict(load(tmp_path).named_parameters()))
    assert named.keys() == set(files.names)
    assert all(tensor.equal(files.read(name)) for name, tensor in named.items())


def test_without_targets_the_loss_is_nothing_and_reaches_every_weight(tmp_path: Path) -> None:
    """A rank whose rows hold no answer still takes part in what the ranks exchange."""
    write_folder("qwen2", tmp_path)
    model = load(tmp_path)
    loss, nll = model(TOKENS, POSITIONS, torch.full_like(TOKENS, IGNORE))
    loss.backward()
    assert loss.item() == nll.item() == 0
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())


def test_there_is_no_dropout(tmp_path: Path) -> None:
    """Which would make a run depend on where it stopped and on the number of ranks; Phi-2's configuration has some."""
    write_folder("phi", tmp_path, resid_pdrop=0.5, embd_pdrop=0.5, attention_dropout=0.5)
    model = load(tmp_path).train()
    assert model(TOKENS).equal(model(TOKENS))
    assert Architecture.of(tmp_path).values["resid_pdrop"] == 0.5


def test_the_dtype_has_two_names(tmp_path: Path) -> None:
    write_folder("qwen2", tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    for changes, dtype in (({"dtype": "bfloat16"}, torch.bfloat16), ({"torch_dtype": "float16"}, torch.float16),
                           ({}, torch.float32)):  # fmt: skip
        (tmp_path / "config.json").write_text(json.dumps({**values, "dtype": None} | changes))
        assert Architecture.of(tmp_path).dtype == dtype


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    transformers.GPT2Config(architectures=["GPT2LMHeadModel"]).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"is a GPT2LMHeadModel; this command takes LlamaForCausalLM, Qwen2"):
        Architecture.of(tmp_path)
    with pytest.raises(UserError, match="is no model folder"):
        Architecture.of(tmp_path / "nowhere")
    for content, message in (
        ("[]", "holds no JSON object"),
        ('{"architectures": ["LlamaForCausalLM"]}', "config.json has no 'num_hidden_layers'|has no 'num_att"),
        ('{"architectures": ["Qwen3ForCausalLM"], "quantization_config": {"quant_method": "fp8"}}', "are quantised"),
    ):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(UserError, match=message):
            Architecture.of(tmp_path)


def test_rotary_settings_stand_at_the_top_too(tmp_path: Path) -> None:
    """MLC-LLM reads them there and falls back to others without a word."""
    write_folder("phi", tmp_path / "phi")
    write_folder("llama", tmp_path / "llama")
    phi = with_rope_at_top(Architecture.of(tmp_path / "phi").values)
    assert (phi["rope_theta"], phi["partial_rotary_factor"], phi["rope_scaling"]) == (1e4, 0.5, None)
    llama = with_rope_at_top(Architecture.of(tmp_path / "llama").values)
    assert llama["rope_scaling"] == {name: value for name, value in SCALED.items() if name != "rope_theta"}
    assert llama["rope_theta"] == 1e4
