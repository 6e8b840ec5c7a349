"""Agents used by hand: single observations, stored transitions, a table of networks, and agents from one mapping."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from worldmpc import create_agent
from worldmpc.agents import make_agent
from worldmpc.config import ConfigError, make_config
from worldmpc.training.checkpoint import save_checkpoint
from worldmpc.training.specs import spec_dict
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


def imagining(*references, games=1, **over):
    simulation = {"enabled": True, "opponent_agents": list(references)}
    return create_agent({"task": "hockey", "preset": "debug", "opponent_simulation": simulation, **over}, games=games)


def certain(agent, name, bin_):
    """Make an imagined opponent do one thing."""
    clone = agent.simulation.clones[agent.simulation.names.index(name)]
    with torch.no_grad():
        clone.net[-1].weight.zero_()
        clone.net[-1].bias.zero_().view(4, -1)[:, bin_] = 3.0


def belief(agent, env_id=0):
    return torch.softmax(agent._by_hand().carries[env_id].belief[0], -1)


def test_the_belief_follows_what_the_other_player_does():
    agent = imagining("weak", "still")
    certain(agent, "weak", 14)
    certain(agent, "still", 7)
    obs = np.zeros(18, np.float32)
    with pytest.raises(RuntimeError, match="observe_opponent: act in env_id 0 first"):
        agent.observe_opponent(obs, np.ones(4))
    agent.act_batch(obs[None])
    agent.observe_opponent(obs, np.ones(4))
    assert belief(agent)[0] > 0.9
    agent.act_batch(obs[None])
    agent.store_transition((obs, np.zeros(4), 0.0, obs, False, obs, np.ones(4)))
    assert belief(agent)[0] > 0.99
    agent.on_episode_start(2)
    agent.act_batch(obs[None])
    assert belief(agent).tolist() == pytest.approx([1 / 3] * 3)
    agent.observe_opponent(obs, np.zeros(4))
    assert belief(agent)[1] > 0.9
    agent.store_transition((obs, np.zeros(4), 0.0, obs, True, obs, np.ones(4)), winner=1)
    assert 0 not in agent._by_hand().carries
    with pytest.raises(RuntimeError, match="nobody is imagined"):
        agent_of(GAME).observe_opponent(obs, np.ones(4))


def test_references_begin_new_games_with_the_episodes():
    agent, obs = imagining("weak", games=2), torch.zeros(2, 18)

    def phase():
        return agent.simulation.demonstrations.carries["weak"][0].tolist()

    agent.collect_opponent_demonstrations(obs, obs)
    first = phase()
    agent.on_episode_end(1, env_id=1)
    assert phase()[0] == first[0] and phase()[1] != first[1]
    agent.collect_opponent_demonstrations(np.zeros((2, 18)), np.zeros((2, 3, 18)))  # three steps of one decision
    assert len(agent.simulation.buffers["weak"]) == 4


def test_windows_are_shaped_and_mirrored_as_configured():
    bonus = {"opponents.win_bonus": 8, "opponents.win_bonus_final": 8, "opponents.win_discount": 0.5}
    agent = create_agent({"task": "hockey", "preset": "debug", "replay.mirror": True, **bonus})
    obs = np.full(18, 0.25, np.float32)
    for step in range(4):
        agent.store_transition((obs, np.full(4, 0.5), 0.0, obs, step == 3), winner=1 if step == 3 else None)
    source = agent._by_hand().source
    rewards, signs = set(), set()
    for _ in range(50):
        batch = source.next()
        rewards |= set(batch.reward[batch.mask > 0].tolist())
        signs |= set(batch.obs[0, :, 1].sign().tolist())
    assert rewards == {0.0, 8.0, 4.0, 2.0} and signs == {1.0, -1.0}
    with pytest.raises(ConfigError, match="replay.mirror: toy/thing says of no symmetry"):
        make_agent(make_config("debug", **{"replay.mirror": True}), SPEC).train()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda one, obs: one.store_transition((obs, np.zeros(4), 0.0, obs, False)), "which imagined opponents need"),
        (
            lambda agent, obs: agent.store_transition((obs, np.zeros(4), 0.0, obs, False, obs, np.zeros(4)), winner=2),
            "winner: expected 1, 0, -1",
        ),
        (lambda one, obs: one.store_transition((obs, np.zeros(3), 0.0, obs, False, obs, np.zeros(4))), r"action: expected \[n, 4\]"),
        (lambda one, obs: one.store_transition((obs, np.zeros(4), np.nan, obs, False, obs, np.zeros(4))), "reward: expected finite"),
        (
            lambda agent, obs: agent.store_opponent_action(obs, np.full(4, np.nan), "weak"),
            "opponent_action: expected finite numbers, got 4",
        ),
        (lambda one, obs: one.store_opponent_action(np.zeros((2, 18)), np.zeros(4), 0), "as many views as actions, got 2 and 1"),
        (lambda one, obs: one.store_opponent_action(obs, np.zeros(3), 0), r"opponent_action: expected \[n, 4\] numbers, got \[1, 3\]"),
        (lambda one, obs: one.store_opponent_action(obs, np.zeros(4), True), "no opponent True"),
        (lambda one, obs: one.collect_opponent_demonstrations(obs, np.zeros(7)), r"obs_agent2: expected \[n, 18\]"),
        (lambda one, obs: one.collect_opponent_demonstrations(np.zeros((2, 18)), np.zeros((2, 18))), "expected views of 1 games"),
        (lambda one, obs: one.act_batch(np.zeros((1, 7))), r"states: expected \[n, 18\] numbers, got \[1, 7\]"),
        (lambda one, obs: one.act_batch(np.zeros((0, 18))), r"states: expected \[n, 18\] numbers, got \[0, 18\]"),
        (lambda one, obs: one.act_batch(np.zeros((2, 18)), env_ids=[0]), "expected 2 of each, all environments different"),
        (lambda one, obs: one.act_batch(np.zeros((2, 18)), env_ids=[0, 0]), "expected 2 of each, all environments different"),
        (
            lambda agent, obs: agent.rollout_dynamics_multi_step(torch.zeros(1, 16), torch.zeros(1, 2, 4), 3),
            "max_horizon: expected at most 2",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(call, message):
    with pytest.raises(ValueError, match=message):
        call(imagining("weak"), np.zeros(18, np.float32))


def test_numbers_of_numpy_name_opponents():
    agent = imagining("weak", "still")
    agent.store_opponent_action(np.zeros(18), np.zeros(4), np.int64(1))
    assert len(agent.simulation.buffers["still"]) == 1


def test_references_that_cannot_be_had_are_named():
    over = {"task": "hockey", "preset": "debug"}
    with pytest.raises(ConfigError, match="nowhere"):
        create_agent({**over, "opponent_simulation": {"enabled": True, "opponent_agents": ["TDMPC2:nowhere"]}})
    with pytest.raises(ConfigError, match="type: stands for agent"):
        create_agent({**over, "type": "sac", "agent": "td3"})
    with pytest.raises(ConfigError, match="unknown agent 'crossq'"):
        create_agent({**over, "type": "CrossQ"})
    with pytest.raises(ConfigError, match="^opponent_simulation.opponent_agents: 'self_play' is no known opponent(?!.*use.*self_play)"):
        create_agent({**over, "opponent_simulation": {"enabled": True, "opponent_agents": ["self_play"]}})
    with pytest.raises(ConfigError, match="games: expected at least 1"):
        create_agent(over, games=0)
    with pytest.raises(ConfigError, match="config: expected a RunConfig or a mapping of its keys, got NoneType"):
        create_agent(None)


def test_what_was_trained_with_other_keys_on_top(tmp_path):
    agent = create_agent({"task": "hockey", "preset": "debug"})
    facts = {"config": agent.config.to_dict(), "spec": spec_dict(agent.spec)}
    path = str(save_checkpoint(tmp_path, "agent", {"agent": agent.state_dict()}, facts))
    made = create_agent({"checkpoint_path": path, "type": "TDMPC2", "planner.horizon": 2, "seed": 5})
    assert (made.config.planner.horizon, made.config.seed) == (2, 5)
    with pytest.raises(ConfigError, match="preset: .* has its configuration"):
        create_agent({"checkpoint_path": path, "preset": "cpu"})
    with pytest.raises(ConfigError, match="type: .* holds agent=tdmpc2, not sac"):
        create_agent({"checkpoint_path": path, "type": "SAC"})
