"""Objectives of the policy: by hand on numbers that are known, and whom they teach in a world model."""

import dataclasses
import math
import typing

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

from worldmpc import losses
from worldmpc.agents.tdmpc2 import TDMPC2
from worldmpc.config import ConfigError, LossConfig, PlannerConfig, PolicyConfig, make_config
from worldmpc.losses.policy import gaussian_kl, plan_target
from worldmpc.types import EnvSpec, PolicySample, SequenceBatch

T, B, A = 3, 4, 2
RHO = 0.5
COEFS = losses.Coefficients(rho=RHO, entropy=0.1, tau=0.3, prior=0.7, threshold=0.0, min_std=0.2, awac_temperature=0.5)
PAIR = torch.tensor([2, 0])
NOISE = {"pi_critics": PAIR, "pi_policy": torch.zeros(T + 1, B, A)}
SCALE = torch.tensor(2.0)
LATENTS = torch.zeros(T + 1, B, 1)
OF_PLANS = ("max_q+planner_prior", "max_q+weighted_prior", "bc", "kl_to_planner")


class Known:
    """A model whose policy and critics answer with leaves that are given, whatever they are asked."""

    discrete, state_values = False, False

    def __init__(self, seed=0, spread=3.0):
        generator = torch.Generator().manual_seed(seed)

        def random(*shape):
            return torch.randn(shape, generator=generator)

        self.action = (random(T + 1, B, A) * 0.4).clamp(-1, 1).requires_grad_()
        self.mean = (random(T + 1, B, A) * 0.4).clamp(-1, 1).requires_grad_()
        self.log_std = (random(T + 1, B, A) - 1).requires_grad_()
        self.entropy = random(T + 1, B).requires_grad_()
        self.values = (spread * random(3, T + 1, B)).requires_grad_()
        self.taken = spread * random(3, T, B)
        self.log_prob = random(T, B).requires_grad_()
        self.logits = random(T + 1, B, 3).requires_grad_()
        self.choices = spread * random(3, T + 1, B, 3)
        self.sampled = None

    def policy(self, z, eps):
        assert eps is NOISE["pi_policy"]
        self.sampled, *parts = (part[: len(z)] for part in (self.action, self.mean, self.log_std, self.entropy))
        return PolicySample(self.sampled, parts[0], parts[1], parts[2] * 0 - 5, parts[2] * 0 + 5, parts[2])

    def q_values(self, z, action, critics, keep=None, frozen=False):
        """Values of the policy's actions, or of the ones that were taken."""
        assert frozen == (action is self.sampled)
        return (self.values if frozen else self.taken)[critics][:, : len(z)]

    def policy_log_prob(self, z, action):
        assert action is self.batch.action
        return self.log_prob

    def pi(self, z):
        return self.logits[: len(z)]

    def choice_values(self, z, critics):
        return self.choices[critics][:, : len(z)]

    def expected(self, values, z):
        return (torch.softmax(self.pi(z), -1) * values).sum(-1)


def windows(dims=A, seed=7, discrete=False):
    """Some steps behind an episode's end, some without a plan; actions and plans that have nothing to do with each other."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(T, B)
    mask[1:, 2], mask[2, 0] = 0, 0
    action = (torch.randn(T, B, dims, generator=generator) * 0.5).clamp(-1, 1)
    mean, std = (torch.randn(T, B, dims, generator=generator) * 0.5).clamp(-1, 1), torch.rand(T, B, dims, generator=generator) + 0.05
    if discrete:
        action = torch.eye(dims)[torch.randint(dims, (T, B), generator=generator)]
        mean = torch.softmax(2 * torch.randn(T, B, dims, generator=generator), -1)
    extras = {"plan_elite": mean.clone(), "plan_std": std, "plan_mean": mean if discrete else torch.full_like(mean, 33.0)}
    for value in (action, *extras.values()):
        value[mask == 0] = 0.0
    extras["plan_mean" if discrete else "plan_elite"][0, 1] = torch.nan  # a random decision
    extras["plan_std"][0, 1] = torch.nan
    extras["plan_std"][1, 3, 0] = torch.nan
    if discrete:
        extras["plan_mean"][2, 3] = torch.tensor([0.0, 1.0, 0.0])
    zeros = torch.zeros(T, B)
    return SequenceBatch(torch.zeros(T + 1, B, 1), action, zeros, zeros, zeros, mask, zeros.long(), extras)


UNKNOWN = {(0, 1), (1, 3)}
"""Real steps without a plan in :func:`windows`."""


def evaluate(name, model, batch, scale=SCALE, coefs=COEFS, discrete=False):
    model.discrete, model.batch = discrete, batch
    return (losses.DISCRETE if discrete else losses.BOX)[name](model, LATENTS, batch, scale, coefs, NOISE)


def moved(values, scale=2.0, tau=0.3):
    """The running 5th-to-95th percentile range after values [B]."""
    low, high = np.quantile(values.detach().double().numpy(), [0.05, 0.95])
    return (1 - tau) * scale + tau * max(high - low, 1.0)


def mean_over(term, batch, steps=T):
    """Mean over steps and windows of rho**t times a term of real steps."""
    real = torch.cat((torch.ones(1, B), batch.mask)) if steps > T else batch.mask
    return sum(RHO**t * float(torch.as_tensor(term(t, b)).detach()) for t in range(steps) for b in range(B) if real[t, b]) / (steps * B)


def log_density(model, batch, t, b, std=None):
    """Log-density of the planner at the policy's action, as published: times the number of dimensions."""
    plan, action = (batch.extras["plan_std"] if std is None else std).detach(), model.action.detach()
    total = -0.5 * math.log(2 * math.pi)
    for d in range(A):
        width = max(float(plan[t, b, d]), COEFS.min_std)
        eps = (float(action[t, b, d]) - float(batch.extras["plan_elite"][t, b, d])) / width
        total += -0.5 * eps**2 - math.log(width)
    return total * A


def max_q_term(model, scale, reduce=torch.mean):
    pair = model.values[PAIR]
    return lambda t, b: -(0.1 * model.entropy[t, b] + reduce(pair[:, t, b]) / scale)


# Box ----------------------------------------------------------------------------------------------------------------------------


def test_max_q_by_hand():
    """On all latents, also the one behind the last step; the scale is that after this update."""
    model, batch = Known(), windows()
    loss, metrics = evaluate("max_q", model, batch)
    scale = moved(model.values[PAIR][:, 0].mean(0))
    assert metrics["pi_scale"].item() == pytest.approx(scale, rel=1e-5) and abs(scale - 2) > 0.1
    assert loss.item() == pytest.approx(mean_over(max_q_term(model, scale), batch, T + 1), rel=1e-4)


def test_planner_prior_by_hand():
    model, batch = Known(), windows()
    loss, metrics = evaluate("max_q+planner_prior", model, batch)
    scale = moved(model.values[PAIR][:, 0].mean(0))

    def prior(t, b):
        return 0.0 if (t, b) in UNKNOWN else -log_density(model, batch, t, b) / scale

    assert metrics["pi_prior_loss"].item() == pytest.approx(mean_over(prior, batch), rel=1e-4)
    assert metrics["pi_scale"].item() == pytest.approx(scale, rel=1e-5)
    expected = mean_over(max_q_term(model, scale), batch) + 0.7 * mean_over(prior, batch)
    assert loss.item() == pytest.approx(expected, rel=1e-4)


def weights_of(model, batch, scale):
    """softmax(value / scale) over the windows of each step with a plan."""
    values, found = model.values.detach()[PAIR].amin(0), torch.zeros(T, B)
    for t in range(T):
        known = [b for b in range(B) if batch.mask[t, b] and (t, b) not in UNKNOWN]
        total = sum(math.exp(float(values[t, b]) / scale) for b in known)
        for b in known:
            found[t, b] = math.exp(float(values[t, b]) / scale) / total
    return found


def test_weighted_prior_by_hand():
    """By the lesser of two critics, under the policy's own width; weights of a step sum to 1 over the windows."""
    model, batch = Known(), windows()
    loss, metrics = evaluate("max_q+weighted_prior", model, batch)
    scale = moved(model.values[PAIR][:, 0].amin(0))
    share, own = weights_of(model, batch, scale), model.log_std.exp()

    def prior(t, b):
        return -B * share[t, b] * log_density(model, batch, t, b, own) / scale if share[t, b] else 0.0

    assert metrics["pi_prior_loss"].item() == pytest.approx(mean_over(prior, batch), rel=1e-4)
    expected = mean_over(max_q_term(model, scale, torch.amin), batch) + 0.7 * mean_over(prior, batch)
    assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_bc_beside_values_by_hand():
    """The action that was taken, not the plan."""
    model, batch = Known(), windows()
    loss, metrics = evaluate("max_q+bc", model, batch)
    scale = moved(model.values[PAIR][:, 0].mean(0))

    def distance(t, b):
        return sum((float(model.action.detach()[t, b, d]) - float(batch.action[t, b, d])) ** 2 for d in range(A))

    assert metrics["pi_prior_loss"].item() == pytest.approx(mean_over(distance, batch), rel=1e-4)
    assert loss.item() == pytest.approx(mean_over(max_q_term(model, scale), batch) + 0.7 * mean_over(distance, batch), rel=1e-4)


def test_bc_by_hand():
    """Bounded above at 0, so that narrow plans that are met teach nothing."""
    model, batch = Known(), windows()
    batch.extras["plan_elite"][0, 0], batch.extras["plan_std"][0, 0] = model.action[0, 0].detach() + 0.01, 0.21
    loss, metrics = evaluate("bc", model, batch)
    scale = moved(model.values[PAIR][:, 0].mean(0))
    density = {(t, b): log_density(model, batch, t, b) for t in range(T) for b in range(B) if (t, b) not in UNKNOWN}
    assert density[0, 0] > 0.5 and min(density.values()) < -1
    expected = mean_over(lambda t, b: -min(density.get((t, b), 0.0), 0.0) / scale, batch)
    assert loss.item() == pytest.approx(expected, rel=1e-4) and metrics["pi_scale"].item() == pytest.approx(scale, rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, model.action)
    assert (gradient[0, 0] == 0).all() and (gradient[0, 3] != 0).all()


def test_bc_is_bounded_below():
    model, batch = Known(), windows()
    batch.extras["plan_elite"][2, 1] = 1e3
    loss, metrics = evaluate("bc", model, batch)
    without = batch._replace(mask=batch.mask.clone())
    without.mask[2, 1] = 0
    lost = loss - evaluate("bc", model, without)[0]
    assert lost.item() == pytest.approx(50_000 / metrics["pi_scale"].item() * RHO**2 / (T * B), rel=1e-4)


def test_awac_by_hand():
    """Weights exp(advantage / scale / temperature) of the actions taken, between 0.1 and 10."""
    model, batch = Known(), windows()
    model.taken[:, 0, 0] += 40
    model.taken[:, 0, 3] -= 40
    loss, metrics = evaluate("awac", model, batch)
    values, taken = model.values.detach()[PAIR].mean(0), model.taken[PAIR].mean(0)
    scale = moved(values[0])
    share = {
        (t, b): min(max(math.exp(min(float(taken[t, b] - values[t, b]) / scale / 0.5, 50)), 0.1), 10.0) for t in range(T) for b in range(B)
    }
    assert share[0, 0] == 10 and share[0, 3] == 0.1 and any(0.1 < value < 10 for value in share.values())
    assert loss.item() == pytest.approx(mean_over(lambda t, b: -share[t, b] * model.log_prob[t, b], batch), rel=1e-4)
    assert metrics["pi_awac_weight"].item() == pytest.approx(sum(share.values()) / (T * B), rel=1e-4)
    better = model.taken.clone()
    model.taken = better + 1
    assert evaluate("awac", model, batch)[1]["pi_awac_weight"] > metrics["pi_awac_weight"]


def test_kl_to_planner_by_hand():
    """KL(policy || planner) in the mean over dimensions, divided by its own running range; without a plan the standard normal."""
    model, batch = Known(), windows()
    loss, metrics = evaluate("kl_to_planner", model, batch)
    own = Normal(model.mean[:T], model.log_std[:T].exp())
    mean, std = batch.extras["plan_elite"].clone(), batch.extras["plan_std"].clone()
    for t, b in UNKNOWN | {(t, b) for t, b in (batch.mask == 0).nonzero().tolist()}:
        mean[t, b], std[t, b] = 0.0, 1.0
    divergence = kl_divergence(own, Normal(mean, std)).mean(-1)
    scale = moved(divergence[0])
    assert scale > 1.4  # its lower bound alone would say 1.7
    assert metrics["pi_scale"].item() == pytest.approx(scale, rel=1e-4)
    assert metrics["pi_kl"].item() == pytest.approx(divergence.mean().item(), rel=1e-4)
    assert loss.item() == pytest.approx(mean_over(lambda t, b: divergence[t, b] / scale - 0.1 * model.entropy[t, b], batch), rel=1e-4)


def test_gaussian_kl_is_that_of_torch():
    parts = [torch.randn(50, 3, dtype=torch.float64) for _ in range(4)]
    means, stds = parts[::2], [(0.5 * part).exp() for part in parts[1::2]]
    leaf, width = means[0].requires_grad_(), stds[0].detach().requires_grad_()
    found, wanted = gaussian_kl(leaf, width, means[1], stds[1]), kl_divergence(Normal(leaf, width), Normal(means[1], stds[1]))
    assert_close(found, wanted)
    for one, other in zip(*(torch.autograd.grad(value.sum(), (leaf, width)) for value in (found, wanted)), strict=True):
        assert_close(one, other)
    assert (gaussian_kl(leaf, width, leaf, width) == 0).all()


@pytest.mark.parametrize("name", ["max_q+planner_prior", "max_q+weighted_prior", "bc", "max_q+bc"])
def test_slope_of_the_planners_part_at_the_action(name):
    """-(a - mean) / std^2 times A / scale times the coefficient (of the log-density); 2 (a - taken) of the squared distance."""
    model, batch = Known(), windows()
    model.values = model.values.detach()
    loss, metrics = evaluate(name, model, batch)
    (found,) = torch.autograd.grad(loss, model.action)
    scale, coef = metrics["pi_scale"], 1.0 if name == "bc" else COEFS.prior
    std = model.log_std[:T].exp() if name == "max_q+weighted_prior" else batch.extras["plan_std"]
    distance = (model.action[:T] - batch.extras["plan_elite"]) / std.clamp(min=COEFS.min_std).square()
    uphill = -distance * A / scale * coef
    if name == "max_q+weighted_prior":
        uphill = uphill * B * weights_of(model, batch, scale.item())[..., None]
    if name == "max_q+bc":
        uphill = -2 * (model.action[:T] - batch.action) * COEFS.prior
    expected = -uphill * (RHO ** torch.arange(T))[:, None, None] * batch.mask[..., None] / (T * B)
    for t, b in UNKNOWN if name != "max_q+bc" else ():
        expected[t, b] = 0.0
    if name == "bc":
        met = [(t, b) for t in range(T) for b in range(B) if (t, b) not in UNKNOWN and log_density(model, batch, t, b) > 0]
        for t, b in met:
            expected[t, b] = 0.0
    assert_close(found[:T], expected.detach(), rtol=1e-4, atol=1e-6)
    assert (found[T] == 0).all() and (found[:T] != 0).any()


def test_weights_of_the_weighted_prior_sum_to_one():
    """Actions at the same distance from their plans climb as much together as there are time steps, whatever their values."""
    model, batch = Known(), windows()
    model.values = model.values.detach()
    batch.extras["plan_elite"] = torch.where(batch.extras["plan_elite"].isfinite(), model.action[:T].detach() - 0.3, torch.nan)
    model.log_std = torch.zeros(T + 1, B, A)
    loss, metrics = evaluate("max_q+weighted_prior", model, batch)
    (found,) = torch.autograd.grad(loss, model.action)
    expected = 0.3 * A / metrics["pi_scale"] * COEFS.prior * RHO ** torch.arange(T) / T
    assert_close(found[:T].sum(1), expected[:, None].expand(T, A))
    assert found[0, 2, 0] != found[0, 3, 0]


def test_gradients_of_the_weighted_prior_reach_no_weight_and_no_width():
    model, batch = Known(), windows()
    coefs = COEFS._replace(entropy=0.0)
    gradients = []
    for prior in (0.0, 0.7):
        loss, _ = evaluate("max_q+weighted_prior", model, batch, coefs=coefs._replace(prior=prior))
        gradients.append(torch.autograd.grad(loss, (model.values, model.log_std), allow_unused=True))
    assert torch.equal(gradients[0][0], gradients[1][0]) and gradients[1][1] is None


@pytest.mark.parametrize("name", ["max_q+planner_prior", "max_q+weighted_prior"])
def test_the_prior_begins_once_the_scale_is_beyond_its_threshold(name):
    """The scale after this update; equal is not beyond."""
    model, batch = Known(), windows()
    coefs = COEFS._replace(tau=1.0)
    scale = evaluate(name, model, batch, coefs=coefs)[1]["pi_scale"].item()
    without = evaluate(name, model, batch, coefs=coefs._replace(prior=0.0))[0]
    losses_of = {
        threshold: evaluate(name, model, batch, coefs=coefs._replace(threshold=threshold))[0] for threshold in (scale - 1e-3, scale, 1e9)
    }
    assert losses_of[scale - 1e-3] == evaluate(name, model, batch, coefs=coefs)[0] != without
    assert losses_of[scale] == losses_of[1e9] == without


def test_weighted_prior_without_any_plan():
    model, batch = Known(), windows()
    for value in batch.extras.values():
        value[1] = torch.nan
    loss, metrics = evaluate("max_q+weighted_prior", model, batch)
    scale = moved(model.values[PAIR][:, 0].amin(0))
    (slope,) = torch.autograd.grad(loss, model.action)
    assert loss.isfinite() and metrics["pi_prior_loss"].isfinite() and (slope[1] == 0).all() and (slope[0] != 0).any()
    for value in batch.extras.values():
        value[:] = torch.nan
    loss, _ = evaluate("max_q+weighted_prior", model, batch)
    assert loss.item() == pytest.approx(mean_over(max_q_term(model, scale, torch.amin), batch), rel=1e-4)


@pytest.mark.parametrize(
    ("values", "scale", "tau"),
    [
        ([0.0, 10.0], 1.0, 1.0),
        ([3.0, 3.0, 3.0], 4.0, 0.5),  # a range below 1 counts as 1
        (list(range(41)), 1.0, 1.0),
        ([5.0, -2.0, 7.5, 0.1, 0.2, -30.0, 4.0], 9.0, 0.01),
        ([2.5], 3.0, 1.0),
    ],
)
def test_running_range(values, scale, tau):
    values = torch.tensor(values)
    expected = moved(values, scale, tau)
    assert losses.update_scale(torch.tensor(scale), values.float(), tau).item() == pytest.approx(expected, rel=1e-5)


# Plans --------------------------------------------------------------------------------------------------------------------------


def test_plans_of_boxes():
    batch = windows()
    plan = plan_target(batch, False)
    for t in range(T):
        for b in range(B):
            if batch.mask[t, b] and (t, b) not in UNKNOWN:
                assert plan.known[t, b] == 1 and torch.equal(plan.mean[t, b], batch.extras["plan_elite"][t, b])
                assert torch.equal(plan.std[t, b], batch.extras["plan_std"][t, b])
            else:
                assert plan.known[t, b] == 0 and (plan.mean[t, b] == 0).all() and (plan.std[t, b] == 1).all()


def test_plans_of_choices():
    """Probabilities with a floor, whose logarithms are finite; uniform where there are none."""
    batch = windows(3, discrete=True)
    plan = plan_target(batch, True)
    assert_close(plan.mean.sum(-1), torch.ones(T, B))
    assert plan.mean.min() > 0 and plan.mean[2, 3].tolist() == pytest.approx([0.001 / 1.002, 1 / 1.002, 0.001 / 1.002])
    for t, b in UNKNOWN | {(2, 0), (1, 2)}:
        assert plan.known[t, b] == 0 and plan.mean[t, b].tolist() == pytest.approx([1 / 3] * 3)
    given = batch.extras["plan_mean"][0, 0].clamp(min=0.001)
    assert plan.known[0, 0] == 1
    assert_close(plan.mean[0, 0], given / given.sum())


# Choices ------------------------------------------------------------------------------------------------------------------------


def distributions(model, count=T):
    log_probs = torch.log_softmax(model.logits[:count].detach().double(), -1)
    return log_probs, log_probs.exp()


def test_choices_of_the_planner_prior_maximise_their_objective():
    """E[Q] / scale + prior coefficient E[log plan] / scale + entropy coefficient * entropy; without a plan that of max_q."""
    model, batch = Known(), windows(3, discrete=True)
    coefs = COEFS._replace(prior=0.7, entropy=0.8)
    loss, metrics = evaluate("max_q+planner_prior", model, batch, coefs=coefs, discrete=True)
    (log_probs, probs), scale = distributions(model), metrics["pi_scale"].item()
    values = model.choices[PAIR].mean(0)[:T].double()
    assert scale == pytest.approx(moved((probs * values).sum(-1)[0]), rel=1e-5) and abs(scale - 1) > 0.3
    # The loss is a cross-entropy, whose slope says to what: the policy's probabilities less the best ones.
    (slope,) = torch.autograd.grad(loss, model.logits)
    weight = (RHO ** torch.arange(T))[:, None, None] * batch.mask[..., None] / (T * B)
    real = batch.mask > 0
    assert (slope[:T][~real] == 0).all() and (slope[T] == 0).all()
    best = (probs - slope[:T].double() / weight)[real].clamp(min=1e-9)
    assert_close(best.sum(-1), torch.ones(len(best), dtype=torch.float64), rtol=1e-5, atol=1e-5)
    assert loss.item() == pytest.approx(
        mean_over(lambda t, b: -(probs[t, b] - slope[t, b] / weight[t, b]) @ log_probs[t, b], batch), rel=1e-4
    )
    plan = plan_target(batch, True)
    worth = (values + 0.7 * (plan.mean.double().log() * plan.known[..., None]))[real]

    def objective(p):
        return (p * worth).sum(-1) / scale - coefs.entropy * torch.xlogy(p, p).sum(-1)

    for seed in range(30):
        step = 0.1 * torch.randn(best.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert (objective(torch.softmax(best.log() + step, -1)) <= objective(best) + 1e-6).all()
    off = [coefs._replace(threshold=1e9), coefs._replace(prior=0.0)]
    found = [evaluate("max_q+planner_prior", model, batch, coefs=others, discrete=True)[0] for others in off]
    assert torch.equal(*found) and abs(found[0] - loss) > 1e-3


def test_choices_of_max_q_by_hand():
    """On all latents."""
    model, batch = Known(), windows(3, discrete=True)
    loss, metrics = evaluate("max_q", model, batch, discrete=True)
    log_probs, _ = distributions(model, T + 1)
    best = torch.softmax(model.choices[PAIR].mean(0).double() / (metrics["pi_scale"].item() * 0.1), -1)
    assert loss.item() == pytest.approx(mean_over(lambda t, b: -(best[t, b] * log_probs[t, b]).sum(), batch, T + 1), rel=1e-4)


def test_choices_of_kl_by_hand():
    model, batch = Known(), windows(3, discrete=True)
    loss, metrics = evaluate("kl_to_planner", model, batch, discrete=True)
    (log_probs, probs), plan = distributions(model), plan_target(batch, True).mean.double()
    divergence = (probs * (log_probs - plan.log())).sum(-1)
    scale = moved(divergence[0])
    expected = mean_over(lambda t, b: divergence[t, b] / scale + 0.1 * (probs[t, b] * log_probs[t, b]).sum(), batch)
    assert loss.item() == pytest.approx(expected, rel=1e-4) and metrics["pi_scale"].item() == pytest.approx(scale, rel=1e-5)
    assert metrics["pi_kl"].item() == pytest.approx(divergence.mean().item(), rel=1e-4)


def test_choices_of_bc_by_hand():
    model, batch = Known(), windows(3, discrete=True)
    loss, metrics = evaluate("bc", model, batch, discrete=True)
    (log_probs, _), plan = distributions(model), plan_target(batch, True).mean
    expected = mean_over(lambda t, b: 0.0 if (t, b) in UNKNOWN else -(plan[t, b] * log_probs[t, b]).sum(), batch)
    assert loss.item() == pytest.approx(expected, rel=1e-4) and metrics["pi_scale"] == 2.0


def test_choices_of_awac_by_hand():
    model, batch = Known(), windows(3, discrete=True)
    model.choices[:, 0, 0] += 40 * batch.action[0, 0]
    model.choices[:, 0, 3] -= 40 * batch.action[0, 3]
    loss, metrics = evaluate("awac", model, batch, discrete=True)
    (log_probs, probs), values = distributions(model), model.choices[PAIR].mean(0)[:T].double()
    expected_value = (probs * values).sum(-1)
    scale, taken = moved(expected_value[0]), batch.action.argmax(-1)
    advantage = (values * batch.action).sum(-1) - expected_value
    share = (advantage / scale / 0.5).exp().clamp(0.1, 10)
    assert share[0, 0] == 10 and (share == 0.1).any() and ((share > 0.1) & (share < 10)).any()
    expected = mean_over(lambda t, b: -share[t, b] * log_probs[t, b, taken[t, b]], batch)
    assert loss.item() == pytest.approx(expected, rel=1e-4) and metrics["pi_scale"].item() == pytest.approx(scale, rel=1e-5)
    assert metrics["pi_awac_weight"].item() == pytest.approx(share.mean().item(), rel=1e-4)


@pytest.mark.parametrize("name", losses.DISCRETE)
def test_values_of_choices_have_no_gradient(name):
    model, batch = Known(), windows(3, discrete=True)
    model.choices.requires_grad_()
    loss, metrics = evaluate(name, model, batch, discrete=True)
    logits, choices = torch.autograd.grad(loss, (model.logits, model.choices), allow_unused=True)
    assert choices is None and (logits != 0).any() and not any(value.requires_grad for value in metrics.values())


@pytest.mark.parametrize("name", ["max_q+weighted_prior", "max_q+bc"])
def test_what_choices_do_not_have_is_refused(name):
    with pytest.raises(ConfigError, match=r"policy\.objective.*max_q, kl_to_planner, max_q\+planner_prior, bc, awac") as caught:
        losses.make_objective(PolicyConfig(objective=name), True, False)
    assert name in str(caught.value)
    with pytest.raises(ConfigError, match="Discrete"):
        make(name, spec=CHOICES)


def test_a_divergence_from_a_squashed_gaussian_is_refused():
    with pytest.raises(ConfigError, match=r"model\.policy.*clipped"):
        losses.make_objective(PolicyConfig(objective="kl_to_planner"), False, False)


def test_each_kind_of_action_has_its_own_objectives():
    assert set(losses.BOX) == set(typing.get_args(typing.get_type_hints(PolicyConfig)["objective"]))
    for discrete, table in ((False, losses.BOX), (True, losses.DISCRETE)):
        for name, objective in table.items():
            assert losses.make_objective(PolicyConfig(objective=name), discrete, True) is objective


# Numbers ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "published"), [("max_q", 0.0), ("max_q+planner_prior", 6 / 61), ("max_q+weighted_prior", 6 / 50), ("max_q+bc", 1.0)]
)
def test_published_weights_and_others(name, published):
    loss, planner = LossConfig(rho=0.4, entropy_coef=0.02, tau=0.03), PlannerConfig(min_std=0.07)
    config = PolicyConfig(objective=name, scale_threshold=3.0, awac_temperature=0.9)
    found = losses.coefficients(config, loss, planner, 6)
    assert found == losses.Coefficients(0.4, 0.02, 0.03, published, 3.0, 0.07, 0.9)
    for prior in (0.0, 0.25):
        assert losses.coefficients(dataclasses.replace(config, prior_coef=prior), loss, planner, 6).prior == prior


# In a world model ---------------------------------------------------------------------------------------------------------------

BOXES, CHOICES = EnvSpec("test", (5,), 3, 50), EnvSpec("test", (5,), 3, 50, discrete=True)
CASES = [(name, "q", "squashed", BOXES) for name in losses.BOX if name != "kl_to_planner"]
CASES += [(name, "q", "clipped", BOXES) for name in losses.BOX]
CASES += [(name, "v", "clipped", BOXES) for name in ("kl_to_planner", "bc")]
CASES += [(name, "q", "squashed", CHOICES) for name in losses.DISCRETE] + [("kl_to_planner", "v", "squashed", CHOICES)]
CASE_IDS = [f"{name}-{value}-{'choices' if spec.discrete else policy}" for name, value, policy, spec in CASES]


def make(name, value="q", policy="squashed", spec=BOXES, **overrides):
    """An agent whose critics, which begin at 0, have opinions."""
    agent = TDMPC2(make_config("debug", **{"policy.objective": name, "model.value": value, "model.policy": policy}, **overrides), spec)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in agent.model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return agent


def policy_loss(agent, zs, batch, scale=2.5):
    agent.streams["update"].generator.manual_seed(3)
    noise = agent.streams["update"].draw(agent.objectives.noise_specs(T, B))
    return agent.objectives.policy_loss(zs, batch, torch.tensor(scale), noise)


def latents(agent, seed=1):
    return agent.model.encode(torch.randn(T + 1, B, 5, generator=torch.Generator().manual_seed(seed))).detach()


@pytest.mark.parametrize(("name", "value", "policy", "spec"), CASES, ids=CASE_IDS)
def test_gradients_reach_the_policy_alone(name, value, policy, spec):
    agent, batch = make(name, value, policy, spec), windows(3, discrete=spec.discrete)
    loss, metrics = policy_loss(agent, latents(agent), batch)
    loss.backward()
    for parameter_name, parameter in agent.model.named_parameters():
        if parameter_name.startswith("pi."):
            assert parameter.grad.isfinite().all() and (parameter.grad != 0).any(), parameter_name
        else:
            assert parameter.grad is None, parameter_name
    assert not any(part.requires_grad for part in metrics.values()) and all(part.isfinite() for part in metrics.values())
    assert metrics["pi_scale"].shape == ()


@pytest.mark.parametrize(("name", "value", "policy", "spec"), CASES, ids=CASE_IDS)
def test_what_lies_behind_an_end_has_no_influence(name, value, policy, spec):
    agent, batch, junk = make(name, value, policy, spec), windows(3, discrete=spec.discrete), windows(3, 8, spec.discrete)
    zs, other = latents(agent), latents(agent, 2)
    real = torch.cat((torch.ones(1, B), batch.mask))[..., None] > 0
    if name != "max_q":
        real[T] = False  # a latent without a step
    gone = batch.mask[..., None] == 0
    behind = batch._replace(
        action=torch.where(gone, junk.action, batch.action),
        extras={key: torch.where(gone, 1 + part, part) for key, part in batch.extras.items()},
    )
    found = [policy_loss(agent, *parts)[0] for parts in ((zs, batch), (torch.where(real, zs, other), behind))]
    assert torch.equal(*found) and not torch.equal(found[0], policy_loss(agent, torch.where(real, zs + 0.1, zs), batch)[0])


@pytest.mark.parametrize("missing", ["plan_elite", "plan_std", "both"])
@pytest.mark.parametrize("name", OF_PLANS)
def test_half_a_plan_is_none(name, missing):
    agent = make(name, policy="clipped")
    found = []
    for junk in (torch.nan, torch.inf):
        batch = windows(3)
        for key in ("plan_elite", "plan_std") if missing == "both" else (missing,):
            batch.extras[key][1, 0, 1] = junk
        loss, _ = policy_loss(agent, latents(agent), batch)
        gradients = torch.autograd.grad(loss, list(agent.model.pi.parameters()))
        assert all(part.isfinite().all() for part in gradients)
        found.append(loss)
    assert found[0].isfinite() and torch.equal(*found)
    assert not torch.equal(found[0], policy_loss(agent, latents(agent), windows(3))[0])


@pytest.mark.parametrize("name", [*OF_PLANS, "max_q+bc", "awac"])
@pytest.mark.parametrize("spec", [BOXES, CHOICES], ids=["box", "choices"])
def test_steps_without_any_plan(name, spec):
    """The seed phase: nothing but random decisions."""
    if spec.discrete and name not in losses.DISCRETE:
        return
    agent, batch = make(name, policy="squashed" if spec.discrete else "clipped", spec=spec), windows(3, discrete=spec.discrete)
    for part in batch.extras.values():
        part[:] = torch.where(batch.mask[..., None] > 0, torch.nan, 0.0)
    loss, metrics = policy_loss(agent, latents(agent), batch)
    gradients = torch.autograd.grad(loss, list(agent.model.pi.parameters()))
    assert loss.isfinite() and all(part.isfinite().all() for part in (*gradients, *metrics.values()))


@pytest.mark.parametrize(("name", "value", "policy", "spec"), CASES, ids=CASE_IDS)
def test_an_update_with_the_noise_it_declares(name, value, policy, spec):
    """All of it, and the running scale is that of the metrics."""
    agent = make(name, value, policy, spec, **{"model.dropout": 0.2})
    batch = windows(3, discrete=spec.discrete)._replace(obs=torch.randn(T + 1, B, 5))
    before = {key: part.clone() for key, part in agent.model.named_parameters()}
    metrics = agent.update(batch)
    assert metrics["skipped_updates"] == 0 and metrics["pi_loss"].isfinite() and metrics["pi_grad_norm"] > 0
    assert torch.equal(agent.learner.scale, metrics["pi_scale"])
    assert all(not torch.equal(part, before[key]) for key, part in agent.model.named_parameters() if key.startswith("pi."))


class Read(dict):
    """Remembers which of its entries were looked at."""

    def __init__(self, entries):
        super().__init__(entries)
        self.names = set()

    def __getitem__(self, name):
        self.names.add(name)
        return super().__getitem__(name)

    def get(self, name, default=None):
        self.names |= {name} & self.keys()
        return super().get(name, default)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize(("name", "value", "policy", "spec"), CASES, ids=CASE_IDS)
def test_noise_is_what_is_read(name, value, policy, spec, dropout):
    """All that is declared and nothing else, for the latents that take part: the last one in max_q alone."""
    agent = make(name, value, policy, spec, **{"model.dropout": dropout})
    specs = losses.policy_noise(PolicyConfig(objective=name), agent.model, T, B, dropout)
    noise = Read(agent.streams["update"].draw(specs))
    agent.objectives.policy_loss(latents(agent), windows(3, discrete=spec.discrete), torch.tensor(2.5), noise)
    assert noise.names == specs.keys()
    steps = T + 1 if name == "max_q" else T
    shapes = {"pi_policy": (steps, B, 3), "pi_critics": (2,), "pi_keep": (2, steps, B, 16)}
    assert all(specs[key].shape == shapes[key] for key in specs)


@pytest.mark.parametrize("dropout", [0.0, 0.01, 0.2])
def test_awac_compares_actions_under_the_same_dropout(dropout):
    """An action that is the policy's own has no advantage."""
    agent = make("awac", **{"model.dropout": dropout})
    zs = latents(agent)
    noise = agent.streams["update"].draw(agent.objectives.noise_specs(T, B))
    batch = windows(3)._replace(action=agent.model.policy(zs[:-1], noise["pi_policy"]).action.detach())
    _, metrics = agent.objectives.policy_loss(zs, batch, torch.tensor(1.0), noise)
    assert metrics["pi_awac_weight"] == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("policy", ["squashed", "clipped"])
def test_density_of_actions_taken_is_that_of_the_policy(policy):
    """The density that awac climbs is the one its samples have."""
    agent = make("awac", policy=policy)
    zs = latents(agent)
    sample = agent.model.policy(zs, 0.3 * torch.randn(T + 1, B, 3))
    inside = sample.action.abs().amax(-1) < 0.999
    assert inside.sum() > T * B / 2
    assert_close(agent.model.policy_log_prob(zs, sample.action)[inside], sample.log_prob[inside], rtol=1e-3, atol=1e-3)
    assert torch.equal(agent.model.propose(zs, torch.zeros_like(sample.action)), sample.mean)
