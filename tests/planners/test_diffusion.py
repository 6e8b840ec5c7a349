"""Diffusion planning, without and with a prior, against models and priors whose answer is known."""

import dataclasses
import math

import pytest
import torch
from torch.testing import assert_close

from worldmpc.config import ConfigError, ModelConfig, PlannerConfig
from worldmpc.models.heads import one_hot_argmax
from worldmpc.models.trajectory import TrajectoryModel
from worldmpc.models.world_model import WorldModel
from worldmpc.noise import NoiseStream
from worldmpc.planners import make_planner, propose, rollout_return
from worldmpc.planners.diffusion import Diffusion, geometric_sigmas, moments, standardise, systematic
from worldmpc.types import ModelStep, PlanState

CPU = torch.device("cpu")


class Paid:
    """Stands still and pays ``reward(z, action)``; nothing behind the horizon."""

    def __init__(self, reward, trajectory=None):
        self.reward, self.trajectory = reward, trajectory

    def encode(self, obs):
        return obs

    def step(self, z, action):
        return ModelStep(z, self.reward(z, action), torch.ones(action.shape[:-1]))

    def propose(self, z, eps):
        return eps.clamp(-1, 1)

    def terminal_value(self, z, eps, critics):
        return torch.zeros(eps.shape[:-1])


class PaidChoice(Paid):
    """The same with a policy of one-hot actions."""

    def propose(self, z, eps):
        return one_hot_argmax(eps)


def quadratic(z, action):
    return -(action - z).square().sum(-1)


def bumps(z, action):
    """Two narrow optima, at 0.7 and -0.7."""
    return torch.exp(-0.5 * ((action[..., 0].abs() - 0.7) / 0.1).square())


def forward(z, action):
    return action[..., 0]


class TwoPoints(TrajectoryModel):
    """The exact denoiser of sequences that are all +m or all -m, with equal probability."""

    m = 0.7

    def __init__(self, horizon=2, steps=10):
        super().__init__(1, horizon, 1, (8,), steps)

    def denoise(self, x, z, step):
        left = self.alpha_bar[step]
        return (self.m * torch.tanh(self.m * math.sqrt(left) * x.sum((-2, -1), keepdim=True) / (1 - left))).expand(x.shape)


class Normal(TrajectoryModel):
    """The exact denoiser of actions that are independently N(0, 0.3^2)."""

    def denoise(self, x, z, step):
        left = self.alpha_bar[step]
        return 0.09 * math.sqrt(left) / (0.09 * left + 1 - left) * x


class AnyChoice(TrajectoryModel):
    """The exact denoiser of choices that are independent and equally likely."""

    @classmethod
    def of(cls, choices):
        return cls(choices, 2, 1, (8,), discrete=True)

    def denoise(self, x, z, step):
        left = self.alpha_bar[step]
        return 2 * torch.softmax(2 * math.sqrt(left) * x / (1 - left), -1) - 1


def make(action_dim=1, discrete=False, discount=1.0, **overrides):
    config = {"horizon": 2, "num_samples": 256, "num_pi_trajs": 0, **overrides}
    return Diffusion(PlannerConfig(**config), action_dim, discount, 2, discrete)


def run(planner, model, z, explore=False, state=None, seed=0):
    noise = NoiseStream(seed, "plan").draw(planner.noise_specs(len(z)))
    return planner.plan(model, z, state or planner.init(len(z), CPU), noise, explore)


# Parts.


def test_geometric_sigmas():
    assert geometric_sigmas(3, 2.0, 0.02) == pytest.approx([2.0, 0.2, 0.02])
    assert geometric_sigmas(1, 2.0, 0.02) == [2.0]


def test_returns_are_standardised_by_those_that_are_finite():
    returns = torch.tensor([[1.0, 3.0, torch.nan, torch.inf], [5.0, 5.00001, 5.0, 5.0], [torch.nan] * 4])
    finite = returns.isfinite()
    scores = standardise(returns, *moments(returns, finite.float()))
    assert_close(scores[0, :2], torch.tensor([-1.0, 1.0]))
    assert scores[1].abs().max() < 1e-4  # a spread of rounding errors is none
    assert all(part[2] == 0 for part in moments(returns, finite.float()))


def test_moments_are_weighted():
    mean, std = moments(torch.tensor([[0.0, 4.0, 9.0]]), torch.tensor([[3.0, 1.0, 0.0]]))
    assert mean.item() == pytest.approx(1) and std.item() == pytest.approx(math.sqrt((3 * 1 + 9) / 4))


@pytest.mark.parametrize("u", [0.0, 0.3, 1 - 2**-24])
def test_resampling_takes_each_as_often_as_its_weight_says(u):
    weight = torch.softmax(3 * torch.randn(20, 64), 1)
    weight = torch.where(torch.rand(20, 64) < 0.3, 0.0, weight)
    weight[:, [0, -1]] = 0.0
    weight /= weight.sum(1, keepdim=True)
    counts = torch.zeros(20, 64).scatter_add_(1, systematic(weight, torch.full((20,), u)), torch.ones(20, 64))
    assert (counts[weight == 0] == 0).all() and (counts.sum(1) == 64).all()
    assert (counts - 64 * weight).abs().max() < 1 + 1e-3


def test_resampling_of_equals_keeps_each():
    index = systematic(torch.full((5, 512), 1 / 512), torch.rand(5) * 0.98 + 0.01)
    assert torch.equal(index, torch.arange(512).expand(5, -1))


# Without a prior.


@pytest.mark.parametrize("num_pi_trajs", [0, 24])
def test_finds_the_optimum_of_a_quadratic(num_pi_trajs):
    planner = make(2, horizon=3, num_samples=512, num_pi_trajs=num_pi_trajs, beta=50.0)
    z = torch.rand(32, 2) * 1.6 - 0.8
    plan = run(planner, Paid(quadratic), z)
    assert (plan.mean - z[:, None]).abs().max() < planner.config.min_std
    assert plan.value.min() > -0.02 and torch.equal(plan.action, plan.mean[:, 0])


def test_picks_one_of_two_optima_where_the_cross_entropy_method_averages():
    z = torch.zeros(64, 1)
    plan = run(make(horizon=1, num_samples=512), Paid(bumps), z)
    assert ((plan.action.abs() - 0.7).abs() < 0.05).all()
    assert 0.3 < (plan.action > 0).float().mean() < 0.7
    cem = make_planner(PlannerConfig(name="cem", horizon=1, num_samples=512, num_elites=128, num_pi_trajs=0), 1, 1.0, 2)
    assert (run(cem, Paid(bumps), z).mean.abs() < 0.5).float().mean() > 0.7


def test_one_step_is_one_weighted_mean_by_hand():
    planner = make(iterations=1, max_std=0.4, beta=3.0, num_samples=16, num_pi_trajs=3, discount=0.9)
    noise = NoiseStream(0, "plan").draw(planner.noise_specs(1))
    start = PlanState(torch.tensor([[[0.5], [-0.2]]]), torch.zeros(1, 0, 2, 1))
    plan = planner.plan(Paid(quadratic), torch.tensor([[0.1]]), start, noise, False)
    fresh = (torch.tensor([0.5, -0.2]).view(2, 1, 1) + 0.4 * noise["samples"][0, :, 0]).clamp(-1, 1)
    actions = torch.cat((noise["proposal"][:, 0].clamp(-1, 1), fresh), 1).squeeze(-1)  # [H, S]
    returns = -((actions[0] - 0.1) ** 2) - 0.9 * (actions[1] - 0.1) ** 2
    unnormalised = (3.0 * (returns - returns.mean()) / returns.std(correction=0)).exp()
    weight = unnormalised / unnormalised.sum()
    mean = (weight * actions).sum(1)
    assert_close(plan.mean[0, :, 0], mean)
    assert_close(plan.std[0, :, 0], (weight * (actions - mean[:, None]) ** 2).sum(1).sqrt())
    assert_close(plan.value[0], (weight * returns).sum())


def test_without_beta_every_candidate_weighs_the_same():
    planner = make(iterations=1, max_std=0.4, beta=0.0, num_samples=16)
    noise = NoiseStream(0, "plan").draw(planner.noise_specs(1))
    plan = planner.plan(Paid(quadratic), torch.zeros(1, 1), planner.init(1, CPU), noise, False)
    assert_close(plan.mean[0], (0.4 * noise["samples"][0, :, 0]).clamp(-1, 1).mean(1))


def test_more_iterations_for_large_action_spaces():
    assert make(19).iterations == 6 and len(make(20).sigmas) == 8


def test_exploration_adds_noise_to_the_action_alone():
    planner, z = make(min_std=0.1), torch.rand(200, 1)
    quiet, loud = run(planner, Paid(quadratic), z), run(planner, Paid(quadratic), z, explore=True)
    assert torch.equal(quiet.mean, loud.mean) and torch.equal(quiet.elite, loud.elite) and torch.equal(quiet.action, quiet.elite)
    inside = quiet.action.abs() < 0.6
    assert (loud.action - loud.elite)[inside].std().item() == pytest.approx(0.1, abs=0.02)


def test_warm_start_is_the_shifted_plan_and_helps():
    planner, z = make(iterations=1, max_std=0.1), torch.tensor([[-0.9]])
    cold = run(planner, Paid(quadratic), z)
    assert_close(cold.state.mean[:, :-1], cold.mean[:, 1:])
    assert (cold.state.mean[:, -1] == 0).all() and cold.state.elites.shape == (1, 0, 2, 1)
    warm = run(planner, Paid(quadratic), z, state=PlanState(torch.full((1, 2, 1), -0.8), cold.state.elites))
    assert warm.value > cold.value + 0.5


# One-hot actions.


def test_finds_the_best_of_all_sequences_of_choices():
    """A password of three choices out of four, each env its own; the right choice at the wrong time is worth nothing."""

    class Password(Paid):
        def step(self, z, action):
            position, secret = z[..., :1], z[..., 1:]
            wanted = secret.gather(-1, position.long())
            paid = (action.argmax(-1, keepdim=True) == wanted).float().squeeze(-1)
            return ModelStep(torch.cat((position + 1, secret), -1), paid, torch.ones(action.shape[:-1]))

    secret = torch.randint(0, 4, (16, 3)).float()
    plan = run(make(4, True, horizon=3), Password(forward), torch.cat((torch.zeros(16, 1), secret, torch.zeros(16, 1)), 1))
    assert torch.equal(plan.mean.argmax(-1), secret.long())
    assert torch.equal(plan.action.argmax(-1), secret[:, 0].long()) and ((plan.action == 0) | (plan.action == 1)).all()
    assert (plan.value > 2.9).all()


def test_choices_are_planned_as_probabilities():
    planner = make(3, True, num_pi_trajs=0, iterations=2, min_std=0.5)
    worth = torch.tensor([0.0, 1.0, 1.0])
    plan = run(planner, Paid(lambda z, action: action @ worth), torch.zeros(500, 1), explore=True)
    assert (planner.init(2, CPU).mean == 1 / 3).all() and plan.mean.min() >= 0
    assert_close(plan.mean.sum(-1), torch.ones(500, 2))
    assert_close(plan.std, (plan.mean * (1 - plan.mean)).sqrt())
    assert (plan.state.mean[:, -1] == 1 / 3).all() and (plan.action.sum(-1) == 1).all()
    assert_close(plan.action.mean(0), plan.mean[:, 0].mean(0), atol=0.06, rtol=0)  # drawn from the plan
    assert not torch.equal(plan.action, plan.elite)


# With a learned prior.


def learned(prior, action_dim=1, discrete=False, **overrides):
    return make(action_dim, discrete, **{"prior": "learned", "iterations": 10, "horizon": prior.horizon, **overrides})


def test_without_beta_particles_are_samples_of_the_prior():
    prior, z = TwoPoints(), torch.zeros(500, 1)
    planner = learned(prior, beta=0.0, num_samples=32)
    noise = NoiseStream(0, "plan").draw(planner.noise_specs(500))
    plan = planner.plan(Paid(forward, prior), z, planner.init(500, CPU), noise, False)
    assert_close(plan.mean, prior.sample(z, noise).mean(1), atol=1e-3, rtol=0)


def test_without_beta_actions_have_the_distribution_of_the_prior():
    """Two-sample Kolmogorov-Smirnov test at 1 %."""
    prior, z = Normal(1, 2, 1, (8,)), torch.zeros(2000, 1)
    drawn = run(learned(prior, beta=0.0, num_samples=8), Paid(forward, prior), z, seed=1).action.flatten().sort().values
    own = prior.sample(z, NoiseStream(2, "prior").draw(prior.sample_specs(2000, 1)))[:, 0, 0, 0].sort().values
    at = torch.cat((drawn, own))
    distance = (torch.searchsorted(drawn, at, right=True) - torch.searchsorted(own, at, right=True)).abs().max() / 2000
    assert distance < 1.63 * math.sqrt(2 / 2000) and own.std() > 0.15


@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_beta_tilts_the_prior_once_and_not_once_per_step(beta):
    """Returns of the two modes are 1 standard deviation above and below their mean: exp(2 beta) to 1 are the odds."""
    prior = TwoPoints()
    plan = run(learned(prior, beta=beta), Paid(forward, prior), torch.zeros(1000, 1))
    assert (plan.action > 0).float().mean().item() == pytest.approx(1 / (1 + math.exp(-2 * beta)), abs=0.03)


def test_beta_moves_a_normal_prior_by_its_standard_deviation_each():
    """N(0, s^2) exp(beta a / s) is N(beta s, s^2)."""
    prior = Normal(1, 1, 1, (8,))
    prior_std = prior.sample(torch.zeros(1, 1), NoiseStream(0, "prior").draw(prior.sample_specs(1, 10_000))).std().item()
    plan = run(learned(prior, beta=1.0), Paid(forward, prior), torch.zeros(1000, 1))
    assert plan.elite.mean().item() == pytest.approx(prior_std, abs=0.05) and plan.elite.std().item() == pytest.approx(prior_std, abs=0.05)


def test_large_beta_takes_the_best_particle():
    prior, z = Normal(1, 2, 1, (8,)), torch.rand(16, 1) * 0.6 - 0.3
    planner = learned(prior, beta=1e6)
    noise = NoiseStream(0, "plan").draw(planner.noise_specs(16))
    plan = planner.plan(Paid(quadratic, prior), z, planner.init(16, CPU), noise, False)
    last = planner._denoise(Paid(quadratic, prior), z, noise)
    assert_close(plan.value, last.returns.max(1).values)
    assert_close(plan.action[:, 0], last.actions[0, :, :, 0].gather(1, last.returns.argmax(1, keepdim=True)).squeeze(1))
    of_prior = (prior.sample(z, noise) - z[:, None, None]).square().sum((2, 3)).neg()
    assert plan.value.mean() > of_prior.max(1).values.mean() - 1e-3 and plan.value.min() > -0.02


def test_the_prior_is_not_left():
    """The return alone would go to 1; the prior knows -0.7 and 0.7."""
    prior = TwoPoints()
    plan = run(learned(prior, beta=20.0), Paid(forward, prior), torch.zeros(50, 1))
    assert ((plan.action - 0.7).abs() < 0.02).all()


def test_exploration_adds_noise_to_the_chosen_sequence():
    prior = TwoPoints()
    quiet, loud = (run(learned(prior), Paid(forward, prior), torch.zeros(300, 1), explore=explore) for explore in (False, True))
    assert torch.equal(quiet.elite, loud.elite) and torch.equal(quiet.action, quiet.elite)
    assert (loud.action - loud.elite).std().item() == pytest.approx(0.05, abs=0.01)


def test_guidance_raises_returns():
    prior, z = TwoPoints(), torch.zeros(200, 1)
    plain, guided = (run(learned(prior, beta=0.0, guidance=guidance, num_samples=8), Paid(forward, prior), z) for guidance in (0.0, 3.0))
    assert plain.value.mean() < 0.3 and guided.value.mean() > 1.2


def test_guidance_needs_no_gradient_around_it_and_leaves_none_behind():
    weight = torch.nn.Parameter(torch.tensor(1.0))
    prior = TwoPoints()
    planner = learned(prior, beta=1.0, guidance=1.0, num_samples=16)
    model = Paid(lambda z, action: weight * action[..., 0], prior)
    one = run(planner, model, torch.zeros(2, 1))
    with torch.no_grad():
        other = run(planner, model, torch.zeros(2, 1))
    assert torch.equal(one.action, other.action) and not one.action.requires_grad and not one.mean.requires_grad and weight.grad is None


def test_choices_of_a_prior():
    prior, worth = AnyChoice.of(3), torch.tensor([0.0, 1.0, 3.0])
    z = torch.zeros(600, 1)
    any_one = run(learned(prior, 3, True, beta=0.0, num_samples=8), Paid(lambda z, action: action @ worth, prior), z)
    assert_close(any_one.action.mean(0), torch.full((3,), 1 / 3), atol=0.06, rtol=0)
    best = run(learned(prior, 3, True, beta=50.0, num_samples=64), Paid(lambda z, action: action @ worth, prior), z)
    assert (best.action[:, 2] == 1).all() and (best.value == 6).all()
    guided = run(learned(prior, 3, True, beta=0.0, num_samples=8, guidance=3.0), Paid(lambda z, action: action @ worth, prior), z)
    assert guided.value.mean() > any_one.value.mean() + 1


def test_a_missing_prior_is_an_error():
    with pytest.raises(ConfigError, match=r"planner\.prior: .*no learned prior"):
        run(learned(TwoPoints()), Paid(forward), torch.zeros(1, 1))


def test_a_prior_over_other_sequences_is_an_error():
    with pytest.raises(ConfigError, match=r"planner\.prior: "):
        run(learned(TwoPoints(3)), Paid(forward, TwoPoints(2)), torch.zeros(1, 1))
    with pytest.raises(ConfigError, match=r"planner\.iterations: "):
        run(learned(TwoPoints(), iterations=11, prior_steps=11), Paid(forward, TwoPoints(2)), torch.zeros(1, 1))


# Both.

KINDS = {
    "none": lambda: (make(beta=5.0), None),
    "none, one-hot": lambda: (make(3, True, num_pi_trajs=4, beta=5.0), None),
    "learned": lambda: (learned(TwoPoints(), beta=2.0, num_samples=32), TwoPoints()),
    "learned, guided": lambda: (learned(TwoPoints(), beta=2.0, num_samples=32, guidance=0.5), TwoPoints()),
    "learned, one-hot": lambda: (learned(AnyChoice.of(3), 3, True, beta=2.0, num_samples=32), AnyChoice.of(3)),
}


def both(kind, reward):
    """A planner and its model."""
    planner, prior = KINDS[kind]()
    return planner, (PaidChoice if planner.discrete else Paid)(reward, prior)


kinds = pytest.mark.parametrize("kind", KINDS)
FIRST = {"resample": 1, "choice": 0, "action": 0, "denoising": 1, "terminal": 1, "samples": 2, "proposal": 1}


def of_env(noise, env):
    """The noise of one environment; critics are shared."""
    return {name: part if name == "critics" else part.narrow(FIRST[name], env, 1) for name, part in noise.items()}


@kinds
def test_environments_do_not_see_each_other(kind):
    planner, model = both(kind, quadratic)
    z = torch.randn(3, 1)
    noise, state = NoiseStream(0, "plan").draw(planner.noise_specs(3)), planner.init(3, CPU)
    state = state._replace(mean=state.mean + 0.1 * torch.randn(state.mean.shape))
    together = planner.plan(model, z, state, noise, True)
    for env in range(3):
        one = slice(env, env + 1)
        alone = planner.plan(model, z[one], PlanState(state.mean[one], state.elites[one]), of_env(noise, env), True)
        for field in ("action", "elite", "mean", "std", "value"):
            assert_close(getattr(alone, field), getattr(together, field)[one])


@kinds
def test_seeds_reproduce(kind):
    planner, model = both(kind, quadratic)
    one, same, other = (run(planner, model, torch.full((8, 1), 0.2), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.mean, same.mean) and torch.equal(one.action, same.action) and not torch.equal(one.mean, other.mean)


@kinds
def test_seeds_can_be_mapped(kind):
    """Under torch.vmap, as stacked seeds plan."""
    planner, model = both(kind, quadratic)
    z = torch.rand(2, 3, 1)
    noises = [NoiseStream(seed, "plan").draw(planner.noise_specs(3)) for seed in range(2)]
    stacked = {name: torch.stack([noise[name] for noise in noises]) for name in noises[0]}
    state = planner.init(3, CPU)
    together = torch.vmap(lambda z, noise: planner.plan(model, z, state, noise, True))(z, stacked)
    for index, noise in enumerate(noises):
        alone = planner.plan(model, z[index], state, noise, True)
        assert_close(together.action[index], alone.action)
        assert_close(together.mean[index], alone.mean)


@kinds
@pytest.mark.parametrize("explore", [False, True])
def test_results_are_within_bounds(kind, explore):
    planner, model = both(kind, lambda z, action: 5 * action.sum(-1))
    plan = run(planner, model, 50 * torch.randn(6, 1), explore)
    assert plan.action.shape == (6, planner.action_dim) and plan.mean.shape == plan.std.shape == plan.state.mean.shape
    assert plan.action.abs().max() <= 1 and plan.mean.abs().max() <= 1 + 1e-6
    if planner.discrete:
        assert (plan.action.sum(-1) == 1).all()
        assert_close(plan.mean.sum(-1), torch.ones(6, 2))
    else:
        assert plan.std.min() >= planner.config.min_std
    assert plan.metrics["plan_bad"] == 0
    assert_close(plan.metrics["plan_std"], plan.std[:, 0].mean())


@kinds
@pytest.mark.parametrize("beta", [0.0, 5.0])
def test_bad_candidates_are_never_chosen_and_are_reported(kind, beta):
    def reward(z, action):
        return torch.where(action[..., 0] > 0.3, torch.nan, torch.where(action[..., 0] < -0.9, torch.inf, -action[..., 0]))

    planner, model = both(kind, reward)
    planner.config = dataclasses.replace(planner.config, beta=beta)
    plan = run(planner, model, torch.zeros(8, 1))
    assert plan.value.isfinite().all() and plan.value.abs().max() < 3 and plan.mean.isfinite().all()
    assert plan.action[:, 0].max() <= 0.3 and plan.action[:, 0].min() >= -0.9 and 0 < plan.metrics["plan_bad"] < 1


@kinds
@pytest.mark.parametrize("explore", [False, True])
def test_all_candidates_bad_still_gives_a_finite_action(kind, explore):
    planner, model = both(kind, lambda z, action: action[..., 0] * torch.nan)
    plan = run(planner, model, torch.zeros(2, 1), explore)
    for part in (plan.action, plan.mean, plan.std, plan.value):
        assert part.isfinite().all()
    assert plan.action.abs().max() <= 1 and plan.metrics["plan_bad"] == 1
    assert not planner.discrete or (plan.action.sum(-1) == 1).all()


@kinds
@pytest.mark.parametrize("explore", [False, True])
def test_a_broken_policy_or_prior_still_gives_a_finite_action(kind, explore):
    planner, model = both(kind, quadratic)
    model.propose = lambda z, eps: eps * torch.nan
    if model.trajectory is not None:
        model.trajectory.denoise = lambda x, z, step: x * torch.nan
    plan = run(planner, model, torch.zeros(2, 1), explore)
    for part in (plan.action, plan.mean, plan.std):
        assert part.isfinite().all()
    assert plan.action.abs().max() <= 1 and (plan.metrics["plan_bad"] > 0 or not planner.config.num_pi_trajs)


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("prior", ["none", "learned"])
def test_plans_with_a_world_model(discrete, prior):
    """The plan returns more than what candidates come from does on average: the policy, or the prior."""
    model = WorldModel(ModelConfig(enc_dim=16, mlp_dim=16, latent_dim=16, num_bins=11), 5, 3, discrete=discrete)
    for last in (model.reward[-1], model.q.layers[-1]):
        torch.nn.init.normal_(last.weight, std=0.2)  # type: ignore[union-attr,arg-type]
    model.trajectory = TrajectoryModel(3, 2, 16, (16,), discrete=discrete)
    torch.nn.init.normal_(model.trajectory.ema[-1].weight, std=0.2)  # type: ignore[union-attr,arg-type]
    has_prior = prior == "learned"
    sizes = {"num_samples": 64, "guidance": 0.1 if has_prior else 0.0, "num_pi_trajs": 0 if has_prior else 8}
    planner = make(3, discrete, discount=0.9, prior=prior, **sizes)
    noise = NoiseStream(0, "plan").draw(planner.noise_specs(4))
    with torch.no_grad():
        z = model.encode(torch.randn(4, 5))
        plan = planner.plan(model, z, planner.init(4, CPU), noise, False)
        source = model.trajectory.sample(z, noise).movedim(2, 0) if has_prior else propose(model, z, noise["proposal"])
        starts, eps = z[:, None].expand(-1, source.shape[2], -1), noise["terminal"][-1][:, : source.shape[2]]
        average = rollout_return(model, starts, source, 0.9, eps, noise["critics"][-1]).mean()
    assert plan.action.shape == (4, 3) and plan.value.mean() > average


def test_one_denoising_step_is_importance_sampling():
    """Nothing is resampled, and one particle is drawn by its weight."""
    prior = Normal(1, 2, 1, (8,))
    planner = learned(prior, iterations=1, beta=2.0, num_samples=16)
    noise = NoiseStream(0, "plan").draw(planner.noise_specs(3))
    plan = planner.plan(Paid(forward, prior), torch.zeros(3, 1), planner.init(3, CPU), noise, False)
    particles = prior.sample(torch.zeros(3, 1), noise)
    returns = particles.sum((2, 3))
    weight = torch.softmax(2.0 * (returns - returns.mean(1, keepdim=True)) / returns.std(1, correction=0, keepdim=True), 1)
    assert_close(plan.mean, (weight[:, :, None, None] * particles).sum(1))
    chosen = (weight / noise["choice"]).argmax(1)
    assert_close(plan.action, particles[torch.arange(3), chosen, 0])
