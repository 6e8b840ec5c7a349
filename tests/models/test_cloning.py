"""Cloned policies: their densities, samples and means, and that they learn what has two modes."""

from __future__ import annotations

import math

import pytest
import torch

from worldmpc.models.cloning import Clone, build_decoy, decoy_meta


def flat(clone: Clone, logits: torch.Tensor) -> Clone:
    """Make a clone say the same everywhere."""
    last = clone.net[-1]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(logits.flatten())
    return clone


def test_the_density_of_box_actions_integrates_to_1():
    clone = Clone(3, 1, (8,), bins=5)
    grid = torch.linspace(-1, 1, 20_001)[:-1] + 1e-4 / 2
    density = clone.log_prob(torch.randn(3).expand(20_000, 3), grid[:, None]).exp()
    assert float(density.detach().mean() * 2) == pytest.approx(1.0, abs=1e-3)


def test_equal_bins_are_the_uniform_density():
    clone = flat(Clone(3, 4, (8,)), torch.zeros(4, 15))
    assert torch.allclose(clone.log_prob(torch.randn(6, 3), torch.rand(6, 4) * 2 - 1), torch.tensor(-4 * math.log(2)))


def test_bounds_are_in_the_outermost_bins_and_samples_reach_them():
    clone = Clone(3, 1, (8,), bins=5)
    assert clone.nearest(torch.tensor([-1.0, -0.61, -0.59, 0.0, 0.99, 1.0, 3.0])).tolist() == [0, 0, 1, 2, 4, 4, 4]
    flat(clone, torch.tensor([0.0, -99, -99, -99, 0.0]))
    drawn = clone.sample(torch.zeros(100, 3), torch.rand(100, 1))
    assert set(drawn.flatten().tolist()) == {-1.0, 1.0}
    assert torch.allclose(clone.mean(torch.zeros(3)), torch.zeros(1), atol=1e-6)


def test_samples_follow_the_probabilities():
    probs = torch.tensor([[0.1, 0.2, 0.7], [0.5, 0.5, 0.0]])
    clone = flat(Clone(2, 2, (4,), bins=3), (probs + 1e-12).log())
    drawn = clone.sample(torch.zeros(20_000, 2), torch.rand(20_000, 2))
    found = torch.stack([(drawn == centre).float().mean(0) for centre in (-1.0, 0.0, 1.0)], -1)
    assert torch.allclose(found, probs, atol=0.015)
    assert torch.allclose(clone.mean(torch.zeros(2)), torch.tensor([0.6, -0.5]), atol=1e-5)


def test_choices_are_one_hot_and_follow_the_probabilities():
    probs = torch.tensor([0.2, 0.3, 0.5])
    clone = flat(Clone(2, 3, (4,), discrete=True), probs.log())
    drawn = clone.sample(torch.zeros(20_000, 2), torch.rand(20_000, 3))
    assert torch.equal(drawn.sum(-1), torch.ones(20_000))
    assert torch.allclose(drawn.mean(0), probs, atol=0.015)
    assert clone.mean(torch.zeros(2)).tolist() == [0.0, 0.0, 1.0]
    assert float(clone.log_prob(torch.zeros(2), torch.tensor([0.0, 1.0, 0.0]))) == pytest.approx(math.log(0.3), abs=1e-5)


def test_two_modes_are_learned_where_a_mean_says_nothing():
    clone = Clone(1, 1, (32,))
    optimizer = torch.optim.Adam(clone.parameters(), 1e-2)
    for _ in range(150):
        x = torch.rand(128, 1) * 2 - 1
        action = torch.where(torch.rand(128, 1) < 0.5, 1.0, -1.0) * (x > 0) + 0.5 * (x <= 0)
        loss = -clone.log_prob(x, action).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    best = 0.5 * (math.log(15 / 2) + math.log(0.5 * 15 / 2))  # half of the time certain of a bin, half of the time of one of two
    assert -float(loss.detach()) > best - 0.15
    drawn = clone.sample(torch.full((200, 1), 0.5), torch.rand(200, 1))
    assert float((drawn.abs() > 0.9).float().mean()) > 0.95


def test_a_decoy_is_rebuilt_from_what_it_says_about_itself():
    clone = Clone(18, 4, (16, 16))
    again = build_decoy(decoy_meta(clone)["architecture"], clone.state_dict())
    x = torch.randn(5, 18)
    assert torch.equal(again.logits(x), clone.logits(x)) and not any(parameter.requires_grad for parameter in again.parameters())
