"""Compile a model into a library of TVM, once for each content. See :func:`build`.

Every library, for the host and for a phone alike, is an executable of TVM's relax virtual machine with the functions

- ``create_kv_cache(total: Shape([max_tokens])) -> cache``
- ``prefill(ids: Tensor[(1, n), int32], cache, params: Array[Tensor]) -> logits Tensor[(1, V), float32]`` after the last
- ``decode(ids: Tensor[(1, 1), int32], cache, params) -> logits Tensor[(1, V), float32]``
- ``all_logits(ids, cache, params) -> logits Tensor[(n, V), float32]``, of host libraries alone
- ``palmtop_metadata() -> String``, JSON: ``params`` (name, shape and dtype of each weight in the order of ``params``),
  ``vocab``, ``context``, ``prefill_chunk``, ``layers``, ``page``, ``dtype``

The cache holds one sequence. Around a call to prefill or decode stand TVM's ``vm.builtin.kv_state_begin_forward(cache,
Shape([sequence]), Shape([n]))`` and ``vm.builtin.kv_state_end_forward(cache)``, after one
``vm.builtin.kv_state_add_sequence(cache, sequence)``; n is at most ``prefill_chunk``.
"""

import hashlib
import json
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tvm
from tvm import relax
from tvm.s_tir import dlight

from common.errors import UserError
from common.files import cache_folder
from export.attention import PAGE
from export.cpu import CpuOperations
from export.graph import Operations, Parameter, Shape
from export.graph import build as build_graph
from export.opencl import OpenClOperations

DTYPES = {"f16": "float16", "f32": "float32"}
"""The dtype of a library's weights."""


@dataclass(frozen=True)
class Target:
    """What a library is compiled for."""

    name: str
    """Of the library's file."""
    tvm: dict[str, Any]
    """TVM's description."""
    fmlal: bool = False
    """Whether the processor multiplies fp16 and sums in fp32."""

    @property
    def is_host(self) -> bool:
        """Whether the library runs here."""
        return self.name == "host"

    @property
    def is_opencl(self) -> bool:
        """Whether a GPU computes."""
        return bool(self.tvm["kind"] == "opencl")


ANDROID = {"kind": "llvm", "mtriple": "aarch64-linux-android"}


def host_target() -> Target:
    """This machine's own processor."""
    cpu = tvm.get_global_func("target.llvm_get_system_cpu")()
    triple = tvm.get_global_func("target.llvm_get_system_triple")()
    return Target("host", {"kind": "llvm", "mcpu": cpu, "mtriple": triple})


HOST, ANDROID_CPU, ANDROID_OPENCL = "host", "android-cpu", "android-opencl"

SOURCES = "attention cpu graph kernels library matmul opencl rotary rowwise".split()
"""Modules whose text decides what a library is."""

CHUNK = 512
"""Tokens of a call to prefill: weights are widened once for so many, and its buffers stay small."""


def targets(name: str) -> list[Target]:
    """What a target of the command is compiled for.

    android-cpu is two libraries, between which the phone's processor decides at run time: ``armv8`` runs on every
    64-bit ARM, ``fhm`` on those with FEAT_FHM.
    """
    if name == HOST:
        return [host_target()]
    if name == ANDROID_CPU:
        return [
            Target("armv8", ANDROID | {"mattr": ["+neon"]}),
            Target("fhm", ANDROID | {"mattr": ["+neon", "+fullfp16", "+fp16fml"]}, fmlal=True),
        ]
    if name == ANDROID_OPENCL:
        return [Target("opencl", {"kind": "opencl", "host": ANDROID})]
    raise UserError(f"there is no target {name}; there are {HOST}, {ANDROID_CPU}, {ANDROID_OPENCL}")


def build(values: dict[str, Any], target: str, dtype: str, out: Path, *, context: int) -> list[Path]:
    """Compile a model, or take it from the cache.

    Args:
        values: of the model's ``config.json``.
        target: host, android-cpu or android-opencl.
        dtype: f16 or f32.
        out: existing folder for the libraries.
        context: tokens of the KV cache at most.

    Returns:
        The files: ``host-KEY.so``, ``android-cpu-KEY-armv8.so`` and ``-fhm.so``, ``android-opencl-KEY.o``.

    Raises:
        UserError: the model has a part that the graph has not, or no compiler for the target is installed.
    """
    shape = Shape.of(values, context, min(CHUNK, context))
    found = []
    for one in targets(target):
        key = _key(shape, one, dtype)
        name = f"{target}-{key}"
        name += ".o" if one.is_opencl else ".so" if one.is_host else f"-{one.name}.so"
        kept = cache_folder() / "libraries" / name
        if not kept.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=kept.parent, prefix=".") as temporary:
                made = Path(temporary) / name
                compile_library(shape, one, dtype, made)
                made.rename(kept)
        found.append(Path(shutil.copyfile(kept, out / name)))
    return found


def _key(shape: Shape, target: Target, dtype: str) -> str:
    """A name for all that decides what a library is."""
    sources = [Path(__file__).with_name(f"{name}.py").read_bytes() for name in SOURCES]
    code = hashlib.sha256(b"".join(sources)).hexdigest()
    content = json.dumps([asdict(shape), asdict(target), dtype, tvm.__version__, code], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def compile_library(shape: Shape, target: Target, dtype: str, out: Path) -> None:
    """Compile a model into the shared library, or for OpenCL the object, ``out``."""
    # The linker is looked for first: without one, nothing needs to be compiled.
    link = _linker(target)
    executable_of(shape, target, dtype).export_library(str(out), fcompile=link)


def executable_of(shape: Shape, target: Target, dtype: str) -> Any:
    """Compile a model; returns TVM's executable."""
    described = tvm.target.Target(target.tvm)
    operations: Operations
    if target.is_opencl:
        operations, relax_pipeline, tir_pipeline = OpenClOperations(DTYPES[dtype], described), _gpu_pipeline(), "s_tir"
    else:
        operations = CpuOperations(DTYPES[dtype], fmlal=target.fmlal and dtype == "f16")
        relax_pipeline, tir_pipeline = _cpu_pipeline(), "tirx"
    module, parameters = build_graph(shape, operations, DTYPES[dtype], every_logit=target.is_host)
    module = _with_metadata(module, metadata(shape, parameters, dtype))
    with described:
        return tvm.compile(module, target=described, relax_pipeline=relax_pipeline, tir_pipeline=tir_pipeline)


def compile_kernel(function: Any) -> Any:
    """One kernel as a function to call here."""
    named, target = function.with_attr("global_symbol", "kernel"), tvm.target.Target(host_target().tvm)
    return tvm.compile(named, target=target, tir_pipeline="tirx")["kernel"]


def metadata(shape: Shape, parameters: list[Parameter], dtype: str) -> dict[str, Any]:
    """What ``palmtop_metadata`` returns."""
    return {
        "params": [asdict(parameter) for parameter in parameters],
        "vocab": shape.vocab,
        "context": shape.context,
        "prefill_chunk": shape.chunk,
        "layers": shape.layers,
        "page": PAGE,
        "dtype": dtype,
    }


def _with_metadata(module: tvm.IRModule, found: dict[str, Any]) -> tvm.IRModule:
    builder = relax.BlockBuilder(module)
    with builder.function("palmtop_metadata", params=[]):
        builder.emit_func_output(tvm.ir.StringImm(json.dumps(found)))
    return builder.get()


def _cpu_pipeline() -> Any:
    """From the graph to the virtual machine's instructions; our kernels need no fusion and no schedule."""
    return tvm.transform.Sequential(
        [relax.transform.LegalizeOps(skip_ops=["relax.reshape"]), *_machine_passes()]  # reshaping copies nothing
    )


def _gpu_pipeline() -> Any:
    """From the graph over fused operations and DLight's schedules to the virtual machine's instructions."""
    return tvm.transform.Sequential(
        [
            relax.transform.FuseTransposeMatmul(),  # weights are multiplied as they lie
            relax.transform.LegalizeOps(),
            relax.transform.AnnotateTIROpPattern(),
            relax.transform.FoldConstant(),
            relax.transform.FuseOps(),
            relax.transform.FuseTIR(),
            dlight.ApplyDefaultSchedule(
                dlight.gpu.Matmul(),
                dlight.gpu.GEMV(),
                dlight.gpu.Reduction(),
                dlight.gpu.GeneralReduction(),
                dlight.gpu.Fallback(),
            ),
            relax.transform.RewriteDataflowReshape(),
            *_machine_passes(),
        ]
    )


def _machine_passes() -> list[Any]:
    """What makes instructions of a graph that calls kernels alone."""
    return [
        relax.transform.ToNonDataflow(),
        relax.transform.RemovePurityChecking(),
        relax.transform.CallTIRRewrite(),
        relax.transform.StaticPlanBlockMemory(),
        relax.transform.LowerAllocTensor(),
        relax.transform.KillAfterLastUse(),
        relax.transform.LowerRuntimeBuiltin(),
        relax.transform.ComputePrimValue(),
        relax.transform.VMShapeLower(),
        relax.transform.AttachGlobalSymbol(),
    ]


def _linker(target: Target) -> Callable[..., None]:
    """What makes a file of TVM's objects: a shared library, or for OpenCL one object, for an app to be linked with.

    A library for Android needs nothing of Android's own.

    Raises:
        UserError: no compiler for the target is installed.
    """
    if target.is_host:
        words = [_compiler("cc", "gcc", "clang", what="a C compiler (Debian: gcc)"), "-shared"]
    else:
        compiler = _compiler("aarch64-linux-gnu-gcc", what="a compiler for 64-bit ARM (Debian: gcc-aarch64-linux-gnu)")
        words = [compiler, "-nostdlib", "-r" if target.is_opencl else "-shared"]

    def link(output: str, objects: list[str], **_: Any) -> None:
        _run([*words, "-o", output, *objects])

    return link


def _compiler(*names: str, what: str) -> str:
    for name in names:
        path = shutil.which(name)
        if path is not None:
            return path
    raise UserError(f"{what} is needed to link the library, and none of {', '.join(names)} is on the PATH")


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"linking failed: {' '.join(command)}\n{done.stderr.strip()}")
