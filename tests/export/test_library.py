"""Compiling: the cache, the two kinds of ARM, OpenCL, and compilers that are not there."""

import subprocess
from pathlib import Path

import pytest

from common.errors import UserError
from export import library
from export.check import check
from export.settings import MlcSettings
from tests.export.conftest import Folder

CONTEXT = 64


@pytest.fixture
def values(folder: Folder) -> dict:
    return check(folder("llama", num_hidden_layers=1), MlcSettings(context=CONTEXT)).values


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PALMTOP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "libraries"


def test_a_library_is_compiled_once(values: dict, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (first,) = library.build(values, "host", "f16", tmp_path, context=CONTEXT)
    assert first.name.startswith("host-")
    assert [file.name for file in cache.iterdir()] == [first.name]  # and nothing half-made beside it
    monkeypatch.setattr(library, "compile_library", lambda *_: pytest.fail("it is in the cache"))
    (tmp_path / "again").mkdir()
    (again,) = library.build(values, "host", "f16", tmp_path / "again", context=CONTEXT)
    assert again.name == first.name
    assert again.read_bytes() == first.read_bytes()


def test_what_decides_a_library_is_in_its_name(values: dict) -> None:
    (host,) = library.targets("host")
    shapes = [
        library.Shape.of(values | changes, context, 32)
        for changes in ({}, {"rope_theta": 5e5, "rope_parameters": None})
        for context in (64, 96)
    ]
    keys = {
        library._key(shape, target, dtype)
        for shape in shapes
        for target in (host, *library.targets("android-cpu"))
        for dtype in ("f16", "f32")
    }
    assert len(keys) == 4 * 3 * 2


@pytest.mark.skipif(library.shutil.which("aarch64-linux-gnu-gcc") is None, reason="needs aarch64-linux-gnu-gcc")
def test_android(values: dict, tmp_path: Path) -> None:
    plain, fhm = library.build(values, "android-cpu", "f16", tmp_path, context=CONTEXT)
    assert plain.name.endswith("-armv8.so")
    assert fhm.name.endswith("-fhm.so")
    for file, has in ((plain, False), (fhm, True)):
        text = subprocess.run(["aarch64-linux-gnu-objdump", "-d", file], capture_output=True, text=True, check=True)
        assert ("\tfmlal" in text.stdout) == has
    (gpu,) = library.build(values, "android-opencl", "f16", tmp_path, context=CONTEXT)
    kernels = gpu.read_bytes()
    assert b"__kernel void" in kernels
    assert b"__kernel void permute_dims" not in kernels  # weights are multiplied as they lie
    header = subprocess.run(["aarch64-linux-gnu-readelf", "-h", gpu], capture_output=True, text=True, check=True)
    assert "REL (Relocatable file)" in header.stdout
    assert "AArch64" in header.stdout


def test_a_compiler_that_is_not_there(
    values: dict, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="64-bit ARM .* is needed to link the library"):
        library.build(values, "android-cpu", "f16", tmp_path, context=CONTEXT)
    assert list(cache.iterdir()) == []
    assert [file.name for file in tmp_path.glob("*.so")] == []


def test_a_target_that_there_is_not(values: dict, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no target ios; there are host, android-cpu, android-opencl"):
        library.build(values, "ios", "f16", tmp_path, context=CONTEXT)
