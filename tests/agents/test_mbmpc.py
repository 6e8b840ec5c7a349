"""MBMPC and PETS: what is imitated, what is fitted when, planning with particles, and coming back from a checkpoint."""

from __future__ import annotations

import pytest
import torch

from tests.trees import leaves
from worldmpc.agents import make_agent
from worldmpc.agents.mbmpc import MBMPC, Seen
from worldmpc.config import ConfigError, make_config
from worldmpc.envs import make_envs
from worldmpc.losses import behaviour_loss, behaviour_targets
from worldmpc.training.trainer import make_state, train
from worldmpc.types import EnvSpec, TransitionBatch

RANDOM = {"name": "random_shooting", "num_pi_trajs": 0}
BOX, DISCRETE = EnvSpec("x", (3,), 2, 50), EnvSpec("x", (3,), 2, 50, discrete=True)


def make(agent="mbmpc", spec=BOX, **overrides) -> MBMPC:
    return MBMPC(make_config("debug", agent=agent, **overrides), spec)


def start(agent="mbmpc", task="toy/pointmass", num_envs=1, **overrides):
    config = make_config("debug", agent=agent, task=task, **{"env.num_envs": num_envs, "mbmpc.fit_every": 60, **overrides})
    envs = make_envs(task, config.env, seed=1)
    return make_state(make_agent(config, envs.spec), envs)


def transitions(rows=6, **extras) -> TransitionBatch:
    generator = torch.Generator().manual_seed(0)
    obs, action = torch.randn(rows, 3, generator=generator), torch.rand(rows, 2, generator=generator)
    zeros = torch.zeros(rows)
    return TransitionBatch(obs, action, zeros + 1, obs + 0.1, zeros, zeros + 0.9, extras)


def test_cloning_follows_the_plan_where_there_was_one():
    mean = torch.rand(6, 2)
    mean[:2] = torch.nan  # random decisions
    batch = transitions(plan_mean=mean)
    action, weight = behaviour_targets(batch, torch.zeros(6), "bc", 1.0)
    assert weight.tolist() == [0, 0, 1, 1, 1, 1] and torch.equal(action[2:], mean[2:]) and action.isfinite().all()
    log_prob = torch.arange(6.0)
    assert float(behaviour_loss(log_prob, weight)) == -(2 + 3 + 4 + 5) / 4
    assert float(behaviour_loss(log_prob, torch.zeros(6))) == 0.0  # no plan in the whole batch


def test_advantages_weigh_the_actions_taken():
    batch, advantage = transitions(), torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0, 30.0])
    action, weight = behaviour_targets(batch, advantage, "awr", 0.5)
    standard = (advantage - advantage.mean()) / advantage.std(correction=0)
    torch.testing.assert_close(weight, (standard / 0.5).exp().clamp(max=20.0))
    assert torch.equal(action, batch.action) and (weight.diff() >= 0).all()


@pytest.mark.parametrize("num_envs", [1, 3])
def test_fits_come_at_fixed_distances(num_envs):
    state = start(num_envs=num_envs)
    at = []
    train(state, [lambda state, _: at.append((state.updates, state.decisions))], 200)
    assert state.source.seed_decisions == 50 and state.updates == state.decisions // 60 == state.agent.updates == 3
    firsts = [next(decisions for updates, decisions in at if updates == number) for number in (1, 2, 3)]
    assert firsts == [-(-due // num_envs) * num_envs for due in (50, 120, 180)]  # the first with the end of the seed phase
    assert {"dynamics_holdout_loss", "dynamics_epochs", "value_loss", "policy_loss", "total_loss"} <= state.metrics.keys()
    batch = state.source.next()
    assert len(batch.transitions.obs) == state.decisions and batch.windows is None


def test_a_long_seed_phase_ends_with_one_fit_and_all_updates_of_the_policy():
    state = start(**{"train.seed_decisions": 200, "mbmpc.fit_every": 50, "mbmpc.gradient_steps": 3})
    train(state, [], 199)
    assert state.updates == 0
    train(state, [], 200)
    assert state.updates == state.agent.updates == 4 and state.agent.imitation.descent.updates == 4 * 3
    train(state, [], 250)
    assert state.updates == 5 and state.agent.imitation.descent.updates == 5 * 3


@pytest.mark.parametrize("decisions", [3, 7, 9])
def test_a_fit_is_due_at_the_very_decision(decisions):
    """Also where 1 / fit_every is no finite decimal."""
    state = start(**{"train.seed_decisions": 0, "mbmpc.fit_every": decisions, "mbmpc.learn_policy": False, "planner": RANDOM})
    source = state.agent.make_source(1, torch.Generator())
    source.replay.num_windows = lambda: 1
    for count in range(1, 5):
        source.decisions = decisions * count - 1
        assert source.ready() == 0
        source.decisions += 1
        assert source.ready() == 1
        source.updates += 1


@pytest.mark.parametrize("task", ["toy/pointmass", "toy/identity-discrete"])
@pytest.mark.parametrize("agent", ["mbmpc", "pets"])
def test_resumed_equals_uninterrupted(agent, task):
    state, other = start(agent, task, planner="cem"), start(agent, task, planner="cem")
    train(state, [], 130)
    other.load_state_dict(state.state_dict())
    for one in (state, other):
        train(one, [], 190)
    torch.testing.assert_close(dict(leaves(state.state_dict())), dict(leaves(other.state_dict())), rtol=0, atol=0, equal_nan=True)


def test_value_and_dynamics_learn_what_is_there():
    """Constant reward 1, discount 0.9, no end: the value is 10 everywhere, and one step adds 0.1 to each observation."""
    agent = make(**{"env.discount": 0.9, "mbmpc.gradient_steps": 400, "mbmpc.tau": 0.2, "optim.lr": 1e-2, "dynamics.max_epochs": 100})
    for _ in range(3):
        metrics = agent.update(Seen(transitions(64), None))
    batch = transitions(64)
    assert abs(float(metrics["value_mean"]) - 10.0) < 1.0
    step = agent.planning.step(batch.obs, batch.action)
    torch.testing.assert_close(step.z, batch.next_obs, atol=0.02, rtol=0)
    torch.testing.assert_close(step.reward, batch.reward, atol=0.02, rtol=0)


@pytest.mark.parametrize("spec", [BOX, DISCRETE])
def test_modes_of_acting(spec):
    agent, obs = make(spec=spec), torch.randn(4, 3)
    carry = agent.init_carry(4)
    plan, prior = agent.act(carry, obs, "eval"), agent.act(carry, obs, "prior")
    assert plan.action.shape == prior.action.shape == (4, 2) and "plan_mean" in plan.extras and not prior.extras
    assert torch.equal(prior.action, agent.act(carry, obs, "prior").action)
    assert make("pets", spec).modes == ("explore", "eval") and agent.modes == ("explore", "eval", "prior")


def test_particles_sample_and_repeat_with_the_stream():
    one, other, obs = make("pets"), make("pets"), torch.randn(2, 3)
    first = one.act(one.init_carry(2), obs, "explore")
    assert torch.equal(first.action, other.act(other.init_carry(2), obs, "explore").action)
    assert not torch.equal(first.action, one.act(one.init_carry(2), obs, "explore").action)
    one.reset_eval_noise(3)
    other.reset_eval_noise(3)
    assert torch.equal(one.act(one.init_carry(2), obs, "eval").action, other.act(other.init_carry(2), obs, "eval").action)


@pytest.mark.parametrize(
    ("agent", "overrides", "message"),
    [
        ("mbmpc", {"dynamics.name": "analytic"}, "dynamics.name: agent=mbmpc learns dynamics.*use agent=mpc"),
        ("pets", {"planner.name": "policy_guided"}, "policy_guided needs a policy prior, and agent=pets has none.*planner=cem"),
        ("pets", {"dynamics.particles": 3}, r"dynamics.particles: expected a multiple of dynamics.members \(2\), got 3"),
        ("mbmpc", {"mbmpc.learn_policy": False}, "policy_guided needs a policy prior.*mbmpc.learn_policy=false"),
        ("mbmpc", {"compile": True}, "compile: only agent=tdmpc2, tdmpc_square, bmpc, boom and director have it"),
        ("mbmpc", {"planner.mpc": False}, "planner.mpc: mbmpc.policy_loss=bc imitates plans.*use mbmpc.policy_loss=awr"),
        ("mbmpc", {"mbmpc.hidden": []}, "mbmpc.hidden: expected at least one width"),
    ],
)
def test_what_cannot_be_says_what_to_use(agent, overrides, message):
    with pytest.raises(ConfigError, match=message):
        make_config("debug", agent=agent, **overrides)
