"""Agents used by hand: single observations, stored transitions, a table of networks, and agents from one mapping."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from worldmpc import create_agent
from worldmpc.agents import make_agent
from worldmpc.config import ConfigError, make_config
from worldmpc.types import EnvSpec, Seat

SPEC = EnvSpec("toy/thing", (3,), 2, 20)
GAME = EnvSpec("hockey/self-play", (18,), 4, 251, other=Seat((18,), 4))


def agent_of(spec=SPEC):
    return make_agent(make_config("debug"), spec)


def test_a_batch_of_observations_is_answered_as_one_by_one():
    batched, single = agent_of(), agent_of()
    states = np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3)
    actions = batched.act_batch(states, deterministic=True)
    expected = single.act(single.init_carry(2), torch.from_numpy(states), "eval").action
    assert actions.shape == (2, 2) and np.array_equal(actions, expected.numpy())


def test_plans_go_on_until_a_new_episode_begins():
    agent, state = agent_of(), np.zeros(3, np.float32)
    agent.act_batch(state[None], deterministic=True)
    warm = agent._by_hand().carries[0].plan.mean.clone()
    assert bool(warm.any())
    agent.act_batch(state[None], deterministic=True, t0s=[True])
    agent.on_episode_end(1)
    assert 0 not in agent._by_hand().carries
    agent.act_with_stats(state, env_id=0)
    agent.on_episode_start(2)
    assert 0 not in agent._by_hand().carries


def test_stats_say_what_the_plan_expects():
    action, stats = agent_of().act_with_stats(np.zeros(3), deterministic=True)
    assert action.shape == (2,) and {"plan_value", "plan_std", "plan_bad"} <= stats.keys()
    assert all(isinstance(value, float) for value in stats.values())


def test_exploring_differs_from_evaluating():
    agent = agent_of()
    assert not np.array_equal(agent.act_with_stats(np.zeros(3))[0], agent.evaluate(np.zeros(3), t0=True))


def test_stored_transitions_are_learned_from():
    agent = agent_of()
    assert agent.train(3) == []
    for step in range(12):
        agent.store_transition((np.full(3, step), np.zeros(2), float(step), np.full(3, step + 1), step == 11))
    replay = agent._by_hand().source.replay
    assert len(replay) == 12
    batch = replay.sample(torch.linspace(0, 0.999, 200, dtype=torch.float64))
    assert torch.equal(batch.obs[1][batch.mask[0] > 0], batch.obs[0][batch.mask[0] > 0] + 1)
    assert torch.equal(batch.obs[0, :, 0], batch.reward[0])
    before = {name: value.clone() for name, value in agent.model.state_dict().items()}
    metrics = agent.train(2)
    assert len(metrics) == 2 and agent.updates == 2
    assert any(not torch.equal(value, before[name]) for name, value in agent.model.state_dict().items())


def test_environments_are_kept_apart():
    agent = agent_of()
    agent.num_hand_envs = 2
    for step in range(10):  # the transitions of two environments in turn, which must not become one trajectory
        for env in (0, 1):
            agent.store_transition((np.full(3, 100 * env + step), np.zeros(2), 0.0, np.full(3, 100 * env + step + 1), False), env_id=env)
    batch = agent._by_hand().source.replay.sample(torch.rand(200, dtype=torch.float64))
    assert torch.equal(batch.obs[1:], batch.obs[:-1] + 1)


def test_draws_close_a_game_and_winners_are_known_of_all_its_steps():
    agent = agent_of(GAME)
    for game, (winner, length) in enumerate([(0, 3), (1, 4), (-1, 2)]):
        for step in range(length):
            last = step == length - 1
            obs = np.full(18, 10 * game + step, np.float32)
            agent.store_transition((obs, np.zeros(4), 0.0, obs + 1, last and winner != 0), winner if last else None)
    replay = agent._by_hand().source.replay
    batch = replay.sample(torch.linspace(0, 0.999, 300, dtype=torch.float64), 1)
    games = (batch.obs[0, :, 0] // 10).long()
    assert torch.equal(batch.extras["winner"][0], torch.tensor([0.0, 1.0, -1.0])[games])
    assert torch.equal(batch.extras["left"][0], torch.tensor([2.0, 3.0, 1.0])[games] - batch.obs[0, :, 0] % 10)
    assert torch.equal(batch.truncated[0], ((games == 0) & (batch.obs[0, :, 0] == 2)).float())


def test_wrong_transitions_are_refused():
    with pytest.raises(ValueError, match="expected \\(state, action, reward, next_state, done\\)"):
        agent_of().store_transition((np.zeros(3), np.zeros(2), 0.0, np.zeros(3)))
    with pytest.raises(ValueError, match="env_id below 1"):
        agent_of().store_transition((np.zeros(3), np.zeros(2), 0.0, np.zeros(3), False), env_id=1)


def test_the_table_of_networks_adds_up():
    agent = agent_of()
    rows = [line.split() for line in agent.log_architecture().splitlines()]
    counts = {name: int(count.replace(",", "")) for name, count in rows}
    total = counts.pop("total")
    assert total == sum(counts.values()) == sum(parameter.numel() for parameter in agent.model.parameters() if parameter.requires_grad)


def test_an_agent_from_one_mapping():
    over = {"enabled": True, "opponent_agents": ["weak", "still"]}
    agent = create_agent({"task": "hockey", "type": "TDMPC2", "preset": "debug", "seed": 4, "opponent_simulation": over}, games=2)
    assert agent.config.seed == 4 and agent.spec.other == Seat((18,), 4)
    agent.collect_opponent_demonstrations(torch.zeros(2, 18), torch.zeros(2, 18))
    assert len(agent.simulation.buffers["weak"]) == 2
    obs, action = agent.simulation.buffers["still"].draw(torch.zeros(1))
    assert not bool(action.any()) and obs.shape == (1, 18)


def test_one_argument_pairs_demonstrations_with_what_was_last_acted_on():
    agent = create_agent({"task": "hockey", "preset": "debug", "opponent_simulation": {"enabled": True, "opponent_agents": ["still"]}})
    with pytest.raises(RuntimeError, match="act on own views first"):
        agent.collect_opponent_demonstrations(torch.zeros(18))
    seen = np.linspace(0, 1, 18, dtype=np.float32)
    agent.act_batch(seen[None])
    agent.collect_opponent_demonstrations(torch.zeros(18))
    assert np.allclose(agent.simulation.buffers["still"].draw(torch.zeros(1))[0].numpy(), seen[None])


def test_references_that_cannot_be_had_are_named():
    over = {"task": "hockey", "preset": "debug"}
    with pytest.raises(ConfigError, match="nowhere"):
        create_agent({**over, "opponent_simulation": {"enabled": True, "opponent_agents": ["TDMPC2:nowhere"]}})
    with pytest.raises(ConfigError, match="type: stands for agent"):
        create_agent({**over, "type": "sac", "agent": "td3"})
    with pytest.raises(ConfigError, match="unknown agent 'crossq'"):
        create_agent({**over, "type": "CrossQ"})
