"""Scores by weights, and which units they keep."""

import torch

from pruning.blocks import GATED, PHI
from pruning.cut import Kept, cut
from pruning.importance import Scores, best, by_chance, by_weights, least_influential
from pruning.shapes import Shape

SHAPE = Shape(layers=2, ffn=4, heads=4, kv_heads=2, vocab=8)


def test_a_key_value_head_goes_with_its_query_heads() -> None:
    scores = Scores(torch.tensor([1.0, 4.0, 2.0, 3.0]), torch.tensor([9.0, 1.0, 5.0, 6.0]), torch.tensor([0.0, 0.0]))
    assert best(scores, SHAPE, Shape(2, 2, 2, 1, 8)) == Kept([1, 3], [2, 3], [1])  # 11 against 10
    assert best(scores, SHAPE, Shape(2, 4, 2, 2, 8)) == Kept([0, 1, 2, 3], [0, 3], [0, 1])
    assert best(scores, SHAPE, Shape(2, 1, 1, 1, 8)) == Kept([1], [3], [1])
    own = Scores(scores.ffn, scores.heads, torch.tensor([2.0, 0.0]))
    assert best(own, SHAPE, Shape(2, 4, 2, 1, 8)).kv_heads == [0]  # its own weights count too


def gated_tensors(head_width: int = 2, width: int = 6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = {"q_proj": 4 * head_width, "k_proj": 2 * head_width, "v_proj": 2 * head_width}
    shapes = {f"self_attn.{name}.weight": (count, width) for name, count in rows.items()}
    shapes |= {f"self_attn.{name}.bias": (count,) for name, count in rows.items()}
    shapes |= {"self_attn.o_proj.weight": (width, 4 * head_width), "input_layernorm.weight": (width,)}
    shapes |= {"mlp.gate_proj.weight": (4, width), "mlp.up_proj.weight": (4, width), "mlp.down_proj.weight": (width, 4)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_l1_adds_up_all_weights_of_a_unit() -> None:
    tensors = gated_tensors()
    found = by_weights(tensors, GATED, SHAPE, lambda name, tensor: tensor.abs())
    size = {name: tensor.abs() for name, tensor in tensors.items()}
    mlp = size["mlp.gate_proj.weight"][3].sum() + size["mlp.up_proj.weight"][3].sum()
    torch.testing.assert_close(found.ffn[3], mlp + size["mlp.down_proj.weight"][:, 3].sum())
    head = size["self_attn.q_proj.weight"][2:4].sum() + size["self_attn.q_proj.bias"][2:4].sum()
    torch.testing.assert_close(found.heads[1], head + size["self_attn.o_proj.weight"][:, 2:4].sum())
    keys = sum(size[f"self_attn.{name}_proj.{kind}"][2:].sum() for name in "kv" for kind in ("weight", "bias"))
    torch.testing.assert_close(found.kv_heads[1], keys)


def test_cut_takes_rows_columns_and_biases() -> None:
    tensors = gated_tensors()
    small = cut(tensors, GATED, Kept([0, 2], [2, 3], [1]), head_width=2)
    assert torch.equal(small["self_attn.q_proj.bias"], tensors["self_attn.q_proj.bias"][4:])
    assert torch.equal(small["self_attn.v_proj.weight"], tensors["self_attn.v_proj.weight"][2:])
    assert torch.equal(small["self_attn.o_proj.weight"], tensors["self_attn.o_proj.weight"][:, 4:])
    assert torch.equal(small["mlp.up_proj.weight"], tensors["mlp.up_proj.weight"][[0, 2]])
    assert torch.equal(small["mlp.down_proj.weight"], tensors["mlp.down_proj.weight"][:, [0, 2]])
    assert torch.equal(small["input_layernorm.weight"], tensors["input_layernorm.weight"])


def test_the_bias_of_what_reads_the_units_stays_whole() -> None:
    tensors = {"mlp.fc2.weight": torch.randn(6, 4), "mlp.fc2.bias": torch.randn(6)}
    small = cut(tensors, PHI, Kept([1], [0], [0]), head_width=2)
    assert {name: tuple(tensor.shape) for name, tensor in small.items()} == {
        "mlp.fc2.weight": (6, 1),
        "mlp.fc2.bias": (6,),
    }


def test_chance_is_by_the_seed_and_depth_by_influence() -> None:
    one, other = (by_chance(SHAPE, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one.ffn, other.ffn)
    assert least_influential([0.5, 0.1, 0.3, 0.2], 2) == [1, 3]
