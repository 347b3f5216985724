"""The arithmetic of costs, against hand counts on one small shape and against what PyTorch holds."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from common.errors import UserError
from models import budget, gpus, transformer
from models.sizes import SIZES, ModelConfig, size
from models.transformer import Transformer

SMALL = ModelConfig(
    layers=2, width=8, heads=4, kv_heads=2, head_width=4, ffn=10, vocab=100, context=16, tied=True, qk_norm=True
)
QKV, OUT, FFN = 8 * (4 + 2 + 2) * 4, 4 * 4 * 8, 3 * 8 * 10
NORMS = 2 * 8 + 2 * 4


def test_parameters() -> None:
    counts = budget.parameters(SMALL)
    assert counts.embedding == 800
    assert counts.head == 0
    assert counts.layers == 2 * (QKV + OUT + FFN + NORMS) + 8
    assert counts.total == 800 + counts.layers
    untied = budget.parameters(ModelConfig(**{**vars(SMALL), "tied": False}))
    assert (untied.head, untied.total) == (800, counts.total + 800)


def test_flops_per_token() -> None:
    weights = 2 * (QKV + OUT + FFN + NORMS) + 8 + 100 * 8  # all but the lookup; a tied head multiplies too
    scores_and_values = 2 * 2 * (4 * 4 * 16)  # a layer's q·k and p·v over 16 positions, two FLOPs each
    forward = 2 * weights + 2 * scores_and_values
    assert budget.flops_per_token(SMALL, 16) == 3 * forward
    untied = ModelConfig(**{**vars(SMALL), "tied": False})
    assert budget.flops_per_token(untied, 16) == 3 * forward
    assert budget.recomputed_flops(SMALL, 16, "none") == 0
    assert budget.recomputed_flops(SMALL, 16, "selective") == 2 * 2 * FFN
    assert budget.recomputed_flops(SMALL, 16, "full") == forward - 2 * 100 * 8  # all of the forward but the head


def test_bytes() -> None:
    total = budget.parameters(SMALL).total
    assert budget.kv_cache_bytes(SMALL, 16) == 2 * 2 * (2 * 4) * 16 * 2
    assert budget.phone_bytes(SMALL, 16) == 2 * total + budget.kv_cache_bytes(SMALL, 16)
    assert budget.default_tokens(SMALL) == 20 * total


# The state of training


@pytest.mark.parametrize("name", SIZES)
def test_parameter_shapes_are_those_of_the_model(name: str) -> None:
    with torch.device("meta"):
        model = Transformer(replace(SIZES[name].config, layers=2), seed=None)
    shapes = {key: tuple(parameter.shape) for key, parameter in model.named_parameters()}
    assert budget.parameter_shapes(replace(SIZES[name].config, layers=2)) == shapes


def test_state_of_one_device() -> None:
    total, tensors = budget.parameters(SMALL).total, 1 + 2 * 8 + 1
    adamw = budget.state_bytes(SMALL)
    assert (adamw.weights, adamw.gradients, adamw.optimizer) == (4 * total, 4 * total, 8 * total + 4 * tensors)
    matrices = 2 * (QKV + OUT + FFN)
    muon = budget.state_bytes(SMALL, "muon")
    assert muon.optimizer == 4 * matrices + 8 * (total - matrices) + 4 * (tensors - 2 * 4)


@given(st.sampled_from(sorted(SIZES)), st.sampled_from(["adamw", "muon"]), st.integers(1, 64))
def test_shards_are_a_whole_and_the_first_is_the_largest(name: str, optimizer: str, shards: int) -> None:
    config = replace(SIZES[name].config, layers=2)
    parts = [budget.state_bytes(config, optimizer, shards=shards, rank=rank) for rank in range(shards)]
    assert sum(part.weights for part in parts) == budget.state_bytes(config, optimizer).weights
    assert max(part.total for part in parts) == parts[0].total


# Activations


def saved_bytes(config: ModelConfig, rows: int, seq_len: int, *, bf16: bool, packed: bool, checkpointing: str) -> int:
    """Bytes of the storages that autograd keeps of a forward pass on the CPU, weights and their bf16 copies apart."""
    model = Transformer(config)
    model.checkpointing = checkpointing
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    shapes = {tuple(parameter.shape) for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        is_copy = tensor.dtype == torch.bfloat16 and {tuple(tensor.shape), tuple(tensor.shape[::-1])} & shapes
        if tensor.untyped_storage().data_ptr() not in own and not is_copy:
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    tokens = torch.randint(config.vocab, (rows, seq_len))
    positions = torch.arange(seq_len).remainder(11).expand(rows, -1) if packed else None
    if positions is not None:  # the batch's, which are there anyway
        own.add(positions.untyped_storage().data_ptr())
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        model(tokens, positions, tokens)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("face", ["llama", "qwen3"])
def test_activations_are_what_autograd_keeps(face: str, bf16: bool, packed: bool, checkpointing: str) -> None:
    config = ModelConfig(3, 96, 6, 2 if face == "qwen3" else 6, 16, 200, 500, 64, face == "llama", face == "qwen3")
    rows, seq_len, size_of = 3, 40, 2 if bf16 else 4
    kept = saved_bytes(config, rows, seq_len, bf16=bf16, packed=packed, checkpointing=checkpointing)
    planned = budget.activation_bytes(config, rows, seq_len, size_of, checkpointing=checkpointing)
    planned += budget.head_kept_bytes(config, rows * seq_len, size_of)
    if bf16 and checkpointing != "full":  # attention on a CPU keeps no log-sum-exp in bf16, elsewhere it does
        planned -= rows * seq_len * config.layers * 4 * config.heads
    if checkpointing == "full":  # the rotary table is there, but autograd does not hold it
        planned -= rows * seq_len * config.head_width * size_of
    assert kept == planned


def test_compiled_and_checkpointed_blocks_keep_less() -> None:
    for name, value_bytes in ((name, value_bytes) for name in SIZES for value_bytes in (2, 4)):
        config = SIZES[name].config
        for compiled in (False, True):
            kept = [
                budget.activation_bytes(config, 2, 128, value_bytes, checkpointing=mode, compiled=compiled)
                for mode in ("none", "selective", "full")
            ]
            assert kept[0] > kept[1] > kept[2]
        eager, compiled_ = (budget.activation_bytes(config, 2, 128, value_bytes, compiled=c) for c in (False, True))
        assert compiled_ < eager


def test_the_heads_chunk_is_the_transformers() -> None:
    assert budget.HEAD_CHUNK == transformer.HEAD_CHUNK


def test_the_heads_bytes() -> None:
    matrix, kept = 100 * 8, 2 * 64 * 8 + 4 * 100 * 8
    assert budget.head_kept_bytes(SMALL, 64, 2) == kept
    # The product for d_weight and the bf16 head, and a chunk of 16 or of all 64 tokens.
    assert budget.head_bytes(SMALL, 64, 2, chunk=16) == kept + 8 * 16 * 100 + 4 * matrix
    assert budget.head_bytes(SMALL, 64, 2, chunk=4096) == kept + 8 * 64 * 100 + 4 * matrix
    # With few logits the scaled gradients of the backward pass are more.
    assert budget.head_bytes(SMALL, 64, 4, chunk=1, compiled=True) == 2 * budget.head_kept_bytes(SMALL, 64, 4)


# The phone


def test_the_1b_fits_a_phone() -> None:
    assert budget.phone_bytes(size("1b").config, 2048) < 2.5e9


def test_the_size_table_says_who_passes_the_opencl_gate() -> None:
    for name, row in SIZES.items():
        assert (budget.phone_bytes(row.config, 2048) <= budget.OPENCL_GATE) == (name != "3b")
        assert budget.phone_bytes(row.config, 4096) <= budget.PHONE_MEMORY


def test_decode_reads_all_weights_but_an_embedding_of_its_own() -> None:
    total = budget.parameters(SMALL).total
    assert budget.weight_read_bytes(SMALL) == 2 * total
    assert budget.weight_read_bytes(replace(SMALL, tied=False)) == 2 * total
    assert budget.decode_ceiling(SMALL, 16, 1e6) == 1e6 / budget.phone_bytes(SMALL, 16)


# GPUs


def test_peaks_are_found_by_the_devices_own_names() -> None:
    assert budget.peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert budget.peak_flops("NVIDIA H100 PCIe") == 756e12
    assert budget.peak_flops("NVIDIA L40S") == 362e12
    assert budget.peak_flops("NVIDIA L4") == 121e12
    assert budget.peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert budget.peak_flops("some other card") is None


def test_names_that_only_begin_like_a_known_card_are_unknown() -> None:
    assert budget.peak_flops("NVIDIA RTX A1000") is None
    assert budget.peak_flops("NVIDIA L40") is None
    assert budget.peak_flops("NVIDIA A10G") == 70e12
    assert budget.peak_flops("NVIDIA GeForce RTX 4090") == 165e12
    assert budget.peak_flops("NVIDIA H100 80GB HBM3 MIG 1g.10gb") is None


def test_cards_of_one_name_differ_by_their_memory() -> None:
    assert gpus.named_by("NVIDIA A100-SXM4-40GB") == gpus.gpu("a100-40g")
    assert gpus.named_by("NVIDIA A100-SXM4-80GB") == gpus.gpu("A100-80G")
    assert gpus.here("NVIDIA H100 80GB HBM3", 7).memory == 7
    assert gpus.here("NVIDIA H100 80GB HBM3", 7).peak == 989e12
    assert gpus.here("some other card", 7) == gpus.Gpu("some other card", 7)


def test_an_unknown_gpu_is_refused_with_the_closest_first() -> None:
    with pytest.raises(UserError, match="the GPUs are h100-80g, "):
        gpus.gpu("h100-80gb")
    with pytest.raises(UserError, match="the GPUs are h100-"):
        gpus.gpu("h100")
