"""The CUDA paths against the CPU's; collected only where there is a GPU (tests/conftest.py)."""

from dataclasses import replace

import torch

from models.attention import attend, documents_of
from models.transformer import Transformer
from tests.models.test_attention import queries_keys_values
from tests.models.test_transformer import CONFIG, POSITIONS, shifted, tokens


def test_flex_attention_on_a_gpu_is_masked_attention() -> None:
    positions = torch.arange(256).remainder(100).repeat(2, 1)
    ours, reference = queries_keys_values(256, "cuda"), queries_keys_values(256)
    on_gpu = attend(*ours, documents_of(positions.cuda()))
    on_cpu = attend(*reference, documents_of(positions))
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=0, atol=5e-3)  # its products are in TF32
    on_gpu.square().sum().backward()
    on_cpu.square().sum().backward()
    for x, y in zip(ours, reference, strict=True):
        torch.testing.assert_close(x.grad.cpu(), y.grad, rtol=0, atol=2e-2)


def test_loss_on_a_gpu_is_the_loss_on_a_cpu() -> None:
    model, row = Transformer(replace(CONFIG, head_width=16)), tokens(2, 10)  # flex attention takes no narrower heads
    expected, _ = model(row, POSITIONS, shifted(row, POSITIONS))
    on_gpu, _ = model.cuda()(row.cuda(), POSITIONS.cuda(), shifted(row, POSITIONS).cuda())
    torch.testing.assert_close(on_gpu.cpu(), expected, rtol=1e-3, atol=0)
