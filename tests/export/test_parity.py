"""Libraries of the four architectures against transformers, and what parity says of those that are wrong."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from common.errors import UserError
from export import library, parity
from export.check import check
from export.engine import Engine
from export.mapping import parameters
from export.settings import MlcSettings
from export.shards import write_weights
from tests.export.conftest import Folder

CONTEXT = 64
SCALED = {
    "rope_theta": 5e5,
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
MODELS = {
    "llama": ("llama", {"tie_word_embeddings": True, "head_dim": 12}),
    "llama-scaled": ("llama", {"tie_word_embeddings": False, "rope_parameters": SCALED}),
    "qwen2": ("qwen2", {"tie_word_embeddings": False}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True, "head_dim": 16}),
    "phi": ("phi", {"partial_rotary_factor": 0.75}),
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of these tests take several chunks."""
    monkeypatch.setattr(library, "CHUNK", 24)


def exported(model: Path, out: Path, dtype: str) -> Path:
    """What parity needs of an export."""
    for name in ("mlc", "lib"):
        (out / name).mkdir(parents=True)
    write_weights(model, out / "mlc", lambda done, total: None)
    values = check(model, MlcSettings(context=CONTEXT)).values
    library.build(values, library.HOST, dtype, out / "lib", context=CONTEXT)
    return out


@pytest.mark.parametrize("name", MODELS)
def test_a_library_computes_what_transformers_does(name: str, folder: Folder, tmp_path: Path) -> None:
    kind, changes = MODELS[name]
    model = folder(kind, **changes)
    dtype = "f32" if name in ("llama", "qwen2") else "f16"
    found = parity.check(model, exported(model, tmp_path / "export", dtype))
    assert found["tokens"] == parity.TEXTS * CONTEXT
    assert found["divergence"] < 1e-9
    assert found["difference"] < parity.LARGEST_DIFFERENCE  # activations are fp32 in either
    assert found["agreed"] == found["clear"]


def test_a_library_takes_the_weights_of_mlc(folder: Folder, tmp_path: Path) -> None:
    model = folder("qwen3", head_dim=16)
    (file,) = (exported(model, tmp_path / "export", "f16") / "lib").iterdir()
    engine = Engine(file, tmp_path / "export" / "mlc")
    values = check(model, MlcSettings(context=CONTEXT)).values
    assert {one["name"]: tuple(one["shape"]) for one in engine.metadata["params"]} == {
        one.name: tuple(one.shape) for one in parameters(values)
    }


def test_an_engine_generates_what_transformers_does(folder: Folder, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = folder("llama")
    (file,) = (exported(model, tmp_path / "export", "f32") / "lib").iterdir()
    engine = Engine(file, tmp_path / "export" / "mlc")
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ids = list(range(3, 40))
    expected = loaded.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False, eos_token_id=None)
    assert engine.generate(ids, 20) == expected[0, len(ids) :].tolist()
    assert engine.generate(ids, 20) == expected[0, len(ids) :].tolist()  # and again from an empty cache
    with pytest.raises(UserError, match="do not fit into the library's context of 64"):
        engine.prefill(list(range(10)))
    with pytest.raises(UserError, match="do not belong together: model.embed_tokens.weight"):
        write_weights(folder("llama", "wider", hidden_size=96), tmp_path / "export" / "mlc", lambda done, total: None)
        Engine(file, tmp_path / "export" / "mlc")


def test_a_library_that_computes_something_else_fails(folder: Folder, tmp_path: Path) -> None:
    out = exported(folder("llama"), tmp_path / "export", "f16")
    other = folder("llama", "other", rope_parameters={"rope_theta": 50.0, "rope_type": "default"})
    with pytest.raises(UserError, match=r"does not compute what transformers does: the mean KL divergence is"):
        parity.check(other, out)


def test_the_bars() -> None:
    fine = parity.Parity(100, 1e-5, 1e-3, 30.0, 80, 80, "f32")
    assert fine.problem is None
    assert fine.summary == "KL 1.00e-05, logits within 1.0e-03 of up to 30.0, 80 of 80 clear choices alike (100 tokens)"
    assert replace(fine, dtype="f16", difference=0.5).problem is None
    assert replace(fine, divergence=2e-3).problem == "the mean KL divergence is 0.002, over 0.001"
    assert replace(fine, divergence=float("nan")).problem is not None
    assert replace(fine, agreed=79).problem == "1 of 80 clear choices differ"
    assert replace(fine, difference=5e-3).problem == "logits differ by up to 0.005, over 0.003"


def test_figures_of_known_logits() -> None:
    expected = np.array([[0.0, 1.0, 0.0], [0.0, 0.1, 0.0]], dtype=np.float32)
    found = parity.compare([expected], [expected + 3], "f16")  # the same probabilities
    assert (found.tokens, found.clear, found.agreed) == (2, 1, 1)
    assert found.divergence == pytest.approx(0, abs=1e-7)
    assert found.difference == 3
    swapped = parity.compare([expected], [expected[:, ::-1] * [-1, -1, -1]], "f16")
    assert swapped.agreed == 0
    assert swapped.divergence > 0.1


def test_a_model_too_large_for_this_machine() -> None:
    parity.require_memory(10**6, None)
    parity.require_memory(10**6, 3 * 10**6)
    with pytest.raises(UserError, match="fp32 needs 3 GB of memory, and 2 GB are free; .* --parity skip"):
        parity.require_memory(10**9, 2 * 10**9)
