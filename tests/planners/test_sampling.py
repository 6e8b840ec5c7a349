"""Sampling planners against models whose answer is known."""

import dataclasses

import pytest
import torch
from torch.testing import assert_close

from tests.planners.problems import CPU, Line, LinearQuadratic, Z, make, return_of, returns, run, small
from worldmpc.config import ConfigError, PlannerConfig
from worldmpc.noise import NoiseStream
from worldmpc.planners import make_planner, propose, rollout_return
from worldmpc.planners.rules import RULES, WORST
from worldmpc.planners.sampling import SamplingPlanner
from worldmpc.types import ModelStep

ACTIONS = {"box": False, "discrete": True}
ENV_DIM = {"proposal": 1, "samples": 2, "terminal": 1, "elite": 0, "action": 0}
"""Which dimension of the noise counts environments; critics are the same for all."""


class Gated(LinearQuadratic):
    """Reward 1 per step; a first action above 0 ends the episode with probability ``p``."""

    p = 1.0

    def step(self, z, action):
        return ModelStep(z, torch.ones(z.shape[:-1]), 1 - self.p * (action[..., 0] > 0).float())


class Broken(LinearQuadratic):
    """Returns are NaN and infinite for some actions."""

    def step(self, z, action):
        step = super().step(z, action)
        reward = torch.where(action[..., 0] > 0, torch.nan, step.reward)
        return step._replace(reward=torch.where(action[..., 0] < -0.9, torch.inf, reward))


every_planner = pytest.mark.parametrize("name", RULES)
both_actions = pytest.mark.parametrize("discrete", ACTIONS.values(), ids=ACTIONS)


# The published planner.


def test_finds_the_linear_quadratic_optimum():
    model, z = LinearQuadratic(), torch.tensor([[0.5, -0.1], [-0.3, 0.4], [0.0, 0.0]])
    plan = run(make(), model, z)
    for row, mean in zip(z, plan.mean, strict=True):
        assert mean[0].item() == pytest.approx(model.best(row, 4, 0.95).item(), abs=0.06)


def test_value_is_the_return_of_the_chosen_sequence_or_above_the_mean_plan():
    planner, model = make(), LinearQuadratic()
    z = torch.tensor([[0.5, -0.1]])
    plan = run(planner, model, z)
    of_mean = returns(model, z, plan.mean.transpose(0, 1), 0.95)
    assert plan.value[0] == pytest.approx(of_mean.item(), abs=0.02)


def test_actions_stay_within_bounds_and_std_within_its_own():
    planner = make(min_std=0.1, max_std=1.5, iterations=3)
    plan = run(planner, LinearQuadratic(), torch.randn(6, 2) * 50, explore=True)
    assert plan.action.abs().max() <= 1 and plan.mean.abs().max() <= 1 + 1e-6
    assert plan.std.min() >= 0.1 and plan.std.max() <= 1.5


def test_warm_start_is_the_shifted_plan():
    plan = run(make(iterations=2), LinearQuadratic(), torch.randn(2, 2))
    assert_close(plan.state.mean[:, :-1], plan.mean[:, 1:])
    assert (plan.state.mean[:, -1] == 0).all()


@pytest.mark.parametrize("name", ["mppi", "cem", "icem"])
def test_warm_start_helps_a_single_iteration(name):
    planner, model, z = make(name, iterations=1, max_std=0.3, num_pi_trajs=0), LinearQuadratic(), torch.tensor([[3.0, 1.0]])
    start = planner.init(1, CPU)
    cold = run(planner, model, z)
    warm = run(planner, model, z, state=start._replace(mean=torch.full((1, 4, 1), -1.0)))
    assert warm.value > cold.value + 1


def test_exploration_adds_noise_to_the_action_alone():
    planner, model, z = make(iterations=3), LinearQuadratic(), torch.randn(5, 2)
    quiet, loud = run(planner, model, z), run(planner, model, z, explore=True)
    assert torch.equal(quiet.mean, loud.mean) and torch.equal(quiet.elite, loud.elite)
    assert torch.equal(quiet.action, quiet.elite) and not torch.equal(loud.action, loud.elite)


@pytest.mark.parametrize("p", [1.0, 0.5])
def test_termination_weighs_everything_behind_it(p):
    """Three rewards of 1; ending at step 0 leaves 1 + (1 - p)(0.9 + 0.81)."""
    model = Gated()
    model.p = p
    actions = torch.tensor([[[-1.0], [1.0]], [[-1.0], [-1.0]], [[-1.0], [-1.0]]])
    assert_close(returns(model, torch.zeros(2, 2), actions, 0.9), torch.tensor([1 + 0.9 + 0.81, 1 + (1 - p) * (0.9 + 0.81)]))


def test_more_iterations_for_large_action_spaces():
    config = PlannerConfig()
    assert SamplingPlanner(config, 19, 0.99, 5).iterations == 6 and SamplingPlanner(config, 20, 0.99, 5).iterations == 8


def test_without_policy_proposals():
    plan = run(make(num_pi_trajs=0), LinearQuadratic(), torch.tensor([[0.5, -0.1]]))
    assert plan.mean[0, 0].item() == pytest.approx(LinearQuadratic().best(torch.tensor([0.5, -0.1]), 4, 0.95).item(), abs=0.06)


# Known optima.

PRECISE = {"horizon": 8, "min_std": 0.003, "max_std": 1.0, "num_pi_trajs": 0, "num_elites": 48, "iterations": 10}
ACCURACY = {
    "cem": ({}, 0.01),
    "icem": ({"noise_exponent": 0.5, "sample_decay": 1.05, "num_elites": 32, "iterations": 12}, 0.01),
    "mppi": ({"temperature": 10.0}, 0.01),
    "random_shooting": ({"num_samples": 8192}, 0.6),
    "cem and gradient": ({"name": "cem", "iterations": 2, "gradient_steps": 60}, 0.001),
    "random shooting and gradient": ({"name": "random_shooting", "gradient_steps": 80}, 0.001),
}


@pytest.mark.parametrize("case", ACCURACY)
def test_share_of_the_linear_quadratic_optimum(case):
    """``value`` is the return of the executed sequence, but for cem, whose mean is better still."""
    changes, accuracy = ACCURACY[case]
    model, planner = LinearQuadratic(), make(**{"name": case, **PRECISE, **changes})
    plan = run(planner, model, Z)
    for env, z in enumerate(Z):
        actions, optimum = model.optimum(z, 8, 0.95)
        assert abs(actions).max() < 0.9, "the optimum is no longer inside the bounds"
        assert optimum * (1 + accuracy) <= plan.value[env].item() <= optimum * (1 - 1e-5)
    if "random" not in case:
        optima = torch.tensor([model.optimum(z, 8, 0.95)[1] for z in Z])
        assert (return_of(model, Z, plan) >= optima * (1 + accuracy)).all()


def test_the_riccati_optimum_is_one():
    """Any step away from it is worse, so the tests above compare with the right number."""
    model = LinearQuadratic()
    actions, optimum = model.optimum(Z[0], 8, 0.95)
    best = torch.tensor(actions).float()
    assert returns(model, Z[:1], best[:, None], 0.95).item() == pytest.approx(optimum, rel=1e-5)
    others = best[:, None] + 0.1 * torch.randn(8, 500, 1)
    assert returns(model, Z[:1].expand(500, -1), others, 0.95).max().item() < optimum


LINE = {"horizon": 5, "num_samples": 1500, "num_elites": 60, "iterations": 6, "uniform_mix": 0.2, "pi_noise": 0.8, "temperature": 2.0}


@every_planner
def test_discrete_optimum(name):
    """Where going left pays, a bait lies on the right; the others of these states are closer to that."""
    model, planner = Line(), make(name, discrete=True, **LINE)
    z = torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0], [-3.0, 0.0]])
    plan = run(planner, model, z)
    for env, row in enumerate(z):
        action, value = model.optimum(row, 5, 0.95)
        assert plan.value[env].item() == pytest.approx(value, rel=1e-5)
        assert env == 2 or torch.equal(plan.action[env], action)
    assert plan.action[0, 0] == 1, "left"


def test_discrete_warm_start_helps():
    """With few samples the right sequence of 12 is not found at once, but by refining it from plan to plan."""
    planner, model = make("cem", True, horizon=12, num_samples=60, num_elites=8, iterations=2, num_pi_trajs=0), Line()
    state, z, values = planner.init(8, CPU), torch.zeros(8, 2), []
    for seed in range(8):
        plan = run(planner, model, z, state=state, seed=seed)
        state = plan.state._replace(mean=plan.mean)  # the same start again
        values.append(plan.value.mean().item())
    assert values[-1] > values[0] + 1


# Properties of all of them.


@every_planner
@both_actions
def test_plans_are_legal(name, discrete):
    planner, model, z = small(name, discrete)
    state = planner.init(3, CPU)
    for explore in (True, False):
        plan = run(planner, model, z * 10, explore, state)
        state = plan.state
        assert plan.mean.shape == plan.std.shape == (3, 4, planner.action_dim) and plan.value.shape == (3,)
        for action in (plan.action, plan.elite):
            assert action.shape == (3, planner.action_dim)
            if discrete:
                assert ((action == 0) | (action == 1)).all() and (action.sum(-1) == 1).all()
            else:
                assert action.abs().max() <= 1
        if discrete:
            assert_close(plan.mean.sum(-1), torch.ones(3, 4))
            assert_close(plan.std, (plan.mean * (1 - plan.mean)).clamp(min=0).sqrt())
            assert_close(plan.state.mean[:, -1], torch.full((3, 3), 1 / 3))
        assert_close(plan.state.mean[:, :-1], plan.mean[:, 1:])
        assert {name: value.shape for name, value in plan.metrics.items()} == {"plan_std": (), "plan_bad": ()}


@every_planner
def test_noise_is_the_same_for_both_actions(name):
    box = SamplingPlanner(make(name).config, 3, 0.95, 2, discrete=False)
    assert box.noise_specs(2) == make(name, discrete=True).noise_specs(2)


@every_planner
@both_actions
@pytest.mark.parametrize("explore", [True, False])
def test_same_noise_same_plan(name, discrete, explore):
    planner, model, z = small(name, discrete)
    one, two, three = (run(planner, model, z, explore, seed=seed) for seed in (1, 1, 2))
    for field in ("action", "elite", "mean", "std", "value"):
        assert torch.equal(getattr(one, field), getattr(two, field))
    assert not torch.equal(one.mean, three.mean)


@every_planner
@both_actions
@pytest.mark.parametrize("gradient_steps", [0, 3])
def test_environments_do_not_see_each_other(name, discrete, gradient_steps):
    """A plan for three states equals three plans with the same noise, from a warm start as well."""
    if discrete and gradient_steps:
        return
    planner, model, z = small(name, discrete, gradient_steps=gradient_steps)
    start = run(planner, model, z, True, seed=5).state
    noise = NoiseStream(0, "plan").draw(planner.noise_specs(3))
    together = planner.plan(model, z, start, noise, True)
    for env in range(3):
        mine = {name: value.narrow(ENV_DIM[name], env, 1) if name in ENV_DIM else value for name, value in noise.items()}
        one = slice(env, env + 1)
        alone = planner.plan(model, z[one], type(start)(start.mean[one], start.elites[one]), mine, True)
        for field in ("action", "mean", "std", "value"):
            assert_close(getattr(alone, field), getattr(together, field)[one])
        assert_close(alone.state.elites, together.state.elites[one])


@every_planner
@both_actions
def test_mapped_over_noise(name, discrete):
    """As for several seeds at once."""
    planner, model, z = small(name, discrete, gradient_steps=0 if discrete else 2)
    state = planner.init(3, CPU)
    noises = [NoiseStream(seed, "plan").draw(planner.noise_specs(3)) for seed in (0, 1)]
    stacked = {name: torch.stack([noise[name] for noise in noises]) for name in noises[0]}
    plans = torch.vmap(lambda noise: planner.plan(model, z, state, noise, True))(stacked)
    for index, noise in enumerate(noises):
        expected = planner.plan(model, z, state, noise, True)
        for field in ("action", "mean", "std", "value"):
            assert_close(getattr(plans, field)[index], getattr(expected, field), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "discrete", "gradient_steps"), [("mppi", False, 0), ("cem", False, 1), ("icem", True, 0)])
def test_traced_as_one_graph(name, discrete, gradient_steps):
    """Nothing in a plan depends on data, so it can be compiled and captured as a whole."""
    torch.compiler.reset()
    planner, model, z = small(name, discrete, iterations=1 if gradient_steps else 2, gradient_steps=gradient_steps)
    state, noise = planner.init(3, CPU), NoiseStream(0, "plan").draw(planner.noise_specs(3))
    compiled = torch.compile(planner.plan, backend="eager", fullgraph=True, dynamic=False)
    expected = planner.plan(model, z, state, noise, True)
    assert_close(compiled(model, z, state, noise, True).mean, expected.mean, rtol=1e-4, atol=1e-5)


@every_planner
@both_actions
def test_bad_candidates_are_never_elites_while_others_are_finite(name, discrete):
    """Of 20 elites all but two are bad, and in the next iteration all but three, which alone make the plan."""
    planner, model, z = small(name, discrete, num_elites=20, iterations=2)

    class Scarce(type(model)):
        def fast_returns(self, z, actions, discount, eps, critics):
            good.append(actions[:, :, : 2 + len(good)])
            values = rollout_return(model, z, actions, discount, eps, critics)
            return torch.where(torch.arange(actions.shape[2]) < good[-1].shape[2], values, torch.nan if len(good) == 1 else torch.inf)

    good = []
    plan = run(planner, Scarce(), z)
    low, high = good[-1].amin(2).transpose(0, 1), good[-1].amax(2).transpose(0, 1)
    former = planner.config.momentum if planner.rule.momentum else 0
    assert (plan.mean >= low - 2 * former - 1e-5).all() and (plan.mean <= high + 2 * former + 1e-5).all()
    assert plan.value.isfinite().all() and (plan.value > WORST).all()
    expected = 1 - sum(part.shape[2] for part in good) / sum(planner.sizes)
    assert plan.metrics["plan_bad"].item() == pytest.approx(expected)


@pytest.mark.parametrize("name", ["mppi", "cem", "icem", "random_shooting"])
def test_bad_actions_are_avoided_and_reported(name):
    plan = run(make(name, gradient_steps=3), Broken(), torch.tensor([[-1.0, 0.0]]))
    assert plan.value.isfinite().all() and -0.9 <= plan.action[0, 0] <= 0 and plan.metrics["plan_bad"] > 0


@every_planner
@both_actions
@pytest.mark.parametrize("prior_too", [False, True])
def test_all_candidates_bad_still_gives_a_finite_action(name, discrete, prior_too):
    planner, model, z = small(name, discrete, gradient_steps=0 if discrete else 2)

    class Hopeless(type(model)):
        def step(self, z, action):
            return super().step(z, action)._replace(reward=torch.full(z.shape[:-1], torch.nan))

        def propose(self, z, eps):
            return torch.full_like(eps, torch.nan) if prior_too and not discrete else super().propose(z, eps)

    state = planner.init(3, CPU)
    for explore in (True, False):
        plan = run(planner, Hopeless(), z, explore, state)
        state = plan.state
        assert plan.action.isfinite().all() and plan.action.abs().max() <= 1 and plan.metrics["plan_bad"] == 1
        assert plan.mean.isfinite().all() and plan.std.isfinite().all() and plan.value.isfinite().all()
        assert not discrete or (plan.action.sum(-1) == 1).all()


@pytest.mark.parametrize("name", RULES)
def test_horizon_of_one(name):
    plan = run(make(name, horizon=1), LinearQuadratic(), Z)
    best = [LinearQuadratic().best(z, 1, 0.95).item() for z in Z]
    assert_close(plan.value, torch.tensor([LinearQuadratic().optimum(z, 1, 0.95)[1] for z in Z]).float(), atol=0.02, rtol=0)
    assert plan.mean.shape == (3, 1, 1) and all(abs(value) < 1 for value in best)


# The registry.


@every_planner
def test_registry_of_sampling_planners(name):
    planner = make_planner(make(name).config, 3, 0.9, 2, True)
    assert isinstance(planner, SamplingPlanner) and planner.config.name == name
    assert run(planner, Line(), torch.zeros(1, 2)).action.sum() == 1


@pytest.mark.parametrize(("name", "kind"), [("diffusion", "Diffusion"), ("mcts", "MCTS")])
def test_registry_of_the_others(name, kind):
    planner = make_planner(dataclasses.replace(make().config, name=name), 3, 0.9, 2, True)
    assert type(planner).__name__ == kind
    assert run(planner, Line(), torch.zeros(1, 2)).action.sum() == 1


IMPOSSIBLE = [
    ({"name": "mcts"}, False, "planner.name: mcts needs a discrete action space"),
    ({"gradient_steps": 2}, True, "planner.gradient_steps: there is no gradient for discrete actions; use gradient_steps=0"),
    ({"name": "diffusion", "gradient_steps": 2}, False, "planner.gradient_steps: diffusion does not"),
    ({"name": "newton"}, False, "planner.name: unknown planner 'newton'; use one of mppi, "),
    ({"name": "icem", "num_samples": 50, "num_pi_trajs": 40}, False, "planner.num_samples: 50 candidates of iteration 1"),
    ({"name": "icem", "num_elites": 50, "num_samples": 50, "keep_elites": 1.0}, False, "planner.num_samples: 50 candidates"),
]


@pytest.mark.parametrize(("values", "discrete", "message"), IMPOSSIBLE)
def test_registry_refuses_what_cannot_be(values, discrete, message):
    with pytest.raises(ConfigError) as error:
        make_planner(dataclasses.replace(make().config, **values), 3, 0.9, 2, discrete)
    assert str(error.value).startswith(message)


def test_proposals_follow_the_mean_of_particles():
    """A world of three particles, of which number p moves by p times the action; the policy proposes where it stands."""

    class Spread:
        num_particles = 3

        def step(self, z, action):
            assert z.shape[0] == action.shape[0] == 3
            moved = z + torch.arange(3.0).view(-1, 1, 1, 1) * action
            return ModelStep(moved, moved.sum(-1), torch.ones_like(moved.sum(-1)))

        def propose(self, z, eps):
            return z + eps

    eps = torch.randn(3, 2, 4, 1, generator=torch.Generator().manual_seed(0))
    first, second, third = propose(Spread(), torch.ones(2, 1), eps)
    assert_close(first, 1 + eps[0])
    assert_close(second, 1 + first + eps[1])
    assert_close(third, 1 + first + second + eps[2])
