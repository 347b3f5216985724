"""The weights: MLC-LLM's own bytes, its shards, and what is refused."""

import filecmp
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

from common.errors import UserError
from export.shards import SHARD, read_cache, write_weights
from export.tensors import Tensors
from tests.conftest import ROOT
from tests.export.conftest import KINDS, Folder

REFERENCE = ("llama-tied-theta500k", "llama-untied", "qwen2", "qwen3", "phi")

MANY = """
import json, sys, numpy
from pathlib import Path
from export.mapping import parameters
folder, header, at = Path(sys.argv[1]), {}, 0
values = json.loads((folder / "config.json").read_text())
sources = sorted((source.name, source.shape) for one in parameters(values) for source in one.sources)
for name, shape in sources:
    size = 4 * int(numpy.prod(shape))
    header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
    at += size
text = json.dumps(header).encode()
with open(folder / "model.safetensors", "wb") as file:
    file.write(len(text).to_bytes(8, "little") + text)
    file.truncate(8 + len(text) + at)
"""
"""Writes a model of zeros for a config.json, as a file that takes no room."""

WRITE = """
import sys
from pathlib import Path
from export.shards import write_weights
write_weights(Path(sys.argv[1]), Path(sys.argv[2]))
(peak,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
print(1024 * int(peak.split()[1]))
"""
"""Writes the weights and prints the most bytes that were resident; getrusage would count the parent's too."""


def child(script: str, *words: Path) -> str:
    """Run a script in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script, *map(str, words)]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout


def values_of(mlc: Path) -> dict[str, np.ndarray]:
    """All parameters that an MLC folder holds, by name."""
    found = {}
    for shard in read_cache(mlc)["records"]:
        data = (mlc / shard["dataPath"]).read_bytes()
        assert len(data) == shard["nbytes"]
        for record in shard["records"]:
            part = data[record["byteOffset"] : record["byteOffset"] + record["nbytes"]]
            found[record["name"]] = np.frombuffer(part, "<f2").reshape(record["shape"])
    return found


@pytest.mark.parametrize("name", REFERENCE)
def test_the_bytes_are_those_of_mlc(name: str, shared: Path, tmp_path: Path) -> None:
    reference = shared / "reference" / "mlc" / name
    written = write_weights(reference / "hf", tmp_path)
    for file in ("params_shard_0.bin", "tensor-cache.json"):
        assert filecmp.cmp(tmp_path / file, reference / "mlc" / file, shallow=False), file
    assert filecmp.cmp(tmp_path / "ndarray-cache.json", reference / "mlc" / "tensor-cache.json", shallow=False)
    assert written.bytes == 2 * written.parameters == read_cache(tmp_path)["metadata"]["ParamBytes"]


def test_many_shards_are_those_of_mlc_and_take_little_memory(shared: Path, tmp_path: Path) -> None:
    reference = shared / "reference" / "mlc" / "llama-many-shards"
    folder, out = tmp_path / "hf", tmp_path / "mlc"
    folder.mkdir()
    out.mkdir()
    (folder / "config.json").write_bytes((reference / "hf" / "config.json").read_bytes())
    child(MANY, folder)
    assert int(child(WRITE, folder, out)) < 300e6
    ours, theirs = read_cache(out), read_cache(reference / "mlc")
    assert ours["metadata"] == theirs["metadata"]
    for cache in (ours, theirs):
        for shard in cache["records"]:
            del shard["md5sum"]  # the weights of the reference are random
    assert ours["records"] == theirs["records"]
    assert len(ours["records"]) == 5


@pytest.mark.parametrize("kind", KINDS)
def test_every_value_arrives_rounded_to_fp16(kind: str, folder: Folder, tmp_path: Path) -> None:
    model, out = folder(kind), tmp_path / "out"
    out.mkdir()
    write_weights(model, out)
    tensors, found = Tensors(model), values_of(out)
    whole = {name: np.concatenate([*tensors.pieces(name)]).reshape(tensors.shape(name)) for name in tensors.names}
    name = "transformer.h.1.mixer.Wqkv" if kind == "phi" else "model.layers.1.self_attn.c_attn"
    fused = {f"{name}.weight": "weight"} | ({f"{name}.bias": "bias"} if kind in ("phi", "qwen2") else {})
    if kind == "llama":
        fused = {"model.layers.1.self_attn.qkv_proj.weight": "weight"}
    for ours, part in fused.items():
        rows = [whole[f"model.layers.1.self_attn.{one}_proj.{part}"] for one in "qkv"]
        assert np.array_equal(found[ours], np.concatenate(rows).astype(np.float16))
    stored = whole if kind != "qwen2" else {name: one for name, one in whole.items() if name != "lm_head.weight"}
    assert sum(one.size for one in found.values()) == sum(one.size for one in stored.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_other_dtypes(dtype: torch.dtype, folder: Folder, tmp_path: Path) -> None:
    model = folder("qwen3")
    tensors = {name: torch.randn(Tensors(model).shape(name)).to(dtype) for name in Tensors(model).names}
    save_torch(tensors, model / "model.safetensors")
    out = tmp_path / "out"
    out.mkdir()
    write_weights(model, out)
    norm = values_of(out)["model.norm.weight"]
    assert np.array_equal(norm, tensors["model.norm.weight"].to(torch.float16).numpy())


def test_several_files_go_in_the_order_of_their_index(folder: Folder, tmp_path: Path) -> None:
    model = folder("llama")
    tensors = Tensors(model)
    whole = {name: np.concatenate([*tensors.pieces(name)]).reshape(tensors.shape(name)) for name in tensors.names}
    second = [name for name in whole if "layers.1" in name]
    parts = {"model-1.safetensors": [name for name in whole if name not in second], "model-2.safetensors": second}
    for file, names in parts.items():
        save_file({name: whole[name] for name in names}, model / file)
    (model / "model.safetensors").unlink()
    index = {name: file for file in reversed(parts) for name in parts[file]}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    out = tmp_path / "out"
    out.mkdir()
    write_weights(model, out)
    assert next(iter(values_of(out))).startswith("model.layers.1")
    (model / "model-2.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no model-2\.safetensors, which its model\.safetensors\.index"):
        write_weights(model, out)


def test_a_shard_is_closed_before_it_is_full(tmp_path: Path, folder: Folder) -> None:
    # Three blocks of 14 MB in parts of 9.4 and 4.7 MB: none is half a shard, and the third block is over the edge.
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 2**18 + 2**15, "num_hidden_layers": 3}
    model = folder("llama", **sizes)
    out = tmp_path / "out"
    out.mkdir()
    write_weights(model, out)
    shards = read_cache(out)["records"]
    assert len(shards) == 2
    assert all(shard["nbytes"] < SHARD for shard in shards)
    assert [shard["dataPath"] for shard in shards] == [f"params_shard_{number}.bin" for number in range(len(shards))]
    assert {path.name for path in out.glob("*.part")} == set()


def test_what_does_not_fit_fp16_is_refused(folder: Folder, tmp_path: Path) -> None:
    model = folder("qwen3")
    tensors = Tensors(model)
    whole = {name: np.concatenate([*tensors.pieces(name)]).reshape(tensors.shape(name)) for name in tensors.names}
    for value, shown in ((7e4, "holds 70000, beyond the 65,504 of fp16"), (float("nan"), "holds nan")):
        whole["model.norm.weight"][3] = value
        save_file(whole, model / "model.safetensors")
        with pytest.raises(UserError, match=shown):
            write_weights(model, tmp_path)


def test_damaged_weights_are_named(folder: Folder, tmp_path: Path) -> None:
    model = folder("qwen3")
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        write_weights(model, tmp_path)
    with pytest.raises(UserError, match=r"tensor-cache\.json cannot be read"):
        read_cache(tmp_path)
