"""PPO as an agent: it learns, keeps to the protocol, and goes on bit for bit where it was."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import worldmpc
from tests.trees import differences
from worldmpc.agents.ppo import PPO
from worldmpc.config import ConfigError, make_config
from worldmpc.training.checkpoint import load_checkpoint, save_checkpoint
from worldmpc.training.evaluator import evaluate
from worldmpc.training.trainer import DivergenceError, make_state, train
from worldmpc.types import Agent, EnvSpec

SMALL = {"env.num_envs": 4, "ppo.rollout_steps": 16, "ppo.minibatch_size": 16, "ppo.hidden": [16]}


def make(task="toy/pointmass", **overrides):
    config = make_config("default", agent="ppo", **{**SMALL, **({"task": task} if isinstance(task, str) else {}), **overrides})
    envs = worldmpc.make_envs(task, config.env, seed=config.seed)
    return make_state(PPO(config, envs.spec, total_updates=1000), envs)


def test_satisfies_the_protocol():
    state = make()
    agent: Agent = state.agent
    assert isinstance(agent, Agent) and agent.modes == ("explore", "eval") and agent.init_carry(3) == ()
    source = agent.make_source(4, torch.Generator())
    assert source.seed_decisions == 0 and source.ready() == 0


def test_discount():
    assert make().agent.discount == 0.99
    assert make(**{"ppo.gamma": 0.5}).agent.discount == 0.5
    agent = make(**{"env.discount": 0.7}).agent
    assert agent.discount == agent.learner.config.gamma == 0.7


@pytest.mark.parametrize("task", ["toy/identity", "toy/identity-discrete"])
def test_learns_identity(task):
    """At random: 6.7, at best: 20."""
    settings = {"env.num_envs": 8, "ppo.rollout_steps": 32, "ppo.minibatch_size": 64, "ppo.hidden": [32], "ppo.gamma": 0.0}
    state = make(task, **settings, **{"optim.lr": 1e-2, "ppo.update_epochs": 8, "ppo.log_std_init": -0.7})
    with worldmpc.make_envs(task, worldmpc.EnvConfig(num_envs=10)) as envs:
        before = evaluate(state.agent, envs, 10).mean_return
        train(state, [], 3000)
        assert before < 13 and evaluate(state.agent, envs, 10).mean_return > 18


def test_learns_to_balance():
    """Episodes end when it falls: all rewards are 1, so that only the values of what follows can teach. Random: 18, best: 100."""
    settings = {"env.num_envs": 8, "ppo.rollout_steps": 64, "ppo.minibatch_size": 64, "ppo.hidden": [32]}
    state = make("toy/balance", **settings, **{"optim.lr": 5e-3, "ppo.update_epochs": 8})
    train(state, [], 5_000)
    with worldmpc.make_envs("toy/balance", worldmpc.EnvConfig(num_envs=10)) as envs:
        assert evaluate(state.agent, envs, 10).mean_return > 90


def test_acting():
    state = make("toy/identity-discrete")
    agent, obs = state.agent, state.envs.reset()
    first, second = (agent.act((), obs, "explore") for _ in range(2))
    assert first.action.shape == (4, 3) and torch.equal(first.action.sum(1), torch.ones(4)) and first.carry == ()
    assert not all(torch.equal(first.action, agent.act((), obs, "explore").action) for _ in range(10))
    distribution = agent.model.distribution(obs)
    assert torch.equal(second.extras["log_prob"], distribution.log_prob(second.action))
    assert torch.equal(second.extras["value"], agent.model.value(obs)) and not second.extras["value"].requires_grad
    assert torch.equal(agent.act((), obs, "eval").action, distribution.mode)


def test_evaluation_changes_nothing():
    one, two = make(), make()
    for state, index in ((one, 0), (two, 3)):
        train(state, [], 100)
        if index:
            with worldmpc.make_envs("toy/pointmass") as envs:
                assert evaluate(state.agent, envs, 2, index=3).returns == evaluate(state.agent, envs, 2, index=3).returns
        train(state, [], 300)
    assert not differences(one.state_dict(), two.state_dict())


def test_updates_come_after_every_rollout():
    state = make()
    counts = []
    train(state, [lambda current, metrics: counts.append((current.decisions, current.updates))], 192)
    assert [count for count in counts if count[0] % 64 == 0] == [(64, 16), (128, 32), (192, 48)]
    assert counts[0] == (4, 0) and counts[16] == (68, 16)
    assert PPO.count_updates(state.agent.config, 192) == PPO.count_updates(state.agent.config, 255) == 48


@pytest.mark.parametrize("stop_update", [None, 5, 8, 16])
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, stop_update):
    """In the middle of a rollout, of a pass, between two passes, and after the last update; through a checkpoint."""
    overrides = {"ppo.target_kl": 0.005, "optim.lr": 3e-3, "optim.schedule": "cosine", "ppo.anneal_clip": True}
    whole = make("toy/balance", **overrides)
    train(whole, [], 300)
    first = make("toy/balance", **overrides)
    if stop_update is not None:
        update = first.agent.update

        def counted(batch):
            first.stop = first.agent.updates + 1 == 16 + stop_update
            return update(batch)

        first.agent.update = counted
    train(first, [], 172)
    assert first.updates == (32 if stop_update is None else 16 + stop_update)
    save_checkpoint(tmp_path, "saved", first.state_dict(), {})
    second = make("toy/balance", **overrides)
    train(second, [], 40)  # whatever it did before does not matter
    second.load_state_dict(load_checkpoint(tmp_path / "saved")[0])
    train(second, [], 300)
    assert not differences(whole.state_dict(), second.state_dict())


def test_target_kl_stops_within_the_run():
    state = make(**{"ppo.target_kl": 1e-4, "optim.lr": 1e-2})
    applied = []
    update = state.agent.update
    state.agent.update = lambda batch: applied.append(update(batch)) or applied[-1]
    train(state, [], 128)
    flags = [int(metrics["applied"]) for metrics in applied]
    assert state.updates == 32 and flags[0] == flags[16] == 1 and 0 < sum(flags[:16]) < 16 and sum(flags[16:]) < 16
    assert flags[:16] == sorted(flags[:16], reverse=True)


def test_learning_rate_follows_the_schedule():
    state = make(**{"optim.schedule": "cosine", "optim.final_lr_scale": 0.5, "optim.lr": 1e-3})
    state.agent.total_updates = 32
    train(state, [], 128)
    expected = 1e-3 * (0.5 + 0.5 * (1 + math.cos(math.pi * 31 / 32)) / 2)  # of the last update, number 31 of 32
    assert math.isclose(state.agent.optimizer.param_groups[0]["lr"], expected, rel_tol=1e-6)


def test_learning_rate_of_the_configuration_holds_after_resuming():
    one, two = make(), make(**{"optim.lr": 1e-5})
    train(one, [], 64)
    two.load_state_dict(one.state_dict())
    train(two, [], 128)
    assert two.agent.optimizer.param_groups[0]["lr"] == 1e-5


def test_loading_shares_no_memory():
    one, two = make(), make()
    train(one, [], 64)
    two.agent.load_state_dict(one.agent.state_dict())
    train(two, [], 128)
    three = make()
    train(three, [], 64)
    assert not differences(one.agent.state_dict(), three.agent.state_dict())


def test_custom_losses_of_the_agent():
    state = make()

    def pull(policy, obs, actions, rewards, values, advantages):
        return policy.log_std.square().mean()

    state.agent.custom_losses.append(pull)
    train(state, [], 64)
    assert "custom/pull" in state.metrics


def test_divergence_stops_the_run_before_it_is_applied():
    state = make()
    train(state, [], 60)
    before = {name: value.clone() for name, value in state.agent.model.state_dict().items()}
    state.source.experience.reward[3] = math.nan
    with pytest.raises(DivergenceError, match="policy_loss is nan"):
        train(state, [], 64)
    assert not differences(before, state.agent.model.state_dict())


def test_seeds_differ_and_repeat():
    one, two, other = make(), make(), make(seed=2)
    for state in (one, two, other):
        train(state, [], 128)
    assert not differences(one.state_dict(), two.state_dict())
    assert differences(one.agent.model.state_dict(), other.agent.model.state_dict())


def test_images_are_refused():
    spec = EnvSpec("images", (3, 8, 8), 2, None)
    with pytest.raises(ConfigError, match="only vectors"):
        PPO(make_config(agent="ppo"), spec)


def test_spec_decides_the_distribution():
    spec = EnvSpec("any", (3,), 4, None)
    config = make_config(agent="ppo", **{"ppo.log_std_init": -0.5})
    box, choice = PPO(config, spec), PPO(config, dataclasses.replace(spec, discrete=True))
    assert box.model.log_std is not None and torch.equal(box.model.log_std, torch.full((4,), -0.5)) and choice.model.log_std is None
