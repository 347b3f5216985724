"""OpenCL for MLC-LLM's app: that it compiles for Android, and that its kernels compute what the host's library does."""

import ctypes.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax

from export import library
from models.hf_config import read_values
from tests.export.conftest import Folder

SHAPE = {"hidden_size": 64, "head_dim": 16, "max_position_embeddings": 128}


def read(machine: Any, device: Any, weights: list[np.ndarray], parts: list[list[int]]) -> list[np.ndarray]:
    """The logits after each part of a text; a part of one token is decoded."""
    held = [tvm.runtime.tensor(one, device=device) for one in weights]
    cache = machine["create_kv_cache"](tvm.runtime.ShapeTuple([128]))
    tvm.get_global_func("vm.builtin.kv_state_add_sequence")(cache, 0)
    begin = tvm.get_global_func("vm.builtin.kv_state_begin_forward")
    end = tvm.get_global_func("vm.builtin.kv_state_end_forward")
    found = []
    for part in parts:
        begin(cache, tvm.runtime.ShapeTuple([0]), tvm.runtime.ShapeTuple([len(part)]))
        ids = tvm.runtime.tensor(np.array([part], dtype=np.int32), device=device)
        found.append(machine["decode" if len(part) == 1 else "prefill"](ids, cache, held).numpy())
        end(cache)
    return found


def without_race(source: str) -> str:
    """TVM's kernel that merges two parts of attention has each work-item of a head read a sum and write it anew.

    That is right where the items of a head run in lockstep, as on GPUs; PoCL runs them one after the other.
    """
    head, name, kernel = source.partition("// Function: tir_attention_merge_state_kernel")
    body, following, rest = kernel.partition("// Function: ")
    before, write, after = body.rpartition("  S_ptr[")
    assert write
    return f"{head}{name}{before}  barrier(CLK_GLOBAL_MEM_FENCE);\n{write}{after}{following}{rest}"


@pytest.mark.skipif(not ctypes.util.find_library("OpenCL"), reason="needs PoCL")
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_kernels_compute_what_the_host_does(folder: Folder, tmp_path: Path, kind: str) -> None:
    from tests.export.pocl import Grids, prepare

    shape = library.Shape.of(read_values(folder(kind, **SHAPE)), 128, 64)
    (host,), grids = library.targets("host"), Grids()
    target = library.Target("opencl", {"kind": "opencl", "host": host.tvm})
    with tvm.transform.PassContext(instruments=[grids]):
        executable = library.executable_of(shape, target, "f32")
    program = prepare(executable, grids.of, tmp_path, without_race)
    ours = relax.VirtualMachine(library.executable_of(shape, host, "f32"), tvm.cpu())
    theirs = relax.VirtualMachine(executable, tvm.device("opencl", 0))
    random = np.random.default_rng(0)
    parameters = json.loads(ours["palmtop_metadata"]())["params"]
    weights = [random.normal(scale=0.1, size=one["shape"]).astype(np.float32) for one in parameters]
    parts = [list(range(3, 43)), list(range(90, 111)), [7], [8]]
    for found, expected in zip(
        read(theirs, tvm.device("opencl", 0), weights, parts), read(ours, tvm.cpu(), weights, parts), strict=True
    ):
        np.testing.assert_allclose(found, expected, atol=1e-5)
    assert {"batch_prefill_paged_kv_kernel", "batch_decode_paged_kv_kernel"} <= set(program.built)


@pytest.mark.skipif(not shutil.which("aarch64-linux-gnu-gcc"), reason="needs a linker for aarch64")
def test_an_object_for_the_app(folder: Folder, tmp_path: Path) -> None:
    values = read_values(folder("llama", **SHAPE))
    (found,) = library.build(values, "android-opencl", "f16", tmp_path, context=128)
    header = found.read_bytes()[:20]
    assert header[:4] == b"\x7fELF"
    assert int.from_bytes(header[16:18], "little") == 1  # to be linked, not loaded
    assert int.from_bytes(header[18:20], "little") == 183  # aarch64
