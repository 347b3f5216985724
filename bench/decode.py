"""Prefill and decoding on this machine: ours, transformers eager and compiled, llama.cpp where it is installed.

    python bench/decode.py                                  15m, 60m and SmolLM2-135M shapes, 1 and 2 threads
    python bench/decode.py --shapes 135m --threads 2 --no-compiled

Weights are random, in the shapes of real models: speed does not depend on them. Every engine has a process of its own,
with the same prompts, and the same number of threads. ``llama-cpp-python`` (an sdist of about five minutes) is measured
with F16 weights where it can be imported.
"""

import argparse
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout that is not installed

from common.command import run_command
from common.files import gigabytes
from common.run_folder import processor
from export.bench import Measurement, ask, line, measurement, read_by_decoding, run_child

SHAPES: dict[str, dict[str, int]] = {
    "15m": {"hidden_size": 288, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 6,
            "num_key_value_heads": 6, "vocab_size": 32000},
    "60m": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8,
            "num_key_value_heads": 4, "vocab_size": 32000},
    "135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
             "num_key_value_heads": 3, "vocab_size": 49152},
}  # fmt: skip

DTYPES = {"f16": ("fp16", "bf16"), "f32": ("fp32",)}
"""Of our libraries, and of transformers beside each."""

TORCH = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def make(shape: str, out: Path, context: int) -> dict[str, Path]:
    """Random weights of a shape, and a host library of each dtype; returns the folder of each dtype."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from export import library
    from export.shards import write_weights
    from models.hf_config import read_values, with_rope_at_top

    config = AutoConfig.for_model(
        "llama", **SHAPES[shape], max_position_embeddings=context, tie_word_embeddings=True, rms_norm_eps=1e-5
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(out / "model")
    values = with_rope_at_top(read_values(out / "model"))
    folders = {}
    for dtype in DTYPES:
        folders[dtype] = folder = out / dtype
        (folder / "lib").mkdir(parents=True)
        (folder / "mlc").mkdir()
        (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
        write_weights(out / "model", folder / "mlc", lambda done, total: None)
        library.build(values, library.HOST, dtype, folder / "lib", context=context)
    return folders


def write_gguf(model: Path, out: Path) -> None:
    """The model as llama.cpp reads it, F16, without a tokenizer; queries and keys are not permuted, which speed is
    not changed by."""
    import gguf
    import numpy as np
    from safetensors.numpy import load_file

    values = json.loads((model / "config.json").read_text(encoding="utf-8"))
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_context_length(values["max_position_embeddings"])
    writer.add_embedding_length(values["hidden_size"])
    writer.add_block_count(values["num_hidden_layers"])
    writer.add_feed_forward_length(values["intermediate_size"])
    writer.add_head_count(values["num_attention_heads"])
    writer.add_head_count_kv(values["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(values["rms_norm_eps"])
    writer.add_rope_dimension_count(values["hidden_size"] // values["num_attention_heads"])
    writer.add_vocab_size(values["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_tokenizer_model("none")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, values["num_hidden_layers"])
    for name, tensor in load_file(model / "model.safetensors").items():
        found = names.get_name(name, try_suffixes=(".weight",))
        assert found is not None, name
        writer.add_tensor(found, tensor.astype(np.float16 if tensor.ndim == 2 else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class LlamaCpp:
    """llama.cpp as :class:`export.timing.Reader`."""

    def __init__(self, file: Path, context: int, threads: int) -> None:
        import llama_cpp  # type: ignore[import-not-found]

        self._model = llama_cpp.Llama(
            str(file), n_ctx=context, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False
        )
        self.vocab, self.context = self._model.n_vocab(), context

    def reset(self) -> None:
        """Forget all tokens."""
        self._model.reset()

    def prefill(self, ids: Sequence[int]) -> Any:
        """Read tokens; returns the logits after the last."""
        import llama_cpp
        import numpy as np

        self._model.eval(list(ids))
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self._model.ctx, -1), (self.vocab,))

    def decode(self, token: int) -> Any:
        """Read one token; returns the logits after it."""
        return self.prefill([token])


def time_llama_cpp(request: dict[str, Any]) -> None:
    """In a process of its own: print what it measures."""
    from export.timing import measure

    reader = LlamaCpp(Path(request.pop("file")), request.pop("context"), request.pop("threads"))
    print(json.dumps(measure(reader, **request)))


def bench(shape: str, args: argparse.Namespace, out: Path) -> list[Measurement]:
    """Measure every engine on a shape, and print a line for each."""
    context = max(args.prompts) + args.new_tokens
    folders = make(shape, out, context)
    names = ("prompts", "new_tokens", "repeats", "warm_up")
    timed = {name: getattr(args, name) for name in names}
    found: list[Measurement] = []

    def add(name: str, threads: int, answer: dict[str, Any], *share: Any) -> None:
        found.append(measurement(name, threads, answer, *share))
        print(line(found[-1]), flush=True)

    for threads in args.threads:
        bandwidth = ask("bandwidth", folders["f16"], threads)
        print(f"\n{shape}, {threads} threads: memory is read at {gigabytes(bandwidth)}/s", flush=True)
        for dtype, others in DTYPES.items():
            folder = folders[dtype]
            add(
                f"ours {dtype}",
                threads,
                ask("library", folder, threads, timed),
                bandwidth,
                read_by_decoding(folder, dtype),
            )
            for other in others:
                for compiled in (False, True) if args.compiled else (False,):
                    request = timed | {"dtype": TORCH[other], "compiled": compiled, "context": context}
                    name = f"torch {other}, {'compiled' if compiled else 'eager'}"
                    add(name, threads, ask("torch", folder, threads, request))
        if importlib.util.find_spec("llama_cpp") is not None:
            file = out / "model.gguf"
            if not file.exists():
                write_gguf(out / "model", file)
            request = timed | {"file": str(file), "context": context, "threads": threads}
            add("llama.cpp F16", threads, run_child([__file__, "--llama-cpp", json.dumps(request)], threads))
        else:
            print("llama.cpp: not measured, llama-cpp-python is not installed")
    return found


def verdicts(found: list[Measurement], threads: int, tokens: int) -> list[str]:
    """Our fp16 library beside the others on ``threads`` threads, prefill of ``tokens``."""
    here = {one.engine: one for one in found if one.threads == threads}
    ours = here["ours f16"]
    decode = {name: one.prompts[0].decode.median for name, one in here.items()}
    prefill = {name: p.prefill.median for name, one in here.items() for p in one.prompts if p.tokens == tokens}
    halves = [value for name, value in decode.items() if name.startswith(("torch fp16", "torch bf16"))]
    lines = [f"decode: {decode['ours f16'] / max(halves):.2f}x the best 16-bit torch (bar 1.7)"]
    if ours.bandwidth_share is not None:
        lines.append(f"decode: {ours.bandwidth_share:.0%} of the read bandwidth (bar 60%)")
    if "llama.cpp F16" in decode:
        lines.append(f"decode: {decode['ours f16'] / decode['llama.cpp F16']:.2f}x llama.cpp F16 (bar 0.95)")
    if "ours f16" in prefill:
        for name, bar in (
            ("torch fp32, eager", "bar 1.0"),
            ("torch bf16, eager", "shown"),
            ("llama.cpp F16", "bar 0.8"),
        ):
            if name in prefill:
                lines.append(f"prefill of {tokens}: {prefill['ours f16'] / prefill[name]:.2f}x {name} ({bar})")
    return lines


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES), help="of models")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="one after the other")
    parser.add_argument("--prompts", type=int, nargs="+", default=[64, 512, 2000], help="tokens of each")
    parser.add_argument("--new-tokens", type=int, default=64, help="decoded after each prompt")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each prompt")
    parser.add_argument("--warm-up", type=int, default=1, help="runs before them")
    parser.add_argument("--compiled", action=argparse.BooleanOptionalAction, default=True, help="torch.compile as well")
    parser.add_argument("--llama-cpp", type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure all shapes, then say how ours stands."""
    args = parse()
    if args.llama_cpp is not None:
        time_llama_cpp(args.llama_cpp)
        return
    print(f"{processor()}, {os.cpu_count()} cores")
    for shape in args.shapes:
        with tempfile.TemporaryDirectory() as temporary:
            found = bench(shape, args, Path(temporary))
        for threads in args.threads:
            print(f"\n{shape}, {threads} threads\n  " + "\n  ".join(verdicts(found, threads, 512)), flush=True)


if __name__ == "__main__":
    run_command(main)
