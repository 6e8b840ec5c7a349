"""Distributions against PyTorch's, sampling by noise, initial weights."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from worldmpc.models.actor_critic import ActorCritic, Categorical, Gaussian, ImageEncoder


def gaussian():
    return Gaussian(torch.randn(5, 3), torch.randn(3))


def categorical(logits=None):
    return Categorical(torch.log_softmax(torch.randn(5, 4) if logits is None else logits, -1))


def test_gaussian_equals_the_textbook():
    ours = gaussian()
    theirs = torch.distributions.Normal(ours.mean, ours.log_std.exp())
    action = ours.sample(torch.randn(5, 3))
    assert torch.allclose(ours.log_prob(action), theirs.log_prob(action).sum(-1), atol=1e-5)
    assert torch.allclose(ours.entropy(), theirs.entropy().sum(-1), atol=1e-5)
    assert torch.equal(ours.sample(torch.zeros(5, 3)), ours.mode)


def test_categorical_equals_the_textbook():
    ours = categorical()
    theirs = torch.distributions.OneHotCategorical(logits=ours.log_probs)
    action = ours.sample(torch.randn(5, 4))
    assert torch.allclose(ours.log_prob(action), theirs.log_prob(action)) and torch.allclose(ours.entropy(), theirs.entropy())
    assert torch.equal(action.sum(-1), torch.ones(5)) and set(action.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(ours.mode.argmax(-1), ours.log_probs.argmax(-1))


def test_choices_are_sampled_as_often_as_they_are_likely():
    logits = torch.tensor([2.0, 0.0, -1.0, 0.5])
    count = 200_000
    found = categorical(logits.expand(count, 4)).sample(torch.randn(count, 4)).mean(0)
    expected = logits.softmax(-1)
    assert bool(((found - expected).abs() < 5 * (expected * (1 - expected) / count).sqrt()).all())


def test_sampling_survives_extreme_noise():
    for eps in (-6.0, 6.0):
        action = categorical().sample(torch.full((5, 4), eps))
        assert torch.equal(action.sum(-1), torch.ones(5))


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("lead", [(), (7,), (2, 3)])
def test_shapes(discrete, lead):
    policy = ActorCritic(5, 4, (16,), discrete)
    obs, eps = torch.randn(*lead, 5), torch.randn(*lead, 4)
    action, log_prob, entropy, value, state = policy(obs, eps=eps)
    assert action.shape == (*lead, 4) and log_prob.shape == entropy.shape == value.shape == lead and state is None
    again = policy(obs, None, action)
    assert again[0] is action and torch.equal(again[1], log_prob)
    assert torch.equal(policy(obs)[0], policy.distribution(obs).mode) and torch.equal(policy.value(obs), value)


def test_nothing_is_drawn_from_the_global_stream():
    before = torch.get_rng_state()
    policy = ActorCritic(5, 4, (16,), True)
    policy(torch.zeros(2, 5))
    policy(torch.zeros(2, 5), eps=torch.zeros(2, 4))
    assert torch.equal(before, torch.get_rng_state())


def test_initial_weights():
    policy = ActorCritic(5, 4, (16, 16), log_std_init=-0.7, seed=3)
    linears = [layer for layer in policy.policy_net if isinstance(layer, nn.Linear)]
    for layer, gain in zip(linears, (math.sqrt(2), math.sqrt(2), 0.01), strict=True):
        small = layer.weight if layer.weight.shape[0] <= layer.weight.shape[1] else layer.weight.T
        assert torch.allclose(small @ small.T, gain**2 * torch.eye(len(small)), atol=1e-5) and not layer.bias.any()
    assert policy.log_std is not None and torch.allclose(policy.log_std, torch.tensor(-0.7))
    assert policy.distribution(torch.randn(100, 5)).mode.abs().max() < 0.1
    same, other = ActorCritic(5, 4, (16, 16), seed=3), ActorCritic(5, 4, (16, 16), seed=4)
    assert torch.equal(same.value_net[0].weight, policy.value_net[0].weight)
    assert not torch.equal(other.value_net[0].weight, policy.value_net[0].weight)


def test_policy_and_value_share_nothing():
    policy = ActorCritic(5, 4, (16,))
    policy.value(torch.randn(3, 5)).sum().backward()
    assert all(parameter.grad is None for parameter in [*policy.policy_net.parameters(), policy.log_std])


@pytest.mark.parametrize("shape", [(3, 11, 11), (1, 8, 9)])
def test_images(shape):
    encoder = ImageEncoder(shape, features=32)
    policy = ActorCritic(32, 4, (16,), True, encoder=encoder)
    obs = torch.randint(0, 256, (6, 2, *shape), dtype=torch.uint8)
    action, log_prob, _, value, _ = policy(obs, eps=torch.randn(6, 2, 4))
    assert action.shape == (6, 2, 4) and value.shape == (6, 2)
    (log_prob.sum() + value.sum()).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in policy.parameters())
    assert torch.allclose(policy.value(obs[2, 1]), value[2, 1], atol=1e-6)
