"""Samples have the distribution that the parameters say, and refits are weighted moments."""

import pytest
import torch
from torch.testing import assert_close

from worldmpc.planners.distributions import Categorical, Gaussian

MANY = 60_000


@pytest.mark.parametrize("mix", [0.0, 0.25, 1.0])
def test_categorical_samples_by_mixed_probabilities(mix):
    probs = torch.tensor([0.7, 0.25, 0.05, 0.0])
    actions = Categorical(4, mix).sample(probs, probs, torch.randn(MANY, 4))
    assert ((actions == 0) | (actions == 1)).all() and (actions.sum(-1) == 1).all()
    assert_close(actions.mean(0), (1 - mix) * probs + mix / 4, atol=0.01, rtol=0)
    assert mix or actions[:, 3].sum() == 0, "what is impossible is never sampled"


def test_uniform_samples():
    choices = Categorical(3, 0.5).uniform(torch.randn(MANY, 3))
    assert_close(choices.mean(0), torch.full((3,), 1 / 3), atol=0.01, rtol=0)
    actions = Gaussian(0.1, 1.0).uniform(torch.randn(MANY, 1))
    assert actions.abs().max() <= 1
    assert_close(actions.var(), torch.tensor(1 / 3), rtol=0.02, atol=0)
    assert_close(Gaussian(0.1, 1.0).uniform(torch.tensor([-1.0, 0.0, 1.0])), torch.tensor([-0.6827, 0.0, 0.6827]), atol=1e-4, rtol=0)


def test_refits_are_weighted_moments():
    weight = torch.tensor([0.5, 0.3, 0.2])[None, None, :, None]
    choices = torch.eye(3)[torch.tensor([0, 0, 2])][None, None]
    probs, std = Categorical(3, 0.1).refit(choices, weight, torch.full((1, 1, 3), 1 / 3), torch.zeros(1, 1, 3), 0.0)
    assert_close(probs[0, 0], torch.tensor([0.8, 0.0, 0.2]))
    assert_close(std[0, 0], torch.tensor([0.4, 0.0, 0.4]))
    slow = Categorical(3, 0.1).refit(choices, weight, torch.tensor([[[0.0, 1.0, 0.0]]]), torch.zeros(1, 1, 3), 0.25)[0]
    assert_close(slow[0, 0], torch.tensor([0.6, 0.25, 0.15]))
    actions = torch.tensor([1.0, 0.0, -0.5])[None, None, :, None]
    old = torch.full((1, 1, 1), -1.0), torch.full((1, 1, 1), 2.0)
    mean, std = Gaussian(0.1, 2.0).refit(actions, weight, *old, 0.0)
    assert mean.item() == pytest.approx(0.4) and std.item() == pytest.approx((0.55 - 0.16) ** 0.5)
    mean, std = Gaussian(0.1, 2.0).refit(actions, weight, *old, 0.5)
    assert mean.item() == pytest.approx(-0.3) and std.item() == pytest.approx(0.5 * 0.39**0.5 + 1)
    assert Gaussian(0.1, 0.5).refit(actions, weight, *old, 0.0)[1] == 0.5
    assert Gaussian(0.8, 0.9).refit(actions, weight, *old, 0.0)[1].item() == pytest.approx(0.8)


def test_start():
    probs, std = Categorical(4, 0.1).start(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    assert_close(probs, torch.tensor([0.625, 0.125, 0.125, 0.125]))
    assert_close(std, (probs * (1 - probs)).sqrt())
    mean, std = Gaussian(0.1, 1.5).start(torch.tensor([0.2]))
    assert mean == torch.tensor([0.2]) and std == 1.5


def test_modes():
    assert_close(Categorical(3, 0.1).mode(torch.tensor([0.2, 0.3, 0.5])), torch.tensor([0.0, 0.0, 1.0]))
    assert_close(Gaussian(0.1, 1.0).mode(torch.tensor([1.0000001, -0.4])), torch.tensor([1.0, -0.4]))
