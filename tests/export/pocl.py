"""Runs the OpenCL kernels of a library here, on PoCL: TVM's wheel compiles them but has no runtime for them.

The host code looks its kernels up in a small library instead, whose functions all call :meth:`Program.launch`. Memory
is this machine's own, which PoCL's processor takes as OpenCL's shared virtual memory.
"""

import ctypes
import re
import subprocess
from pathlib import Path
from typing import Any

import tvm
import tvm_ffi.libinfo

STUBS = """\
#include <tvm/ffi/function.h>
#include <vector>
using namespace tvm::ffi;
static int Launch(const char* name, const TVMFFIAny* args, int32_t count) {
  std::vector<AnyView> all{name};
  for (int32_t i = 0; i < count; ++i) all.push_back(AnyView::CopyFromTVMFFIAny(args[i]));
  Any result;
  Function::GetGlobalRequired("palmtop.launch").CallPacked(all.data(), all.size(), &result);
  return 0;
}
#define KERNEL(name)                                                                                 \\
  extern "C" int __tvm_ffi_##name(void*, const TVMFFIAny* args, int32_t count, TVMFFIAny* result) {  \\
    return Launch(#name, args, count);                                                               \\
  }
"""

SCALARS = {"int": ctypes.c_int32, "uint": ctypes.c_uint32, "long": ctypes.c_int64, "float": ctypes.c_float}

ALL_DEVICES = ctypes.c_uint64(0xFFFFFFFF)

Extents = ctypes.c_size_t * 3


@tvm.ir.instrument.pass_instrument
class Grids:
    """Sees a module compile and keeps which extents of a grid each kernel takes after its own arguments."""

    def __init__(self) -> None:
        self.of: dict[str, list[str]] = {}

    def run_after_pass(self, module: tvm.IRModule, info: Any) -> None:
        for function in module.functions.values():
            attributes = function.attrs or {}
            if "tirx.kernel_launch_params" in attributes:
                tags = [str(tag) for tag in attributes["tirx.kernel_launch_params"]]
                self.of[str(attributes["global_symbol"])] = tags


class Program:
    """The kernels of a library.

    Args:
        source: in OpenCL's C.
        grids: of each kernel, see :class:`Grids`.
    """

    def __init__(self, source: str, grids: dict[str, list[str]]) -> None:
        self._grids = grids
        found = re.findall(r"__kernel void (\w+)\((.*?)\)", source)
        self._parameters = {name: [one.strip() for one in text.split(",")] for name, text in found}
        # Each part holds one kernel, after declarations of all: most are of caches that no model here has.
        parts = re.findall(r"^// Function: (\w+)\n(.*?)(?=^// Function: |\Z)", source, re.MULTILINE | re.DOTALL)
        self._parts = {name: text.encode() for name, text in parts}
        self.built: dict[str, ctypes.c_void_p] = {}
        self._cl = ctypes.CDLL("libOpenCL.so.1")
        platform = ctypes.c_void_p()
        self._device = ctypes.c_void_p()
        self._call("GetPlatformIDs", 1, ctypes.byref(platform), None)
        self._call("GetDeviceIDs", platform, ALL_DEVICES, 1, ctypes.byref(self._device), None)
        self._context = self._made("CreateContext", None, 1, ctypes.byref(self._device), None, None)
        self._queue = self._made("CreateCommandQueue", self._context, self._device, ctypes.c_uint64(0))

    def launch(self, name: str, *arguments: Any) -> None:
        """Run a kernel: its own arguments come first, then the extents of its grid."""
        kernel, parameters = self._kernel(name), self._parameters[name]
        for place, (parameter, value) in enumerate(zip(parameters, arguments, strict=False)):
            if "*" in parameter:
                self._call("SetKernelArgSVMPointer", kernel, place, value)
            else:
                scalar = SCALARS[parameter.split()[0]](value)
                self._call("SetKernelArg", kernel, place, ctypes.c_size_t(ctypes.sizeof(scalar)), ctypes.byref(scalar))
        extents = dict(zip(self._grids[name], arguments[len(parameters) :], strict=True))
        group = [extents.get(f"threadIdx.{axis}", 1) for axis in "xyz"]
        grid = [extents.get(f"blockIdx.{axis}", 1) * items for axis, items in zip("xyz", group, strict=True)]
        sizes = (None, Extents(*grid), Extents(*group))
        self._call("EnqueueNDRangeKernel", self._queue, kernel, 3, *sizes, 0, None, None)
        self._call("Finish", self._queue)

    def _kernel(self, name: str) -> ctypes.c_void_p:
        if name not in self.built:
            text = ctypes.byref(ctypes.c_char_p(self._parts[name]))
            program = self._made("CreateProgramWithSource", self._context, 1, text, None)
            self._call("BuildProgram", program, 1, ctypes.byref(self._device), b"", None, None)
            self.built[name] = self._made("CreateKernel", program, name.encode())
        return self.built[name]

    def _call(self, function: str, *arguments: Any) -> None:
        code = getattr(self._cl, f"cl{function}")(*arguments)
        assert code == 0, f"cl{function}: {code}"

    def _made(self, function: str, *arguments: Any) -> ctypes.c_void_p:
        """What a function returns that gives its error code through its last argument."""
        code = ctypes.c_int()
        call = getattr(self._cl, f"cl{function}")
        call.restype = ctypes.c_void_p
        made = ctypes.c_void_p(call(*arguments, ctypes.byref(code)))
        assert code.value == 0, f"cl{function}: {code.value}"
        return made


def prepare(executable: Any, grids: dict[str, list[str]], folder: Path, edit: Any) -> Program:
    """Make a library whose host code is for this machine run its kernels on PoCL.

    Args:
        executable: of :func:`export.library.executable_of`.
        grids: of its kernels.
        folder: for what is compiled.
        edit: takes the kernels' source and returns what is to be run.
    """
    (host,) = executable.mod.imports
    (kernels,) = host.imports
    program = Program(edit(kernels.inspect_source()), grids)
    source, stubs = folder / "stubs.cc", folder / "stubs.so"
    source.write_text(STUBS + "".join(f"KERNEL({name})\n" for name in grids))
    include = [f"-I{path}" for path in tvm_ffi.libinfo.include_paths()]
    words = ["-std=c++17", "-shared", "-fPIC", *include, str(source), tvm_ffi.libinfo.find_libtvm_ffi()]
    subprocess.run(["g++", *words, "-o", str(stubs)], check=True)
    host.clear_imports()
    host.import_module(tvm.runtime.load_module(str(stubs)))
    tvm.register_global_func("palmtop.launch", program.launch, override=True)
    tvm.register_global_func("device_api.opencl", tvm.get_global_func("device_api.cpu"), override=True)
    return program
