"""Model folders cut on every axis and reloaded by transformers, held to the uncut model with units silenced."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from common.errors import UserError
from common.settings import Count
from data.settings import Mix
from data.tokenizer import Tokenizer
from models.hf_config import head_width
from pruning import shards
from pruning.blocks import Blocks, parts_of
from pruning.calibration import read_test
from pruning.perplexity import measure
from pruning.prune import Report, prune
from pruning.settings import CutSettings
from pruning.shapes import Shape, head_counts
from tests.models.test_foreign import FOREIGN, write_folder

CPU = torch.device("cpu")
KINDS = ("llama", "qwen2", "qwen3", "phi")

Folder = Callable[..., Path]


@pytest.fixture
def folder(tmp_path: Path, tokenizer: Tokenizer) -> Folder:
    """Writes a random model with a tokenizer."""

    def write(kind: str, **changes: object) -> Path:
        path = tmp_path / kind
        write_folder(kind, path, **({"vocab_size": tokenizer.vocab_size, "num_hidden_layers": 3} | changes))
        tokenizer.copy_to(path)
        return path

    return write


def settings(corpus: Path, **changes: object) -> CutSettings:
    given = {"calibration": Mix.parse(str(corpus)), "tokens": Count(2048), "seq_len": Count(64)}
    return CutSettings(**(given | changes))


def logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(input_ids=tokens).logits


def values_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def axes(values: dict) -> dict[str, Shape]:
    """A smaller shape on every legal axis, and on all of them."""
    now = Shape.of(values)
    changes = {"ffn": {"ffn": 24}, "layers": {"layers": 2}, "vocabulary": {"vocab": 400}}
    pairs = head_counts(values)[1:]
    if pairs:
        changes["heads"] = {"heads": pairs[0][0], "kv_heads": pairs[0][1]}
    changes["all"] = {axis: size for change in changes.values() for axis, size in change.items()}
    return {name: Shape(**(vars(now) | change)) for name, change in changes.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_every_axis_gives_a_plain_folder(kind: str, folder: Folder, corpus: Path, tmp_path: Path) -> None:
    whole, out = folder(kind), tmp_path / "out"
    tokens = torch.arange(3, 40)[None]
    for shape in axes(values_of(whole)).values():
        prune(whole, out, shape, settings(corpus), CPU)
        assert Shape.of(values_of(out)) == shape
        model, found = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
        assert not found["missing_keys"]
        assert not found["unexpected_keys"]
        assert not found["mismatched_keys"]
        assert logits(out, tokens).isfinite().all()
        assert Tokenizer(out).vocab_size <= shape.vocab
        text = read_test(str(corpus), Tokenizer(whole), 500)
        (streamed,) = measure(out, [text], CPU, length=64)
        assert streamed.loss == pytest.approx(_loss_of(model, text.batch(Tokenizer(out), 64)), rel=1e-5)


def _loss_of(model: torch.nn.Module, batch) -> float:
    from models.foreign import visible

    tokens, targets, positions = (torch.from_numpy(part) for part in (batch.inputs, batch.targets, batch.positions))
    with torch.no_grad():
        found = model(input_ids=tokens, position_ids=positions, attention_mask=visible(positions, torch.float32)).logits
    return torch.nn.functional.cross_entropy(found.flatten(0, 1), targets.flatten()).item()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["fisher", "energy", "l1", "taylor", "random"])
def test_a_cut_is_the_whole_model_with_units_silenced(
    kind: str, method: str, folder: Folder, corpus: Path, tmp_path: Path
) -> None:
    """Which units stayed is read off the rows that stayed; those that went no longer reach what reads them."""
    whole, out = folder(kind), tmp_path / "out"
    values = values_of(whole)
    now = Shape.of(values)
    heads, kv_heads = (head_counts(values) + head_counts(values))[1]
    prune(whole, out, Shape(2, 24, heads, kv_heads, now.vocab), settings(corpus, method=method, repair=False), CPU)
    stayed = json.loads((out / "pruning.json").read_text())["layers"]
    model = AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32).eval()
    small = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    parts = parts_of(values)
    with torch.no_grad():
        for layer, cut in zip(stayed, small.model.layers, strict=True):
            block = model.model.layers[layer]
            for rows, reader in ((parts.ffn_in[0], parts.ffn_out), (parts.queries, parts.attention_out)):
                before, after = block.get_submodule(rows).weight, cut.get_submodule(rows).weight
                silent = [unit for unit, row in enumerate(before) if not (row == after).all(1).any()]
                assert len(silent) == len(before) - len(after)
                block.get_submodule(reader).weight[:, silent] = 0
            assert head_width(values) * heads == cut.get_submodule(parts.queries).out_features
        model.model.layers = torch.nn.ModuleList(model.model.layers[layer] for layer in stayed)
        tokens = torch.arange(3, 40)[None]
        expected = model(input_ids=tokens, use_cache=False).logits
    torch.testing.assert_close(logits(out, tokens), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "phi"])
def test_the_last_norm_is_scaled_and_that_recorded(kind: str, folder: Folder, corpus: Path, tmp_path: Path) -> None:
    whole, out = folder(kind), tmp_path / "out"
    shape = Shape(**(vars(Shape.of(values_of(whole))) | {"ffn": 8}))
    before = Blocks(whole, CPU).last_norm()
    for repair in (True, False):
        report = prune(whole, out, shape, settings(corpus, repair=repair), CPU)
        assert (report.sharpness != 1) == repair
        assert json.loads((out / "pruning.json").read_text())["sharpness"] == report.sharpness
        after = Blocks(out, CPU).last_norm()
        assert len(after) == (2 if kind == "phi" else 1)
        for name, tensor in after.items():
            torch.testing.assert_close(tensor, before[name] * report.sharpness)


@pytest.mark.parametrize("kind", KINDS)
def test_repair_brings_the_hidden_states_nearer(kind: str, folder: Folder, corpus: Path, tmp_path: Path) -> None:
    whole, tokens = folder(kind), torch.arange(3, 60)[None]
    shape = Shape(**(vars(Shape.of(values_of(whole))) | {"ffn": 32}))
    distances = []
    for repair in (False, True):
        prune(whole, tmp_path / "out", shape, settings(corpus, repair=repair, tokens=Count(8192)), CPU)
        distances.append(float((logits(tmp_path / "out", tokens) - logits(whole, tokens)).square().mean()))
    assert distances[1] < 0.8 * distances[0]


def test_units_that_others_stand_for_cost_nothing(folder: Folder, corpus: Path, tmp_path: Path) -> None:
    """Every unit has a twin: with repair the ones that stay do the work of both."""
    whole = folder("llama")
    model = AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32)
    with torch.no_grad():
        for layer in model.model.layers:
            for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
                linear.weight[24:] = linear.weight[:24]
            layer.mlp.down_proj.weight[:, 24:] *= 0.1
    model.save_pretrained(whole)
    shape = Shape(**(vars(Shape.of(values_of(whole))) | {"ffn": 24}))
    tokens, errors = torch.arange(3, 60)[None], {}
    for repair in (False, True):
        prune(whole, tmp_path / "out", shape, settings(corpus, repair=repair, tokens=Count(16_384)), CPU)
        errors[repair] = float((logits(tmp_path / "out", tokens) - logits(whole, tokens)).square().mean())
    assert errors[True] < 0.2 * errors[False]


def test_the_records(folder: Folder, corpus: Path, tmp_path: Path) -> None:
    whole, out = folder("llama"), tmp_path / "out"
    shape = Shape(**(vars(Shape.of(values_of(whole))) | {"layers": 2, "vocab": 400}))
    report = prune(whole, out, shape, settings(corpus), CPU)
    assert isinstance(report, Report)
    assert len(report.layers) == 2
    assert len(report.influence) == 3
    record = json.loads((out / "palmtop.json").read_text())
    source = {"source": str(corpus), "weight": 1.0}
    assert record["data"] == [{"stage": "unknown", "from": str(whole)}, {"stage": "prune", "sources": [source]}]
    assert record["parent"] == str(whole)
    assert record["outside_track_1"] is True
    told = json.loads((out / "pruning.json").read_text())
    assert told["after"] == vars(shape)
    assert told["calibration"]["tokens"] == 2048
    assert json.loads((out / "kept_tokens.json").read_text()) == sorted(
        json.loads((out / "kept_tokens.json").read_text())
    )
    again = tmp_path / "again"
    prune(out, again, shape, settings(corpus), CPU)  # nothing to cut: no text is read, what the parent saw stays
    assert json.loads((again / "palmtop.json").read_text())["data"] == record["data"]
    assert json.loads((again / "palmtop.json").read_text())["outside_track_1"] is True
    assert torch.equal(logits(out, torch.arange(9)[None]), logits(again, torch.arange(9)[None]))


def test_many_shards_are_one_model(
    folder: Folder, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, tokens = folder("qwen3"), torch.arange(3, 40)[None]
    shape = Shape(**(vars(Shape.of(values_of(whole))) | {"ffn": 24}))
    prune(whole, tmp_path / "one", shape, settings(corpus), CPU)
    monkeypatch.setattr(shards, "SHARD_BYTES", 20_000)
    prune(whole, tmp_path / "many", shape, settings(corpus), CPU)
    assert len(list((tmp_path / "many").glob("model-*-of-*.safetensors"))) > 2
    assert torch.equal(logits(tmp_path / "one", tokens), logits(tmp_path / "many", tokens))


def test_bad_input_leaves_nothing(folder: Folder, corpus: Path, tmp_path: Path) -> None:
    whole, out = folder("llama"), tmp_path / "out"
    now = vars(Shape.of(values_of(whole)))
    cut = Shape(**(now | {"ffn": 24}))
    with pytest.raises(UserError, match="tokens of training text, too few"):
        prune(whole, out, cut, settings(corpus, tokens=Count(10**9)), CPU)
    with pytest.raises(UserError, match="is the model that is cut"):
        prune(whole, whole, cut, settings(corpus), CPU)
    with pytest.raises(UserError, match="ffn 25 is no multiple of 8"):
        prune(whole, out, Shape(**(now | {"ffn": 25})), settings(corpus), CPU)
    model = AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[:] = 7e4
    model.save_pretrained(whole)
    with pytest.raises(UserError, match=r"mlp.up_proj.weight holds 70000, beyond the 65,504 of fp16"):
        prune(whole, out, cut, settings(corpus, method="l1", repair=False), CPU)
    torch.save(model.state_dict(), whole / "pytorch_model.bin")
    (whole / "model.safetensors").unlink()
    with pytest.raises(UserError, match="has its weights only as pickle"):
        prune(whole, out, cut, settings(corpus), CPU)
    assert not out.exists()
    assert not list(tmp_path.glob(".*"))
    shutil.rmtree(whole)
    with pytest.raises(UserError, match="is no model folder"):
        prune(whole, out, cut, settings(corpus), CPU)


def test_rope_scaling_is_kept(folder: Folder, corpus: Path, tmp_path: Path) -> None:
    whole = folder("llama")
    prune(whole, tmp_path / "out", Shape(**(vars(Shape.of(values_of(whole))) | {"ffn": 24})), settings(corpus), CPU)
    values = values_of(tmp_path / "out")
    assert values["rope_scaling"]["factor"] == FOREIGN["llama"]["rope_parameters"]["factor"]
    assert values["rope_theta"] == FOREIGN["llama"]["rope_parameters"]["rope_theta"]
