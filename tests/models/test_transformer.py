"""The arithmetic of models/transformer.py, against plain PyTorch."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.sizes import ModelConfig
from models.transformer import HEAD_CHUNK, IGNORE, ChunkedCrossEntropy, Transformer, chunk_loss

CONFIG = ModelConfig(
    layers=2, width=32, heads=4, kv_heads=2, head_width=8, ffn=48, vocab=61, context=32, tied=False, qk_norm=True
)
POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 0, 1], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]])


def tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(CONFIG.vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


def shifted(tokens_BT: Tensor, positions_BT: Tensor) -> Tensor:
    """The next token of the same document, IGNORE at the end of each."""
    targets = torch.full_like(tokens_BT, IGNORE)
    inside = positions_BT[:, 1:] != 0
    targets[:, :-1][inside] = tokens_BT[:, 1:][inside]
    return targets


# Packed rows


def test_a_document_does_not_see_its_neighbours() -> None:
    model = Transformer(CONFIG).eval()
    row, others = tokens(2, 10, 1), tokens(2, 10, 2)
    others[0, 3:8] = row[0, 3:8]
    with torch.no_grad():
        packed, changed = model(row, POSITIONS), model(others, POSITIONS)
        alone = model(row[:1, 3:8])
    torch.testing.assert_close(packed[0, 3:8], changed[0, 3:8], rtol=0, atol=0)
    torch.testing.assert_close(packed[0, 3:8], alone[0], rtol=0, atol=2e-6)


def test_positions_that_start_once_are_a_plain_row() -> None:
    model = Transformer(CONFIG).eval()
    row = tokens(2, 10)
    with torch.no_grad():
        torch.testing.assert_close(model(row, POSITIONS[1:].expand(2, -1)), model(row), rtol=0, atol=2e-6)


def test_packed_loss_is_the_sum_over_documents() -> None:
    model = Transformer(CONFIG)
    row = tokens(2, 10)
    targets = shifted(row, POSITIONS)
    packed, packed_nll = model(row, POSITIONS, targets)
    documents = [(0, slice(0, 3)), (0, slice(3, 8)), (0, slice(8, 10)), (1, slice(0, 10))]
    alone = [model(row[b : b + 1, part], None, targets[b : b + 1, part])[0] for b, part in documents]
    torch.testing.assert_close(packed, torch.stack(alone).sum(), rtol=1e-6, atol=0)
    torch.testing.assert_close(packed_nll, packed.detach(), rtol=0, atol=0)


# The head and its loss


def plain_loss(hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
    logits = (hidden @ weight.T).float()
    nll = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
    return nll + z_loss * (logits.logsumexp(-1)[targets != IGNORE] ** 2).sum(), nll


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("count", [1, 16, 39])  # chunks of 16: part of one, one, two and a part
def test_chunked_loss_is_cross_entropy(monkeypatch: pytest.MonkeyPatch, count: int, z_loss: float) -> None:
    monkeypatch.setitem(HEAD_CHUNK, "cpu", 16)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(count, 8, generator=generator, dtype=torch.float64).float().requires_grad_()
    weight = torch.randn(21, 8, generator=generator).requires_grad_()
    targets = torch.randint(21, (count,), generator=generator)
    targets[1::3] = IGNORE
    loss, nll = ChunkedCrossEntropy.apply(hidden, weight, targets, z_loss, chunk_loss, True)
    gradients = torch.autograd.grad(loss / 7, (hidden, weight))
    expected, expected_nll = plain_loss(hidden, weight, targets, z_loss)
    expected_gradients = torch.autograd.grad(expected / 7, (hidden, weight))
    torch.testing.assert_close((loss, nll), (expected, expected_nll.detach()), rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-5, atol=2e-6)
    assert not nll.requires_grad


def test_no_targets_no_loss() -> None:
    model = Transformer(CONFIG)
    loss, nll = model(tokens(1, 5), None, torch.full((1, 5), IGNORE), 0.1)
    loss.backward()
    assert loss == nll == 0
    assert all((parameter.grad == 0).all() for parameter in model.parameters())


def test_loss_without_gradients_is_the_same() -> None:
    model, row = Transformer(CONFIG), tokens(2, 10)
    with torch.no_grad():
        without = model(row, None, row, 0.1)
    torch.testing.assert_close(without, model(row, None, row, 0.1), rtol=0, atol=0)


def test_tied_gradient_sums_embedding_and_head() -> None:
    config = ModelConfig(**{**vars(CONFIG), "tied": True})
    model, row = Transformer(config), tokens(2, 10)
    model(row, None, row)[0].backward()
    chunked = model.embedding.weight.grad.clone()
    model.zero_grad()
    F.cross_entropy(model(row).flatten(0, 1), row.flatten(), reduction="sum").backward()
    torch.testing.assert_close(chunked, model.embedding.weight.grad, rtol=1e-5, atol=1e-5)


def test_bf16_loss_is_near_fp32() -> None:
    model, row = Transformer(CONFIG), tokens(4, 16)
    exact, _ = model(row, None, row)
    exact.backward()
    gradient = model.head.weight.grad.clone()
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        assert model(row).dtype == torch.bfloat16
        loss, _ = model(row, None, row)
    loss.backward()
    torch.testing.assert_close(loss, exact, rtol=1e-3, atol=0)
    assert model.head.weight.grad.dtype == torch.float32
    assert (model.head.weight.grad - gradient).norm() < 0.02 * gradient.norm()


def test_gradient_is_the_slope_of_the_loss() -> None:
    model, row = Transformer(CONFIG).double(), tokens(2, 10)
    targets = shifted(row, POSITIONS)
    model(row, POSITIONS, targets, 0.1)[0].backward()
    generator = torch.Generator().manual_seed(0)
    direction = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in model.parameters()]
    slope = sum((p.grad * d).sum() for p, d in zip(model.parameters(), direction, strict=True))

    def moved(step: float) -> Tensor:
        with torch.no_grad():
            for p, d in zip(model.parameters(), direction, strict=True):
                p += step * d
            total = (
                F.cross_entropy(
                    (logits := model(row, POSITIONS)).flatten(0, 1),
                    targets.flatten(),
                    ignore_index=IGNORE,
                    reduction="sum",
                )
                + 0.1 * (logits.logsumexp(-1)[targets != IGNORE] ** 2).sum()
            )
            for p, d in zip(model.parameters(), direction, strict=True):
                p -= step * d
        return total

    measured = (moved(1e-5) - moved(-1e-5)) / 2e-5
    torch.testing.assert_close(slope, measured, rtol=1e-4, atol=0)


# Initialisation


def test_initialise_draws_what_its_table_says() -> None:
    config = ModelConfig(
        layers=8,
        width=128,
        heads=4,
        kv_heads=2,
        head_width=32,
        ffn=256,
        vocab=512,
        context=32,
        tied=False,
        qk_norm=True,
    )
    small = 0.02 / math.sqrt(2 * 8)
    expected = {"embedding": 0.02, "head": 0.02, "qkv": 0.02, "gate_up": 0.02, "out": small, "down": small}
    seen = set()
    for name, parameter in Transformer(config).named_parameters():
        kind = name.split(".")[-2]
        if "norm" in kind:
            assert (parameter == 1).all(), name
        else:
            seen.add(kind)
            assert parameter.std().item() == pytest.approx(expected[kind], rel=0.03), name
            assert abs(parameter.mean().item()) < 0.03 * expected[kind], name
    assert seen == set(expected)


def test_initial_weights_depend_on_seed_and_name_only() -> None:
    deeper = ModelConfig(**{**vars(CONFIG), "layers": 4})
    torch.manual_seed(1)
    one = Transformer(CONFIG, seed=3).state_dict()
    torch.manual_seed(2)
    same, other = Transformer(CONFIG, seed=3).state_dict(), Transformer(CONFIG, seed=4).state_dict()
    for name, value in one.items():
        assert value.equal(same[name]), name
        assert value.equal(other[name]) == ("norm" in name), name
    unscaled = "blocks.1.attention.qkv.weight"  # its std does not depend on the depth
    assert one[unscaled].equal(Transformer(deeper, seed=3).state_dict()[unscaled])
    assert not one[unscaled].equal(one["blocks.0.attention.qkv.weight"])


# Compilation


def test_eager_steps_repeat_to_the_bit() -> None:
    row = tokens(4, 10)
    results = []
    for _ in range(2):
        model = Transformer(CONFIG)
        loss, _ = model(row, POSITIONS.repeat(2, 1), row, 0.1)
        loss.backward()
        results.append([loss.detach()] + [parameter.grad for parameter in model.parameters()])
    assert all(one.equal(two) for one, two in zip(*results, strict=True))


def test_compiled_is_eager() -> None:
    config = ModelConfig(**{**vars(CONFIG), "layers": 1})
    row = tokens(2, 10)
    results = []
    for compiled in (False, True):
        model = Transformer(config)
        if compiled:
            model.compile_parts()
        loss, _ = model(row, POSITIONS, shifted(row, POSITIONS), 0.1)
        loss.backward()
        results.append([loss.detach()] + [parameter.grad for parameter in model.parameters()])
    for eager, compiled_one in zip(*results, strict=True):
        torch.testing.assert_close(compiled_one, eager, rtol=1e-5, atol=1e-5)
