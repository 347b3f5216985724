"""The arithmetic of costs, against hand counts on one small shape."""

from models import budget
from models.sizes import ModelConfig, size

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


def test_bytes() -> None:
    total = budget.parameters(SMALL).total
    assert budget.training_bytes(SMALL) == 16 * total
    assert budget.kv_cache_bytes(SMALL, 16) == 2 * 2 * (2 * 4) * 16 * 2
    assert budget.phone_bytes(SMALL, 16) == 2 * total + budget.kv_cache_bytes(SMALL, 16)
    assert budget.default_tokens(SMALL) == 20 * total
    one, two = (budget.activation_bytes(SMALL, rows, 16, 2) for rows in (1, 2))
    head = 4096 * 100 * 4
    assert two - head == 2 * (one - head) > 0


def test_peaks_are_found_by_the_devices_own_names() -> None:
    assert budget.peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert budget.peak_flops("NVIDIA H100 PCIe") == 756e12
    assert budget.peak_flops("NVIDIA L40S") == 362e12
    assert budget.peak_flops("NVIDIA L4") == 121e12
    assert budget.peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert budget.peak_flops("some other card") is None


def test_the_1b_fits_a_phone() -> None:
    assert budget.phone_bytes(size("1b").config, 2048) < 2.5e9


def test_names_that_only_begin_like_a_known_card_are_unknown() -> None:
    assert budget.peak_flops("NVIDIA RTX A1000") is None
    assert budget.peak_flops("NVIDIA L40") is None
    assert budget.peak_flops("NVIDIA A10G") == 125e12
    assert budget.peak_flops("NVIDIA GeForce RTX 4090") == 165e12
