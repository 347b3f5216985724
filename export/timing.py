"""A process that times one engine with one number of threads, and nothing else: ``python -m export.timing REQUEST``.

Engines do not share a process, where the threads of one keep those of the other waiting. The request is JSON on the
command line, the measurements are JSON on the last line of standard output; export/bench.py asks and reads.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from common.command import run_command

BANDWIDTH_BYTES = 512 * 2**20
"""What is read to measure the memory's bandwidth: far more than caches hold."""


class Reader(Protocol):
    """A model that reads tokens, one sequence at a time."""

    vocab: int
    context: int

    def reset(self) -> None:
        """Forget all tokens."""

    def prefill(self, ids: Sequence[int]) -> Any:
        """Read tokens; returns the logits after the last."""

    def decode(self, token: int) -> Any:
        """Read one token; returns the logits after it."""


def measure(reader: Reader, prompts: Sequence[int], new_tokens: int, repeats: int, warm_up: int) -> dict[str, Any]:
    """Time prompts, and greedy decoding after each of them.

    Args:
        reader: what is timed.
        prompts: their tokens; cut, as the new ones are, where both together are longer than the reader's context.
        new_tokens: to decode.
        repeats: of each prompt.
        warm_up: runs of each before the first that counts.

    Returns:
        For each prompt ``tokens``, and of every repeat ``prefill`` and ``decode`` in tokens a second and
        ``first_token`` in seconds; and ``peak_memory``, the bytes that were resident in the process at most.
    """
    runs = []
    for tokens, new in dict.fromkeys(_fitted(prompt, new_tokens, reader.context) for prompt in prompts):
        ids = [(7919 * place + 11) % reader.vocab for place in range(tokens)]
        found = [_run(reader, ids, new) for _ in range(warm_up + repeats)][warm_up:]
        first, decode = [one[0] for one in found], [new / one[1] for one in found]
        runs.append(
            {
                "tokens": tokens,
                "prefill": [tokens / seconds for seconds in first],
                "decode": decode,
                "first_token": first,
            }
        )
    return {"runs": runs, "peak_memory": peak_memory()}


def _fitted(prompt: int, new_tokens: int, context: int) -> tuple[int, int]:
    """A prompt cut to what new tokens leave of a context, but not below half of it; and of those what fits then."""
    tokens = max(1, min(prompt, max(context - new_tokens, context // 2)))
    return tokens, max(1, min(new_tokens, context - tokens))


def peak_memory() -> int:
    """Bytes of this process that were resident at most."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    # Linux's ru_maxrss would count what the parent had in memory when it made this process.
    (line,) = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


def _run(reader: Reader, ids: Sequence[int], new_tokens: int) -> tuple[float, float]:
    """Seconds to the first token, and of the ``new_tokens`` after it."""
    reader.reset()
    start = time.perf_counter()
    token = int(reader.prefill(ids).argmax())
    read = time.perf_counter()
    for _ in range(new_tokens):
        token = int(reader.decode(token).argmax())
    return read - start, time.perf_counter() - read


class TorchReader:
    """Transformers on a model of the same shape with random weights, whose speed is that of the real ones.

    Args:
        config: folder with ``config.json``.
        dtype: float32, float16 or bfloat16.
        compiled: with ``torch.compile`` and a cache of fixed size, which it needs.
        context: tokens of the cache.
    """

    def __init__(self, config: Path, dtype: str, compiled: bool, context: int) -> None:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache

        self._torch = torch
        loaded = AutoConfig.from_pretrained(config, local_files_only=True)
        torch.set_grad_enabled(False)
        self._model: Any = AutoModelForCausalLM.from_config(loaded, dtype=getattr(torch, dtype)).eval()
        self.vocab, self.context = loaded.vocab_size, context
        self._new_cache: Callable[[], Any] = DynamicCache
        if compiled:
            self._model.forward = torch.compile(self._model.forward)
            fixed = StaticCache(config=loaded, max_cache_len=context)
            self._new_cache = lambda: fixed.reset() or fixed
        self.reset()

    def reset(self) -> None:
        """As :meth:`Reader.reset`."""
        self._cache = self._new_cache()

    def prefill(self, ids: Sequence[int]) -> Any:
        """As :meth:`Reader.prefill`."""
        tokens = self._torch.tensor([ids])
        return self._model(tokens, past_key_values=self._cache, use_cache=True, logits_to_keep=1).logits[0, -1]

    def decode(self, token: int) -> Any:
        """As :meth:`Reader.decode`."""
        return self.prefill([token])


def read_bandwidth(repeats: int = 5) -> float:
    """Bytes a second that TVM's threads read from memory together, at best."""
    import numpy as np
    import tvm

    from export.engine import Engine  # noqa: F401  (its module sets how TVM's threads are bound)
    from export.library import compile_kernel
    from export.rowwise import row_sums

    rows, width = 4096, BANDWIDTH_BYTES // 4 // 4096
    kernel = compile_kernel(row_sums(rows, width))
    data, sums = (tvm.runtime.tensor(np.ones(shape, np.float32)) for shape in ((rows, width), (rows,)))
    fastest = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        kernel(data, sums)
        fastest = min(fastest, time.perf_counter() - start)
    return BANDWIDTH_BYTES / fastest


def main() -> None:
    """Answer a request: the engine's own fields, and those of :func:`measure`."""
    request = json.loads(sys.argv[1])
    engine, folder = request.pop("engine"), Path(request.pop("folder"))
    if engine == "bandwidth":
        print(json.dumps(read_bandwidth()))
        return
    if engine == "library":
        from export.engine import Engine

        (library,) = (folder / "lib").glob("host-*.so")
        reader: Reader = Engine(library, folder / "mlc")
    else:
        import torch

        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        reader = TorchReader(folder, request.pop("dtype"), request.pop("compiled"), request.pop("context"))
    print(json.dumps(measure(reader, **request)))


if __name__ == "__main__":
    run_command(main)
