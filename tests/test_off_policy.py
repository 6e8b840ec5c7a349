"""Targets and losses of DQN, SAC and TD3 against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import tensor
from torch.testing import assert_close

from worldmpc import off_policy
from worldmpc.types import TransitionBatch


def batch(reward, terminated, discount):
    nothing = torch.zeros(len(reward), 1)
    return TransitionBatch(nothing, nothing, tensor(reward), nothing, tensor(terminated), tensor(discount))


def test_td_target():
    """1 + 0.5 * 10; terminated: the reward alone; three steps: the weight that the batch says."""
    found = off_policy.td_target(batch([1.0, 1.0, 1.0], [0.0, 1.0, 0.0], [0.5, 0.5, 0.125]), tensor([10.0, 10.0, 8.0]))
    assert found.tolist() == [6.0, 1.0, 2.0]


def test_double_dqn_differs_from_plain():
    """The target network says (1, 5), the online one likes the first action: 1 instead of 5."""
    target, online = tensor([[1.0, 5.0]]), tensor([[3.0, 2.0]])
    assert off_policy.greedy_value(target, target).tolist() == [5.0]
    assert off_policy.greedy_value(target, online).tolist() == [1.0]


def test_chosen_reads_one_hot_actions():
    q = torch.arange(12.0).view(2, 2, 3)
    assert off_policy.chosen(q, tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])).tolist() == [[2.0, 3.0], [8.0, 9.0]]


def test_huber_loss_is_quadratic_then_linear():
    """0.5 * 0.5**2 and 3 - 0.5, mean."""
    assert off_policy.huber_loss(tensor([0.5, -3.0]), torch.zeros(2)).item() == (0.125 + 2.5) / 2


def test_critic_loss_sums_over_critics():
    """Half of (mean(1, 9) + mean(0, 4))."""
    assert off_policy.critic_loss(tensor([[2.0, 4.0], [1.0, 3.0]]), tensor([1.0, 1.0])).item() == 0.5 * (5.0 + 2.0)


@pytest.mark.parametrize(
    ("logits", "entropy"), [([0.0, 0.0, 0.0, 0.0], math.log(4)), ([60.0, 0.0, 0.0, 0.0], 0.0), ([0.0, math.log(3)], None)]
)
def test_categorical_entropy(logits, entropy):
    if entropy is None:
        entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert_close(off_policy.categorical_entropy(tensor(logits)).item(), entropy, atol=1e-6, rtol=0)


def test_expected_value_weighs_the_smaller_critic():
    """Probabilities (1/4, 3/4), smaller values (1, 2)."""
    q = tensor([[[1.0, 9.0]], [[4.0, 2.0]]])
    assert_close(off_policy.expected_value(q, tensor([[0.0, math.log(3)]])), tensor([0.25 * 1 + 0.75 * 2]))


def test_the_best_policy_is_the_softmax_of_values():
    """The gradient of the soft value is zero at softmax(Q / alpha), and there the value is alpha log sum exp(Q / alpha)."""
    q, alpha = torch.randn(2, 6, 4), tensor(0.7)
    logits = (q.amin(0) / alpha).requires_grad_()
    value = off_policy.soft_value(off_policy.expected_value(q, logits), off_policy.categorical_entropy(logits), alpha)
    assert_close(value, alpha * (q.amin(0) / alpha).logsumexp(-1))
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    assert_close(gradient, torch.zeros(6, 4), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("entropy", "direction"), [(2.0, 1), (0.0, -1), (1.0, 0)])
def test_temperature_falls_where_entropy_is_above_its_target(entropy, direction):
    alpha = tensor(0.3, requires_grad=True)
    loss = off_policy.temperature_loss(alpha, torch.full((5,), entropy), 1.0)
    (gradient,) = torch.autograd.grad(loss, alpha)
    assert gradient.sign() == direction


def test_target_entropies():
    assert off_policy.default_target_entropy(6, discrete=False) == -6.0
    assert off_policy.default_target_entropy(4, discrete=True) == 0.5 * math.log(4)


def test_target_noise_is_clipped_and_so_are_actions():
    """0.2 * (1, 10, -10) is (0.2, 0.5, -0.5) after the clip at 0.5; 0.9 + 0.5 is 1."""
    found = off_policy.smoothed_action(tensor([[0.0, 0.9, -0.2]]), tensor([[1.0, 10.0, -10.0]]), 0.2, 0.5)
    assert_close(found, tensor([[0.2, 1.0, -0.7]]))


@pytest.mark.parametrize(("decisions", "epsilon"), [(0, 1.0), (50, 0.55), (100, 0.1), (1000, 0.1)])
def test_epsilon_falls_linearly(decisions, epsilon):
    assert off_policy.exploration_epsilon(decisions, 100, 1.0, 0.1) == pytest.approx(epsilon)


def test_no_time_to_explore():
    assert off_policy.exploration_epsilon(0, 0.0, 1.0, 0.1) == 0.1
