"""Advantages against closed forms and a naive reference; the clipped objective by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from worldmpc.on_policy import gae, ppo_terms
from worldmpc.types import RolloutBatch

GAMMA, LAM = 0.9, 0.8


def column(*values):
    return torch.tensor(values, dtype=torch.float64)[:, None]


def naive(reward, value, next_value, terminated, done, discount, lam):
    """The definition, one environment and start at a time: sum of (discount lam)^k delta up to the end of the episode."""
    steps, envs = reward.shape
    result = torch.zeros_like(reward)
    for env in range(envs):
        for start in range(steps):
            for step in range(start, steps):
                bootstrap = 0.0 if terminated[step, env] else discount * next_value[step, env]
                delta = reward[step, env] + bootstrap - value[step, env]
                result[start, env] += (discount * lam) ** (step - start) * delta
                if done[step, env]:
                    break
    return result


def test_running_episode_bootstraps_from_what_followed_the_last_step():
    found = gae(column(1, 2), column(0.5, 0.25), column(0.25, 4), column(0, 0), column(0, 0), GAMMA, LAM)
    last = 2 + 0.9 * 4 - 0.25
    assert torch.allclose(found, column(1 + 0.9 * 0.25 - 0.5 + 0.72 * last, last))


def test_termination_cuts_the_value_and_truncation_does_not():
    arguments = column(1, 2), column(0.5, 0.25), column(0.25, 4)
    terminated = gae(*arguments, column(0, 1), column(0, 1), GAMMA, LAM)
    truncated = gae(*arguments, column(0, 0), column(0, 1), GAMMA, LAM)
    assert torch.allclose(terminated[1], torch.tensor(2 - 0.25, dtype=torch.float64))
    assert torch.allclose(truncated[1], torch.tensor(2 + 0.9 * 4 - 0.25, dtype=torch.float64))


def test_nothing_crosses_the_end_of_an_episode():
    """Rewards of the next episode do not reach the one before, whichever way it ended."""
    flags = column(0, 1, 0)
    for terminated in (flags, 0 * flags):
        one = gae(column(1, 1, 1), column(0, 0, 0), column(2, 2, 2), terminated, flags, GAMMA, LAM)
        two = gae(column(1, 1, 99), column(0, 0, 7), column(2, 2, -5), terminated, flags, GAMMA, LAM)
        assert torch.equal(one[:2], two[:2]) and not torch.equal(one[2], two[2])


@given(st.integers(1, 9), st.integers(1, 4), st.floats(0, 0.999), st.floats(0, 1), st.integers(0, 2**31))
def test_equals_the_naive_sum(steps, envs, discount, lam, seed):
    generator = torch.Generator().manual_seed(seed)
    reward, value, next_value = torch.randn(3, steps, envs, dtype=torch.float64, generator=generator)
    ends = torch.rand(steps, envs, generator=generator)
    terminated, done = (ends < 0.2).double(), (ends < 0.4).double()
    arguments = reward, value, next_value, terminated, done, discount, lam
    assert torch.allclose(gae(*arguments), naive(*arguments))


def test_limits_of_lambda():
    reward, value = torch.rand(2, 6, 2)
    following, zero = torch.cat((value[1:], torch.rand(1, 2))), torch.zeros(6, 2)
    assert torch.allclose(gae(reward, value, following, zero, zero, GAMMA, 0.0), reward + GAMMA * following - value)
    returns = following[-1]
    for step in reversed(range(6)):
        returns = reward[step] + GAMMA * returns
    assert torch.allclose(gae(reward, value, following, zero, zero, GAMMA, 1.0)[0] + value[0], returns, atol=1e-6)


def batch(log_prob, advantage, value=(0.0,), returns=(0.0,)):
    size = len(advantage)
    parts = (torch.tensor(part, dtype=torch.float64).expand(size) for part in (log_prob, (0.0,), value, advantage, returns))
    return RolloutBatch(torch.zeros(size, 1), torch.zeros(size, 1), *parts)


def terms(ratio, given_batch, value=None, entropy=None, **changes):
    size = len(given_batch.reward)
    log_prob = torch.tensor(ratio, dtype=torch.float64).log() + given_batch.log_prob
    fixed = {"clip_coef": 0.2, "vf_coef": 0.5, "ent_coef": 0.01, "norm_adv": False}
    value = torch.zeros(size, dtype=torch.float64) if value is None else value
    entropy = torch.zeros(size, dtype=torch.float64) if entropy is None else entropy
    return ppo_terms(log_prob, entropy, value, given_batch, **(fixed | changes))


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [(1.1, 2.0, -2.2), (1.5, 2.0, -2.4), (0.5, 2.0, -1.0), (0.5, -2.0, 1.6), (0.9, -2.0, 1.8), (1.5, -2.0, 3.0)],
)
def test_clipped_surrogate(ratio, advantage, expected):
    """Only what would go on improving beyond the clip is clipped."""
    assert math.isclose(float(terms([ratio], batch((0.3,), (advantage,)))["policy_loss"]), expected)


def test_no_gradient_beyond_the_clip():
    for ratio, advantage, flat in ((1.5, 1.0, True), (1.5, -1.0, False), (0.5, -1.0, True), (0.5, 1.0, False)):
        log_prob = torch.tensor([math.log(ratio)], requires_grad=True)
        loss = ppo_terms(
            log_prob, torch.zeros(1), torch.zeros(1), batch((0.0,), (advantage,)), clip_coef=0.2, vf_coef=0.0, ent_coef=0.0, norm_adv=False
        )
        (gradient,) = torch.autograd.grad(loss["total_loss"], log_prob)
        assert bool(gradient == 0) is flat


def test_value_loss_and_its_clip():
    given_batch = batch((0.0,), (0.0, 0.0), value=(1.0,), returns=(3.0,))
    value = torch.tensor([1.5, 2.9], dtype=torch.float64)
    free = terms([1.0, 1.0], given_batch, value)["value_loss"]
    clipped = terms([1.0, 1.0], given_batch, value, vf_clip_coef=0.2)["value_loss"]
    assert math.isclose(float(free), 0.5 * (1.5**2 + 0.1**2) / 2)
    assert math.isclose(float(clipped), 0.5 * (1.8**2 + 1.8**2) / 2)


def test_terms_add_up():
    entropy = torch.tensor([0.3, 0.5], dtype=torch.float64)
    found = terms([1.0, 1.3], batch((0.2,), (1.0, -1.0), (0.5,), (1.0,)), entropy=entropy)
    assert math.isclose(float(found["entropy_loss"]), -0.4)
    assert torch.allclose(found["total_loss"], found["policy_loss"] + 0.5 * found["value_loss"] + 0.01 * found["entropy_loss"])
    assert math.isclose(float(found["clipfrac"]), 0.5)
    assert math.isclose(float(found["approx_kl"]), (0.3 - math.log(1.3)) / 2)


def test_advantages_are_standardised_on_request():
    """Then neither their scale nor their mean matters; equal ones teach nothing."""
    one, two = (terms([0.9, 1.1, 1.0], batch((0.0,), part), norm_adv=True)["policy_loss"] for part in ((1.0, 2.0, 4.0), (12.0, 22.0, 42.0)))
    assert torch.allclose(one, two)
    assert float(terms([0.9, 1.1], batch((0.0,), (5.0, 5.0)), norm_adv=True)["policy_loss"]) == 0.0
    assert math.isfinite(float(terms([1.1], batch((0.0,), (5.0,)), norm_adv=True)["policy_loss"]))
