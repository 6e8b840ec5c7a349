"""Tree search against models whose answer is known, and against a plain one that searches a single tree."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from worldmpc.config import ConfigError, PlannerConfig
from worldmpc.noise import NoiseStream
from worldmpc.planners import rollout_return
from worldmpc.planners.mcts import GAMMA_TRIALS, MCTS, dirichlet, judges
from worldmpc.types import ModelStep, Planner

CPU = torch.device("cpu")


class Valueless:
    """What the models below have in common: states are observations, nothing is proposed, and there is no value behind the horizon."""

    def encode(self, obs):
        return obs

    def propose(self, z, eps):
        raise AssertionError("the search samples no actions")

    def terminal_value(self, z, eps, critics):
        assert eps.shape[:-1] == z.shape[:-1] and critics.shape == (2,)
        return torch.zeros(z.shape[:-1])


class Chain(Valueless):
    """Positions 0 to 4; left, stay, right. Staying pays 0.2, at 0 a bait of 1 is a trap for good, being at 4 pays 4."""

    def step(self, z, action):
        position = (z[..., 0] + action[..., 2] - action[..., 0]).clamp(0, 4)
        reward = 0.2 * action[..., 1] + 1.0 * (position == 0) + 4.0 * (position == 4)
        return ModelStep(position[..., None], reward, 1 - (position == 0).float())


class Tables(Valueless):
    """Full trees of random rewards, a table each: a state is [which table, place in it]."""

    def __init__(self, count, actions, depth, ends=0.0, scale=1.0, seed=0):
        generator = torch.Generator().manual_seed(seed)
        size = sum(actions**level for level in range(depth + 1))
        self.actions = actions
        self.reward = scale * torch.randn(count, size, generator=generator)
        self.worth = scale * torch.randn(count, size, generator=generator)
        self.cont = (torch.rand(count, size, generator=generator) >= ends).float()
        self.probs = torch.softmax(torch.randn(count, size, actions, generator=generator), -1)

    def start(self):
        return torch.stack((torch.arange(len(self.reward)), torch.zeros(len(self.reward))), 1).float()

    def place(self, z):
        return z[..., 0].long(), z[..., 1].long()

    def step(self, z, action):
        table, place = self.place(z)
        place = (place * self.actions + 1 + action.argmax(-1)) % self.reward.shape[1]  # steps from leaves at the horizon are discarded
        return ModelStep(torch.stack((z[..., 0], place.float()), -1), self.reward[table, place], self.cont[table, place])

    def action_probs(self, z):
        return self.probs[self.place(z)]

    def terminal_value(self, z, eps, critics):
        return self.worth[self.place(z)]


class Bandit(Valueless):
    """One state; each arm pays what it pays. ``probs``: the prior."""

    def __init__(self, *pay, probs=None, cont=1.0):
        self.pay, self.cont = torch.tensor(pay), cont
        if probs is not None:
            self.action_probs = lambda z: torch.tensor(probs).expand(*z.shape[:-1], -1)

    def step(self, z, action):
        assert ((action == 0) | (action == 1)).all() and (action.sum(-1) == 1).all()
        reward = self.pay[action.argmax(-1)]
        return ModelStep(z, reward, torch.full_like(reward, self.cont))


def make(actions, discount=0.9, **overrides):
    return MCTS(PlannerConfig(**{"horizon": 3, "num_simulations": 50, **overrides}), actions, discount, num_q=3)


def run(planner, model, z, explore=False, seed=0):
    noise = NoiseStream(seed, "plan").draw(planner.noise_specs(len(z)))
    return planner.plan(model, z, planner.init(len(z), CPU), noise, explore)


def visits(planner, plan):
    return plan.mean[:, 0] * planner.config.num_simulations


def optimum(model, z, actions, horizon, discount):
    """First action and return of the best of all sequences from one state [Z]."""
    every = F.one_hot(torch.tensor(list(itertools.product(range(actions), repeat=horizon))), actions).float().transpose(0, 1)
    many = every.shape[1]
    values = rollout_return(model, z.expand(many, -1), every, discount, torch.zeros(many, actions), torch.tensor([0, 1]))
    return every[0, values.argmax()], values.max().item()


def search_one_tree(model, z, actions, discount, horizon, simulations, c_puct):
    """Plain recursion over dictionaries: visits of the root's actions, and the mean return."""

    def node(z, depth, prior, end, value):
        return {"z": z, "depth": depth, "prior": prior, "end": end, "value": value, "n": 0, "sum": 0.0, "child": {}}

    def in_tree(parent):
        for child in parent["child"].values():
            yield child["sum"] / child["n"]
            yield from in_tree(child)

    def visit(parent, low, high):
        if parent["end"]:
            return parent["value"]
        children = parent["child"]
        normal = {a: (c["sum"] / c["n"] - low) / (high - low) if high > low else 0.0 for a, c in children.items()}
        tried = sum(child["n"] for child in children.values())
        unvisited = sum(normal[a] * children[a]["n"] for a in children) / max(tried, 1)
        scores = []
        for a in range(actions):
            count = children[a]["n"] if a in children else 0
            scores.append(normal.get(a, unvisited) + c_puct * parent["prior"][a] * math.sqrt(tried + 1) / (1 + count))
        best = max(range(actions), key=scores.__getitem__)
        one_hot = F.one_hot(torch.tensor(best), actions).float()
        step = model.step(parent["z"], one_hot)
        if new := best not in children:
            value = model.terminal_value(step.z, one_hot, torch.tensor([0, 1])).item()
            end = parent["depth"] + 1 == horizon or step.cont == 0
            children[best] = node(step.z, parent["depth"] + 1, model.action_probs(step.z).tolist(), end, value)
        child = children[best]
        behind = child["value"] if new else visit(child, low, high)
        total = step.reward.item() + discount * step.cont.item() * behind
        child["n"], child["sum"] = child["n"] + 1, child["sum"] + total
        return total

    root, total = node(z, 0, model.action_probs(z).tolist(), False, 0.0), 0.0
    for _ in range(simulations):
        values = list(in_tree(root)) or [0.0]
        total += visit(root, min(values), max(values))
    return [root["child"][a]["n"] if a in root["child"] else 0 for a in range(actions)], total / simulations


@pytest.mark.parametrize(("actions", "horizon", "ends"), [(2, 6, 0.1), (3, 4, 0.0), (5, 3, 0.3)])
def test_batch_search_is_the_search_of_single_trees(actions, horizon, ends):
    model = Tables(12, actions, horizon, ends)
    planner = make(actions, horizon=horizon, num_simulations=60, c_puct=1.5)
    plan = run(planner, model, model.start())
    for z, found, value in zip(model.start(), visits(planner, plan), plan.value, strict=True):
        expected, total = search_one_tree(model, z, actions, 0.9, horizon, 60, 1.5)
        assert found.round().int().tolist() == expected
        assert value.item() == pytest.approx(total, rel=1e-4, abs=1e-4)


def test_solves_the_chain_where_the_bait_is_nearer():
    """Brute force over all sequences is the truth, and what pays most at once is wrong from most starts."""
    planner, model = make(3, 0.95, horizon=4, num_simulations=200, c_puct=5.0), Chain()
    z = torch.tensor([[1.0], [2.0], [3.0]])
    plan = run(planner, model, z)
    for start, action in zip(z, plan.action, strict=True):
        best, _ = optimum(model, start, 3, 4, 0.95)
        assert_close(action, best)
        assert start == 3 or model.step(start.expand(3, 1), torch.eye(3)).reward.argmax() != best.argmax()
    # The most visited path from 2 goes right, to the reward.
    assert plan.mean[1, :2].argmax(-1).tolist() == [2, 2]


def test_bandit_prefers_the_best_arm_and_counts_every_simulation():
    planner = make(4, horizon=1)
    plan = run(planner, Bandit(0.1, 0.7, 0.3, -0.5), torch.zeros(3, 1))
    counts = visits(planner, plan)
    assert_close(counts.sum(1), torch.full((3,), 50.0))
    assert_close(counts, counts.round())
    assert (counts.argsort(1) == torch.tensor([3, 0, 2, 1])).all() and (plan.action.argmax(1) == 1).all()
    assert plan.metrics["plan_depth"] == 1 and plan.metrics["plan_bad"] == 0
    assert_close(plan.std, (plan.mean * (1 - plan.mean)).sqrt())


def test_value_converges_to_that_of_the_best_sequence():
    model = Tables(6, 2, 3)
    few, many = (run(make(2, num_simulations=count, c_puct=0.3), model, model.start()) for count in (16, 600))
    best = torch.tensor([optimum(model, z, 2, 3, 0.9)[1] for z in model.start()])
    assert (many.value <= best + 1e-3).all()
    assert (best - many.value < 0.1).all()
    assert (best - many.value).mean() < 0.3 * (best - few.value).mean()
    first = model.step(model.start(), many.action)
    behind = torch.tensor([optimum(model, z, 2, 2, 0.9)[1] for z in first.z])
    assert (first.reward + 0.9 * behind > best - 0.02).all()


def test_search_starts_from_the_prior_and_leaves_it_for_the_better():
    model = Bandit(0.0, 0.0, 1.0, probs=[0.02, 0.9, 0.08])
    z = torch.zeros(1, 1)
    assert run(make(3, num_simulations=1), model, z).action.argmax() == 1
    assert run(make(3, num_simulations=4), model, z).action.argmax() == 1
    assert run(make(3, num_simulations=200), model, z).action.argmax() == 2
    assert run(make(3, num_simulations=200, c_puct=0.0), Bandit(0.0, 0.0, 0.0, probs=[0.02, 0.9, 0.08]), z).action.argmax() == 0
    planner = make(3, num_simulations=100)
    flat = run(planner, Bandit(0.0, 0.0, 0.0, probs=[0.25, 0.5, 0.25]), z)
    assert_close(visits(planner, flat), torch.tensor([[25.0, 50.0, 25.0]]), atol=1.0, rtol=0)


def test_behind_a_terminal_step_nothing_counts_but_its_reward_does():
    class Endless(Bandit):
        def action_probs(self, z):
            return torch.full((*z.shape[:-1], len(self.pay)), 1 / len(self.pay))

        def terminal_value(self, z, eps, critics):
            return torch.full(z.shape[:-1], 100.0)

    z = torch.zeros(2, 1)
    ended = run(make(2, horizon=5), Endless(1.0, 3.0, cont=0.0), z)
    assert ended.metrics["plan_depth"] == 1 and (ended.action.argmax(1) == 1).all()
    share = ended.mean[:, 0]
    assert_close(ended.value, share @ torch.tensor([1.0, 3.0]))
    assert_close(ended.mean[:, 1:], torch.full((2, 4, 2), 0.5))
    # One action: every simulation goes one step further, weighted by discount and continuation, until the horizon.
    going = run(make(1, discount=0.8, horizon=2, num_simulations=4), Endless(1.0, cont=0.5), z)
    one = 1 + 0.4 * 100
    two = 1 + 0.4 * (1 + 0.4 * 100)
    assert_close(going.value, torch.full((2,), (one + 3 * two) / 4))
    assert run(make(1, discount=0.0, horizon=2), Endless(1.0), z).value.tolist() == [1, 1]


def test_visits_do_not_depend_on_the_scale_of_returns():
    plans = [run(make(3), Tables(8, 3, 3, 0.2, scale), Tables(8, 3, 3).start()) for scale in (1.0, 2.0**12, 2.0**-12)]
    for plan in plans[1:]:
        assert_close(plan.mean, plans[0].mean)


def test_equal_returns_are_not_told_apart_by_rounding():
    planner, z = make(3, horizon=1, num_simulations=99), torch.zeros(1, 1)
    assert_close(visits(planner, run(planner, Bandit(1000.1, 1000.1, 1000.1), z)), torch.full((1, 3), 33.0))
    nearly = visits(planner, run(planner, Bandit(1000.1, 1000.1002, 1000.1001), z))
    assert_close(nearly, torch.full((1, 3), 33.0), atol=8, rtol=0)
    assert visits(planner, run(planner, Bandit(1000.1, 1000.3, 1000.2), z))[0, 1] > 60


@pytest.mark.parametrize("explore", [False, True])
def test_environments_do_not_see_each_other(explore):
    planner, model = make(3), Tables(4, 3, 3, 0.2)
    noise, state = NoiseStream(1, "plan").draw(planner.noise_specs(4)), planner.init(4, CPU)
    together = planner.plan(model, model.start(), state, noise, explore)
    for env in range(4):
        one = slice(env, env + 1)
        mine = {name: value if name == "critics" else value[one] if name == "action" else value[:, one] for name, value in noise.items()}
        alone = planner.plan(model, model.start()[one], planner.init(1, CPU), mine, explore)
        for field in ("action", "elite", "mean", "std", "value"):
            assert_close(getattr(alone, field), getattr(together, field)[one])


@pytest.mark.parametrize("value", [True, None])
def test_plans_under_vmap_are_those_of_each(value):
    """As stacked seeds plan, with and without playouts."""
    planner, model = make(3, num_simulations=20), Tables(6, 3, 3, 0.2)
    model.value = value
    noises = [NoiseStream(seed, "plan").draw(planner.noise_specs(3)) for seed in range(2)]
    state, z = planner.init(3, CPU), model.start().view(2, 3, 2)
    stacked = torch.vmap(lambda z, noise: planner.plan(model, z, state, noise, True), in_dims=(0, 0))(
        z, {name: torch.stack([noise[name] for noise in noises]) for name in noises[0]}
    )
    for seed in range(2):
        alone = planner.plan(model, z[seed], state, noises[seed], True)
        for field in ("action", "elite", "mean", "value"):
            assert_close(getattr(stacked, field)[seed], getattr(alone, field))
        assert_close(stacked.metrics["plan_depth"][seed], alone.metrics["plan_depth"])


@pytest.mark.parametrize("value", [True, None])
def test_a_plan_stays_on_the_device_and_reads_nothing_back(value):
    """Tensors on the meta device have no numbers to read, and mix with those of no other device."""

    class Flat(Valueless):
        def action_probs(self, z):
            return z.softmax(-1)

        def step(self, z, action):
            return ModelStep(z + action, z[..., 0], torch.sigmoid(z[..., 1]))

    model, planner, meta = Flat(), make(3, num_simulations=4), torch.device("meta")
    model.value, model.terminal_value = value, lambda z, eps, critics: z[..., 2]
    noise = {name: each.to(meta) for name, each in NoiseStream(0, "plan").draw(planner.noise_specs(2)).items()}
    plan = planner.plan(model, torch.zeros(2, 3, device=meta), planner.init(2, meta), noise, True)
    assert all(each.device == meta for each in (*plan[:5], *plan.state, *plan.metrics.values()))
    assert plan.action.shape == plan.elite.shape == (2, 3) and plan.value.shape == (2,)


def test_same_noise_same_plan_and_evaluation_needs_none():
    planner, model = make(3), Tables(64, 3, 3)
    first, again, other = (run(planner, model, model.start(), True, seed) for seed in (0, 0, 1))
    assert torch.equal(first.action, again.action) and torch.equal(first.mean, again.mean)
    assert not torch.equal(first.mean, other.mean) and not torch.equal(first.action, other.action)
    quiet = [run(planner, model, model.start(), False, seed) for seed in (0, 1)]
    assert torch.equal(quiet[0].mean, quiet[1].mean)
    assert torch.equal(quiet[0].action, quiet[0].elite)


@pytest.mark.parametrize(("alpha", "actions"), [(0.03, 4), (0.3, 6), (1.0, 3), (5.0, 2)])
def test_dirichlet_noise_has_the_moments_and_quantiles_of_dirichlet_noise(alpha, actions):
    count = 40_000
    sample = dirichlet(alpha, torch.randn(GAMMA_TRIALS, count, actions), torch.empty(GAMMA_TRIALS + 1, count, actions).exponential_())
    assert sample.min() >= 0
    assert_close(sample.sum(1), torch.ones(count))
    variance = (1 / actions) * (1 - 1 / actions) / (actions * alpha + 1)
    assert_close(sample.mean(0), torch.full((actions,), 1 / actions), atol=5 * math.sqrt(variance / count), rtol=0)
    assert_close(sample.var(0), torch.full((actions,), variance), rtol=0.05, atol=0)
    reference = torch.distributions.Dirichlet(torch.full((actions,), alpha)).sample((count,))
    levels = torch.linspace(0.05, 0.95, 10)
    # Kolmogorov-Smirnov at a few places: the reference's share below its own quantiles.
    for level, quantile in zip(levels, reference[:, 0].quantile(levels), strict=True):
        assert (sample[:, 0] <= quantile).float().mean().item() == pytest.approx(level.item(), abs=0.015)


def test_exploration_finds_what_the_prior_rules_out():
    model = Bandit(0.5, 1.0, 0.0, probs=[1.0, 0.0, 0.0])
    z = torch.zeros(200, 1)
    planner = make(3, horizon=1, num_simulations=20)
    quiet, loud = run(planner, model, z), run(planner, model, z, explore=True)
    assert (quiet.mean[:, 0, 0] == 1).all() and (quiet.action[:, 0] == 1).all()
    assert (loud.mean[:, 0, 1] > 0).float().mean() > 0.3
    assert 0.2 < loud.action[:, 1].mean() < 0.9
    assert ((loud.elite * loud.mean[:, 0]).sum(1) == loud.mean[:, 0].amax(1)).all()


def test_exploring_actions_are_drawn_in_proportion_to_visits():
    planner, model = make(2, horizon=1, num_simulations=20, root_noise=0.0, c_puct=4.0), Bandit(0.0, 0.1)
    loud = run(planner, model, torch.zeros(4000, 1), explore=True)
    assert_close(loud.action.mean(0), loud.mean[0, 0], atol=0.03, rtol=0)
    assert loud.action.sum() == 4000 and 0.1 < loud.mean[0, 0, 0] < 0.5


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_count_as_worst(bad):
    """All pay less than nothing, so that taking them for 0 would be best."""
    planner = make(4, horizon=2)
    plan = run(planner, Bandit(bad, -5.0, -3.0, bad), torch.zeros(2, 1))
    assert (plan.action.argmax(1) == 2).all()
    assert 0 < plan.metrics["plan_bad"] < 0.7
    assert all(field.isfinite().all() for field in (plan.mean, plan.std, plan.value, plan.state.mean))
    assert (plan.value <= -3).all() and (plan.value >= -10).all()
    counts = visits(planner, plan)[0]
    assert counts[0] <= counts[1] <= counts[2]


def test_broken_values_priors_and_models_leave_a_plan():
    class BrokenValue(Bandit):
        def terminal_value(self, z, eps, critics):
            return torch.full(z.shape[:-1], math.nan)

    class BrokenPrior(Bandit):
        def action_probs(self, z):
            return torch.full((*z.shape[:-1], 2), math.nan)

    for model, share in ((BrokenValue(0.0, 1.0), 1), (BrokenPrior(0.0, 1.0), 1), (Bandit(math.nan, math.nan), 1)):
        plan = run(make(2), model, torch.zeros(2, 1), explore=True)
        assert plan.metrics["plan_bad"] == share
        assert all(field.isfinite().all() for field in (plan.action, plan.mean, plan.std, plan.value))
        assert (plan.action.sum(1) == 1).all()


def test_what_is_behind_a_terminal_step_may_be_broken():
    class Void(Bandit):
        def terminal_value(self, z, eps, critics):
            return torch.full(z.shape[:-1], math.nan)

    for horizon in (1, 3):
        plan = run(make(2, horizon=horizon), Void(0.0, 1.0, cont=0.0), torch.zeros(2, 1))
        assert plan.metrics["plan_bad"] == 0 and (plan.action[:, 1] == 1).all()


def test_a_playout_that_breaks_does_not_rule_out_its_start():
    """Arm 1 pays, and a second step breaks by two arms of three: most playouts do, and the search finds the way."""

    class Narrow(Valueless):
        def step(self, z, action):
            first = torch.where(z[..., 0] == 0, action[..., 1], 0.0)
            second = torch.where((z[..., 0] == 2) & (action[..., 2] == 0), math.nan, 2.0 * (z[..., 0] == 2))
            return ModelStep(1 + first[..., None], first + second, torch.ones_like(first))

    plan = run(make(3, horizon=2, num_simulations=100), Narrow(), torch.zeros(4, 1))
    assert (plan.mean[:, 0].argmax(1) == 1).all() and (plan.mean[:, 1].argmax(1) == 2).all()
    assert 0 < plan.metrics["plan_bad"] < 0.5 and plan.value.isfinite().all()


def test_only_the_broken_environment_is():
    class Broken(Tables):
        def step(self, z, action):
            step = super().step(z, action)
            return step._replace(reward=step.reward.where(z[..., 0] != 1, math.nan))

    whole, broken = Tables(3, 3, 3), Broken(3, 3, 3)
    expected, plan = (run(make(3), model, whole.start()) for model in (whole, broken))
    assert_close(plan.mean[[0, 2]], expected.mean[[0, 2]])
    assert plan.metrics["plan_bad"] == pytest.approx(1 / 3)


def test_box_actions_are_refused():
    with pytest.raises(ConfigError, match="planner.name: mcts needs a discrete action space; use planner=mppi, cem"):
        MCTS(PlannerConfig(), 2, 0.99, 2, discrete=False)


def test_model_is_stepped_once_per_simulation_in_one_batch():
    shapes = []

    class Counting(Tables):
        def step(self, z, action):
            shapes.append(z.numel() // z.shape[-1])
            return super().step(z, action)

    planner, model = make(3, num_simulations=17), Counting(5, 3, 3)
    run(planner, model, model.start())
    assert shapes == [5] * 17 and planner.model_evaluations(judges(model)) == 17
    assert isinstance(planner, Planner)
    # Without a value, each simulation goes on to the horizon.
    shapes.clear()
    model.value = None
    run(planner, model, model.start())
    assert shapes == [5] * 51 and planner.model_evaluations(judges(model)) == 51
    assert planner.model_evaluations(judges(Bandit(0.0, 0.0, 0.0))) == 51


def test_depth_ends_at_the_horizon_and_the_warm_start_is_the_shifted_plan():
    planner, model = make(2, horizon=2, num_simulations=100), Tables(3, 2, 2)
    plan = run(planner, model, model.start())
    assert 1.5 < plan.metrics["plan_depth"] <= 2
    assert_close(plan.state.mean[:, 0], plan.mean[:, 1])
    assert_close(plan.state.mean[:, 1], torch.full((3, 2), 0.5))
    assert plan.state.elites.shape == (3, 0, 2, 2) == planner.init(3, CPU).elites.shape
    assert_close(planner.init(3, CPU).mean, torch.full((3, 2, 2), 0.5))
    assert plan.mean.shape == plan.std.shape == (3, 2, 2)
    assert_close(plan.mean.sum(-1), torch.ones(3, 2))
    # A single simulation knows one step; behind it all is open.
    short = run(make(2, horizon=3, num_simulations=1), Tables(3, 2, 3), model.start())
    assert_close(short.mean[:, 1:], torch.full((3, 2, 2), 0.5))
    assert (short.mean[:, 0].amax(1) == 1).all()


def test_most_visited_of_equals_is_the_one_of_higher_value():
    planner = make(2, horizon=1, num_simulations=2)
    plan = run(planner, Bandit(0.0, 1.0), torch.zeros(1, 1))
    assert visits(planner, plan).tolist() == [[1, 1]] and plan.action.tolist() == [[0, 1]]


def test_particles_are_averaged_after_the_search():
    """Two worlds, one of which ends at once where the other goes on: their mean return is not that of a mean world."""

    class Twins(Valueless):
        num_particles = 2

        def step(self, z, action):
            raise AssertionError("particles are told apart by rollouts alone")

        def rollout(self, z, actions):
            assert z.shape[:2] == actions.shape[1:3] == (2, 2)
            world = z.new_zeros(z.shape[:-1])
            world[1] = 1
            reward, cont = (part.expand(len(actions), *world.shape) for part in (1 + 2 * world, world))
            return ModelStep(z.expand(len(actions) + 1, *z.shape), reward, cont)

    planner = make(1, discount=1.0, horizon=4, num_simulations=3)
    plan = run(planner, Twins(), torch.zeros(2, 1))
    assert_close(plan.value, torch.full((2,), (1 + 4 * 3) / 2))
    assert planner.model_evaluations(judges(Twins()), 2) == 3 * 4 * 2


def test_values_without_a_model_of_them_are_returns_to_the_horizon():
    """All sequences pay the same here, at whatever depth their node is; at the horizon comes what the model has as a value."""

    class Worth(Bandit):
        def step(self, z, action):
            return super().step(z, action)._replace(z=z + 1)

        def terminal_value(self, z, eps, critics):
            return 8.0 * (z[..., 0] == 3)

    for count in (1, 2, 5, 20):
        plan = run(make(2, 0.5, num_simulations=count), Worth(1.0, 1.0), torch.zeros(2, 1))
        assert_close(plan.value, torch.full((2,), 1 + 0.5 + 0.25 + 0.125 * 8))
    ends = run(make(2, 0.5, num_simulations=20), Worth(1.0, 1.0, cont=0.5), torch.zeros(2, 1))
    assert_close(ends.value, torch.full((2,), 1 + 0.25 + 0.0625 + 0.25**3 * 8))


def test_playouts_side_by_side_are_averaged():
    """One action pays 1, the other nothing: a sequence at random is worth half of what is left, give or take its luck."""

    class Coin(Valueless):
        def step(self, z, action):
            return ModelStep(z, action[..., 1], torch.ones_like(action[..., 1]))

    def values(count: int) -> torch.Tensor:
        planner = make(2, discount=1.0, horizon=17, num_simulations=1, num_playouts=count)
        assert planner.model_evaluations(judges(Coin())) == 1 + 16 * count
        plan = run(planner, Coin(), torch.zeros(500, 1))
        return plan.value - plan.action[:, 1]

    one, many = values(1), values(16)
    assert_close(one.mean(), torch.tensor(8.0), atol=0.5, rtol=0)  # more than five standard errors
    assert_close(many.mean(), torch.tensor(8.0), atol=0.15, rtol=0)
    assert_close(one.std(), torch.tensor(2.0), atol=0.3, rtol=0)
    assert_close(many.std(), torch.tensor(0.5), atol=0.1, rtol=0)


class CartPole(Valueless):
    """Barto, Sutton and Anderson's cart with a pole, as Gymnasium steps it; 1 per step until it falls or leaves."""

    def step(self, z, action):
        x, v, angle, spin = z.unbind(-1)
        force = 10.0 * (action[..., 1] - action[..., 0])
        sin, cos = angle.sin(), angle.cos()
        push = (force + 0.05 * spin.square() * sin) / 1.1
        turn = (9.8 * sin - cos * push) / (0.5 * (4 / 3 - 0.1 * cos.square() / 1.1))
        speed_up = push - 0.05 * turn * cos / 1.1
        z = torch.stack((x + 0.02 * v, v + 0.02 * speed_up, angle + 0.02 * spin, spin + 0.02 * turn), -1)
        up = (z[..., 0].abs() < 2.4) & (z[..., 2].abs() < 0.2095)
        return ModelStep(z, torch.ones_like(x), up.float())


def test_balances_a_pole_without_prior_or_value():
    model, planner = CartPole(), make(2, 0.99, horizon=6, num_simulations=16)
    z = 0.1 * torch.rand(8, 4, generator=torch.Generator().manual_seed(0)) - 0.05
    chance = z
    for seed in range(40):
        step = model.step(z, run(planner, model, z, seed=seed).action)
        assert step.z.dtype == torch.float32 and step.cont.all()
        z = step.z
        chance = model.step(chance, F.one_hot(torch.randint(2, (8,)), 2).float()).z
    assert (chance[:, 2].abs() > 0.2095).float().mean() > 0.5  # at random, most poles lie long ago
