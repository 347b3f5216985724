"""The default learning rate serves every width: a coordinate check (Yang et al., arXiv:2203.03466, appendix D.1)."""

from collections.abc import Callable

import torch

from models.sizes import ModelConfig
from models.transformer import Transformer
from train.optimizer import make_optimizers
from train.settings import OptimizerSettings, TrainSettings, resolve

WIDTHS = (64, 128, 256)
STEPS = 6
VOCAB, ROWS, T = 256, 16, 32


def shape(width: int) -> ModelConfig:
    return ModelConfig(2, width, width // 32, width // 64, 32, width * 8 // 3 // 32 * 32, VOCAB, T, True, True)


def text() -> torch.Tensor:
    """Rows in which every other token follows from the one before it."""
    tokens = torch.randint(VOCAB, (ROWS, T + 1), generator=torch.Generator().manual_seed(1))
    tokens[:, 1::2] = (tokens[:, 0:-1:2] * 7 + 3) % VOCAB
    return tokens


def sizes_after(width: int, settings: OptimizerSettings) -> dict[str, float]:
    """Root mean square of the residual stream after each block, and of the logits, after some steps."""
    model, tokens = Transformer(shape(width), seed=0), text()
    optimizers = make_optimizers(model, settings, "32")
    for _ in range(STEPS):
        loss, _ = model(tokens[:, :-1], None, tokens[:, 1:])
        (loss / (ROWS * T)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    seen: dict[str, float] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, given, made: seen.__setitem__(name, made.square().mean().sqrt().item())

    for name, module in (*model.blocks.named_children(), ("head", model.head)):
        module.register_forward_hook(keep(name))
    with torch.no_grad():
        model(tokens[:, :-1])
    return seen


def spread(settings: Callable[[int], OptimizerSettings]) -> float:
    """The largest factor between two widths in any of the sizes."""
    found = [sizes_after(width, settings(width)) for width in WIDTHS]
    print([{name: round(value, 3) for name, value in one.items()} for one in found])
    return max(max(one[name] for one in found) / min(one[name] for one in found) for name in found[0])


def test_activations_are_as_large_at_any_width() -> None:
    assert spread(lambda width: resolve(TrainSettings(), shape(width)).optimizer) < 1.5


def test_they_are_not_at_one_rate_of_adamw() -> None:
    assert spread(lambda width: OptimizerSettings(name="adamw", lr=4e-3, beta2=0.95)) > 4
