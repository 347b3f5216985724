"""Ours, the L1 baseline and Torch-Pruning: the same model, cut and text, in one run.

    python bench/pruning.py --calibration ../shared/datasets/c4 --test ../shared/datasets/c4
    pip install --no-deps --target PEER torch-pruning && python bench/pruning.py ... --torch-pruning PEER

SmolLM2-135M-Instruct loses a third of its feed-forward units (1536 to 1016, 20% of all parameters) unless told
otherwise. Torch-Pruning finds what belongs to a unit by its own tracing and scores it by its own importance: magnitude,
and Taylor on the calibration rows. Its recipes cut whole models to a ratio; here it is asked for exactly this cut, so
that only the choice of units differs. Where layers go (--layers), two more ways leave out the last ones, and neighbours
that turn the hidden state least (arXiv:2403.17887). Perplexity is of the folders that each leaves, on the same held-out
documents.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout that is not installed

from common.command import run_command
from common.settings import Count
from data.settings import Mix
from data.tokenizer import Tokenizer
from models.hf_config import read_values
from pruning import taylor
from pruning.blocks import Rows
from pruning.calibration import Documents, read_calibration, read_test
from pruning.perplexity import measure
from pruning.prune import prune
from pruning.settings import CutSettings
from pruning.shapes import Shape, parameters
from tests.smollm2 import smollm2_folder

CPU = torch.device("cpu")

OURS: dict[str, dict[str, Any]] = {
    "l1": {"method": "l1", "repair": False},
    "random": {"method": "random", "repair": False},
    "taylor": {"method": "taylor", "repair": False},
    "energy": {"method": "energy", "repair": False},
    "energy + repair": {"method": "energy", "repair": True},
    "fisher": {"method": "fisher", "repair": False},
    "fisher + repair": {"method": "fisher", "repair": True},
}
"""Name, and what of the settings makes it."""

CONTROLS = ("last layers", "contiguous layers")

PEERS = ("torch-pruning magnitude", "torch-pruning taylor")


class Bench:
    """One model, one cut, one set of texts."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.folder: Path = args.model or smollm2_folder()
        self.values = read_values(self.folder)
        now = Shape.of(self.values)
        changes = {axis: getattr(args, axis) for axis in vars(now) if getattr(args, axis) is not None}
        self.now, self.shape = now, Shape(**(vars(now) | (changes or {"ffn": 1016})))
        self.mix, self.rows, self.length = Mix.parse(args.calibration), args.rows, args.length
        tokenizer = Tokenizer(self.folder)
        self.tests: list[Documents] = [read_test(name, tokenizer, args.test_tokens) for name in args.test.split(",")]

    def settings(self, **changes: Any) -> CutSettings:
        """Of a variant of ours."""
        tokens = Count(self.rows * self.length)
        return CutSettings(calibration=self.mix, tokens=tokens, seq_len=Count(self.length), **changes)

    def ours(self, name: str, out: Path) -> None:
        """Cut by this project."""
        prune(self.folder, out, self.shape, self.settings(**OURS[name]), CPU)

    def control(self, name: str, out: Path) -> None:
        """Leave neighbouring layers out."""
        model, gone = self.whole(), self.now.layers - self.shape.layers
        first = self.shape.layers if name.startswith("last") else self._contiguous(model, gone)
        del model.model.layers[first : first + gone]
        model.config.num_hidden_layers = self.shape.layers
        model.save_pretrained(out)
        Tokenizer(self.folder).copy_to(out)

    @torch.no_grad()
    def _contiguous(self, model: Any, gone: int) -> int:
        """The first of so many neighbouring layers, the last of all not among them, that turn hidden states least."""
        tokenizer = Tokenizer(self.folder)
        text = read_calibration(self.mix, tokenizer, self.rows, self.length, 0).batch(tokenizer)
        angles = torch.zeros(self.now.layers - gone)
        for row in torch.from_numpy(text.inputs.copy()):
            hidden = model.model(row[None], output_hidden_states=True).hidden_states
            for first in range(len(angles)):
                cosine = torch.cosine_similarity(hidden[first], hidden[first + gone], dim=-1)
                angles[first] += cosine.clamp(-1, 1).arccos().mean()
        return int(angles.argmin())

    def whole(self) -> Any:
        """transformers' model."""
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()
        model.config.use_cache = False
        return model

    def peer(self, name: str, out: Path) -> None:
        """Cut by Torch-Pruning: the feed-forward units of every layer, those of least importance by its own measure."""
        import torch_pruning as tp

        model = self.whole()
        if name.endswith("taylor"):
            tokenizer = Tokenizer(self.folder)
            text = read_calibration(self.mix, tokenizer, self.rows, self.length, 0).batch(tokenizer)
            slopes = taylor.gradients(self.folder, Rows.of(text), CPU, lambda done: None)
            for parameter_name, parameter in model.named_parameters():
                parameter.grad = slopes.get(parameter_name)
            importance = tp.importance.GroupTaylorImportance()
        else:
            importance = tp.importance.GroupMagnitudeImportance()
        graph = tp.DependencyGraph().build_dependency(model, example_inputs=torch.ones(1, 8, dtype=torch.long))
        for layer in model.model.layers:
            gate, cut = layer.mlp.gate_proj, tp.prune_linear_out_channels
            scores = importance(graph.get_pruning_group(gate, cut, idxs=list(range(self.now.ffn))))
            least = scores.argsort()[: self.now.ffn - self.shape.ffn].tolist()
            graph.get_pruning_group(gate, cut, idxs=least).prune()
        model.config.intermediate_size = self.shape.ffn
        model.save_pretrained(out)
        Tokenizer(self.folder).copy_to(out)


def show(name: str, seconds: float | None, folder: Path, bench: Bench, dense: list[float] | None) -> list[float]:
    """Measure a folder and print its line; returns the perplexities."""
    found = measure(folder, bench.tests, CPU, length=bench.length)
    perplexities = [one.perplexity for one in found]
    ratios = [1.0] * len(found) if dense is None else [a / b for a, b in zip(perplexities, dense, strict=True)]
    cells = [
        f"{one.perplexity:>12,.5g} {ratio:>9,.4g}x {one.bits_per_byte:>8.4f}"
        for one, ratio in zip(found, ratios, strict=True)
    ]
    took = "" if seconds is None else f"{seconds / 60:.1f}"
    print(f"{name:<26}{took:>8}  {'  '.join(cells)}", flush=True)
    return perplexities


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="another model folder")
    parser.add_argument("--calibration", default="c4", help="as --calibration of python -m pruning")
    parser.add_argument("--test", default="c4", help="held-out texts, separated by commas")
    parser.add_argument("--rows", type=int, default=48, help="of calibration text")
    parser.add_argument("--length", type=int, default=512, help="tokens in a row")
    parser.add_argument("--test-tokens", type=int, default=12 * 512, help="of each held-out text")
    for axis in ("layers", "ffn", "heads", "kv-heads", "vocab"):
        parser.add_argument(f"--{axis}", type=int, help="cut to so many; by default --ffn 1016")
    parser.add_argument("--variants", default=",".join(OURS), help="of ours, separated by commas")
    parser.add_argument("--torch-pruning", type=Path, help="folder that torch-pruning was installed into")
    return parser.parse_args()


def main() -> None:
    """Cut in every way, measure, print a table."""
    args = parse()
    bench = Bench(args)
    names = args.variants.split(",") if args.variants else []
    ways: list[tuple[str, Callable[[str, Path], None]]] = [(name, bench.ours) for name in names]
    if bench.shape.layers < bench.now.layers:
        ways += [(name, bench.control) for name in CONTROLS]
    if args.torch_pruning is not None:
        sys.path.append(str(args.torch_pruning))
        ways += [(name, bench.peer) for name in PEERS]
    count, whole = parameters(bench.values, bench.shape), parameters(bench.values, bench.now)
    print(f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}, {bench.folder.name}")
    print(f"{bench.now}\n{bench.shape}: {count:,} parameters, {count / whole - 1:+.2%}")
    print(f"calibrated on {bench.mix}, {bench.rows} x {bench.length} tokens; perplexity, times dense, bits per byte of")
    print("  ".join(f"{test.name}, {len(test.texts)} documents" for test in bench.tests))
    print(f"\n{'':<26}{'minutes':>8}")
    dense = show("dense", None, bench.folder, bench, None)
    with tempfile.TemporaryDirectory() as temporary:
        for name, way in ways:
            out, start = Path(temporary) / name.replace(" ", "-"), time.perf_counter()
            way(name, out)
            show(name, time.perf_counter() - start, out, bench, dense)


if __name__ == "__main__":
    run_command(main)
