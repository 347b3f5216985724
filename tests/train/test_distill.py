"""Distillation against its formula."""

import pytest
import torch
import torch.nn.functional as F

from models.sizes import ModelConfig
from models.transformer import IGNORE, Transformer
from train import distill
from train.distill import Distillation

CONFIG = ModelConfig(2, 32, 4, 2, 8, 48, 61, 64, tied=False, qk_norm=True)
TOKENS = torch.randint(61, (2, 10), generator=torch.Generator().manual_seed(1))
POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 0, 1], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]])
TARGETS = TOKENS.roll(-1, 1).masked_fill(POSITIONS < 2, IGNORE)
BATCH = {"inputs": TOKENS, "positions": POSITIONS, "targets": TARGETS}


def models(**changes: int) -> tuple[Transformer, Transformer]:
    teacher = Transformer(ModelConfig(**{**vars(CONFIG), "width": 64, "heads": 8, **changes}), seed=1)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(3)  # an opinion
    return Transformer(CONFIG, seed=0), teacher.eval().requires_grad_(False)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("vocab", [61, 70])
@pytest.mark.parametrize("logits", [2**18, 3 * 61])
def test_the_loss_is_the_formula(temperature: float, vocab: int, logits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distill, "LOGITS_AT_ONCE", logits)
    student, teacher = models(vocab=vocab)
    loss, nll = Distillation(teacher, 0.3, temperature)(student, BATCH)
    chosen = TARGETS != IGNORE
    ours, theirs = student(TOKENS, POSITIONS)[chosen], teacher(TOKENS, POSITIONS)[chosen][:, :61]
    labels = F.cross_entropy(ours, TARGETS[chosen], reduction="sum")
    p = (theirs / temperature).softmax(-1)
    divergence = (p * (p.log() - (ours / temperature).softmax(-1).log())).sum()
    expected = 0.7 * labels + 0.3 * temperature**2 * divergence
    assert nll.item() == pytest.approx(labels.item(), rel=1e-6)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    (expected_gradient,) = torch.autograd.grad(expected, student.head.weight)
    loss.backward()
    torch.testing.assert_close(student.head.weight.grad, expected_gradient, rtol=1e-4, atol=1e-6)


def test_a_model_does_not_diverge_from_itself() -> None:
    student, _ = models()
    assert Distillation(student, 0.5, 1.0).figures(student, BATCH)[1].item() == pytest.approx(0, abs=1e-5)


def test_the_divergence_falls() -> None:
    student, teacher = models()
    objective = Distillation(teacher, 1.0, 2.0)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    before = objective.figures(student, BATCH)[1].item()
    for _ in range(20):
        objective(student, BATCH)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    after = objective.figures(student, BATCH)[1].item()
    print(f"KL {before:.3f} → {after:.3f}")
    assert after < before / 2
