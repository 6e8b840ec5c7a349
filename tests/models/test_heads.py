"""Two-hot scalars and the squashed Gaussian."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from worldmpc.models.heads import split_gaussian, squashed_gaussian
from worldmpc.models.two_hot import TwoHot, symexp, symlog


@given(st.floats(-20000, 20000))
@settings(deadline=None)
def test_symexp_inverts_symlog(x):
    value = torch.tensor(x, dtype=torch.float64)
    assert_close(symexp(symlog(value)), value, rtol=1e-9, atol=1e-9)


@given(st.floats(-20000, 20000), st.integers(3, 101))
@settings(deadline=None)
def test_two_hot_is_a_distribution_with_the_right_mean(x, num_bins):
    head = TwoHot(num_bins)
    target = head.encode(torch.tensor([x]))
    assert target.shape == (1, num_bins) and (target >= 0).all() and (target > 0).sum() <= 2
    assert_close(target.sum(), torch.tensor(1.0))
    assert_close((target @ head.bins)[0], symlog(torch.tensor(x)).clamp(-10, 10), rtol=1e-4, atol=1e-4)


def test_decode_inverts_encode():
    head, x = TwoHot(), torch.linspace(-300, 300, 77)
    assert_close(head.decode(head.encode(x).clamp(min=1e-30).log()), x, rtol=1e-3, atol=1e-4)


def test_uniform_logits_mean_zero():
    assert_close(TwoHot().decode(torch.zeros(3, 101)), torch.zeros(3), rtol=0, atol=1e-5)


def test_loss_is_the_cross_entropy_and_broadcasts_over_critics():
    head, logits, x = TwoHot(), torch.randn(4, 6, 101), torch.randn(6) * 50
    expected = -(head.encode(x) * logits.log_softmax(-1)).sum(-1)
    assert_close(head.loss(logits, x), expected)
    assert (head.loss(head.encode(x).clamp(min=1e-6).log(), x) < head.loss(logits, x).amin(0)).all()


def test_values_beyond_the_bins_saturate():
    head = TwoHot()
    for x in (1e9, math.inf):
        assert head.encode(torch.tensor([x, -x]))[0, -1] == 1 and head.encode(torch.tensor([x, -x]))[1, 0] == 1


def test_log_density_integrates_to_one():
    raw = torch.tensor([[0.3, 0.2]], dtype=torch.float64)  # mean, unbounded log std of one action dimension
    mean, log_std = split_gaussian(raw, -2, 1)
    actions = torch.linspace(-0.9999, 0.9999, 20001, dtype=torch.float64)
    eps = ((torch.atanh(actions) - mean[0]) / log_std[0].exp())[:, None]
    sample = squashed_gaussian(raw.expand(len(eps), -1), eps, -2, 1)
    assert_close(sample.action.squeeze(-1), actions)
    assert torch.trapezoid(sample.log_prob.exp(), actions) == pytest.approx(1, abs=2e-3)


def test_scaled_entropy_gradient_reaches_log_std_alone():
    raw = torch.randn(5, 6, requires_grad=True)
    sample = squashed_gaussian(raw, torch.randn(5, 3), -10, 2)
    gradient = torch.autograd.grad(sample.scaled_entropy.sum(), raw)[0]
    assert gradient[:, :3].abs().max() < 1e-3 * gradient[:, 3:].abs().max()


def test_bounds_of_log_std():
    log_std = split_gaussian(torch.tensor([[0.0, -1e3], [0.0, 1e3]]), -10, 2)[1]
    assert_close(log_std.flatten(), torch.tensor([-10.0, 2.0]))
