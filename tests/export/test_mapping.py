"""MLC-LLM's names and shapes of the four architectures."""

import json
from pathlib import Path

import pytest

from export.mapping import parameters
from export.shards import read_cache
from export.tensors import Tensors
from tests.export.conftest import KINDS, Folder
from tests.export.test_shards import REFERENCE


@pytest.mark.parametrize("name", [*REFERENCE, "llama-many-shards"])
def test_names_and_shapes_are_those_of_mlc(name: str, shared: Path) -> None:
    reference = shared / "reference" / "mlc" / name
    records = [record for shard in read_cache(reference / "mlc")["records"] for record in shard["records"]]
    found = parameters(json.loads((reference / "hf" / "config.json").read_text()))
    assert {one.name: list(one.shape) for one in found} == {one["name"]: one["shape"] for one in records}


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_of_the_folder_has_its_place(kind: str, folder: Folder) -> None:
    model = folder(kind)
    tensors = Tensors(model)
    found = parameters(json.loads((model / "config.json").read_text()))
    sources = {source.name: source.shape for parameter in found for source in parameter.sources}
    assert sources == {name: tensors.shape(name) for name in tensors.names}
