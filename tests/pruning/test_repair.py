"""Least squares against numpy's, and what the ridge does."""

import numpy as np
import pytest
import torch
from torch import nn

from pruning.repair import refit, with_bias
from pruning.statistics import Energies, Influence, Moments, token_weights

CPU = torch.device("cpu")


def case(bias: bool, tokens: int = 400) -> tuple[nn.Linear, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A layer, units of very different scales, targets and weights."""
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(6, 4, bias=bias).requires_grad_(False)
    units = torch.randn(tokens, 6, generator=generator) * torch.tensor([1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0])
    units[:, 1] += units[:, 2]
    targets, weights = torch.randn(tokens, 4, generator=generator), torch.rand(tokens, 1, generator=generator) + 0.1
    return linear, units, targets, weights


def moments_of(linear: nn.Linear, units: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> Moments:
    moments = Moments(linear.in_features + (linear.bias is not None), linear.out_features, CPU)
    for part in zip(units.split(64), targets.split(64), weights.split(64), strict=True):
        moments.add(with_bias(part[0], linear), *part[1:])
    return moments


@pytest.mark.parametrize("bias", [False, True])
def test_without_a_ridge_it_is_weighted_least_squares(bias: bool) -> None:
    linear, units, targets, weights = case(bias)
    refit(linear, moments_of(linear, units, targets, weights), ridge=0.0)
    root = weights.sqrt().double()
    expected = np.linalg.lstsq((with_bias(units, linear) * root).numpy(), (targets * root).numpy(), rcond=None)[0].T
    found = linear.weight if not bias else torch.cat([linear.weight, linear.bias[:, None]], 1)
    errors = []
    for solution in (torch.tensor(expected).float(), found):
        left = targets - with_bias(units, linear) @ solution.T
        errors.append(float((left.square() * weights).sum()))
    assert errors[1] == pytest.approx(errors[0], rel=1e-5)
    np.testing.assert_allclose(found, expected, rtol=2e-2, atol=1e-3)


def test_a_ridge_is_drawn_to_the_weights_that_were_there() -> None:
    linear, units, targets, weights = case(bias=False)
    before = linear.weight.clone()
    refit(linear, moments_of(linear, units, targets, weights), ridge=1e12)
    torch.testing.assert_close(linear.weight, before, rtol=1e-4, atol=1e-4)


def test_weights_that_fit_stay() -> None:
    linear, units, _, weights = case(bias=True)
    before = linear(units)
    refit(linear, moments_of(linear, units, before, weights))
    torch.testing.assert_close(linear(units), before, rtol=1e-4, atol=1e-4)


def test_a_unit_that_is_always_zero_keeps_its_column() -> None:
    linear, units, targets, weights = case(bias=False)
    units[:, 3] = 0
    before = linear.weight.clone()
    refit(linear, moments_of(linear, units, targets, weights))
    assert torch.equal(linear.weight[:, 3], before[:, 3])
    assert linear.weight.isfinite().all()


def test_energies_are_what_units_add() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, units = torch.randn(5, 12, generator=generator), torch.randn(30, 12, generator=generator)
    weights = torch.rand(30, 1, generator=generator)
    for group in (1, 4):
        energies = Energies(weight, group)
        for part in zip(units.split(7), weights.split(7), strict=True):
            energies.add(*part)
        for number, found in enumerate(energies.sums):
            columns = slice(number * group, (number + 1) * group)
            added = units[:, columns] @ weight[:, columns].T
            assert found == pytest.approx(((added.square().sum(1, keepdim=True)) * weights).sum().item(), rel=1e-4)


def test_energies_count_directions_for_what_is_felt_of_them() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, units = torch.randn(5, 12, generator=generator), torch.randn(30, 12, generator=generator)
    root = torch.randn(5, 5, generator=generator)
    weights = torch.rand(30, 1, generator=generator)
    for group in (1, 4):
        seen, expected = Energies(weight, group, root.T @ root), Energies(root @ weight, group)
        for energies in (seen, expected):
            energies.add(units, weights)
        torch.testing.assert_close(seen.sums, expected.sums)


def test_influence_and_weights() -> None:
    hidden = torch.tensor([[[3.0, 4.0], [0.0, 2.0]]])
    influence = Influence()
    influence.add(hidden, 2 * hidden)
    influence.add(hidden[:, :1], torch.tensor([[[-4.0, 3.0]]]))
    assert influence.mean == pytest.approx(1 / 3)
    torch.testing.assert_close(token_weights(hidden), torch.tensor([[1 / 12.5], [1 / 2.0]]))
    assert token_weights(torch.zeros(1, 1, 2)).isfinite().all()
