"""The collector packs what really happened, and goes on where it was."""

from __future__ import annotations

import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv

import worldmpc
from tests.trees import differences
from worldmpc.config import ConfigError, EnvConfig
from worldmpc.data.rollout import Experience
from worldmpc.envs.toy import Counter
from worldmpc.models.actor_critic import ActorCritic
from worldmpc.training.collector import RolloutCollector


def make(task="toy/balance", steps=16, num_envs=3, seed=1, policy=None):
    envs = worldmpc.make_envs(task, EnvConfig(num_envs=num_envs))
    spec = envs.spec
    policy = policy or ActorCritic(spec.obs_shape[0], spec.action_dim, (8,), spec.discrete)
    return RolloutCollector(envs, policy, Experience(steps, num_envs, spec.obs_shape, spec.action_dim), seed=seed)


def test_fills_the_rollout_and_returns_what_ended():
    collector = make("toy/counter", steps=20, num_envs=2)
    stats, steps = collector.collect()
    assert collector.experience.ready_for_training and steps == collector.agent_steps == 40
    # Episodes of 3, 1, 5 and 2 steps whose rewards count them: 6, 1, 15, 3; twenty steps are 3 1 5 2 3 1 5 in each environment.
    lengths, returns = {3: 6, 1: 1, 5: 15, 2: 3}, sorted([6, 1, 15, 3, 6, 1, 15] * 2)
    assert sorted(stats["episode_return"]) == returns and [lengths[length] for length in stats["episode_length"]] == stats["episode_return"]
    assert sorted(stats["episode_success"]) == [0.0] * 8 + [1.0] * 6


def test_transitions_are_real_and_carry_what_the_policy_said():
    collector = make("toy/counter", steps=12)
    collector.collect()
    rollout = collector.experience
    assert torch.equal(rollout.next_obs, rollout.obs + torch.tensor([1.0, 0, 0]))  # in the counting environment
    ends = rollout.terminated | rollout.truncated
    assert bool(ends.any()) and torch.equal(rollout.obs[1:][~ends[:-1]], rollout.next_obs[:-1][~ends[:-1]])
    assert torch.equal(rollout.obs[1:, :, 0][ends[:-1]], torch.zeros(int(ends[:-1].sum())))
    with torch.no_grad():
        _, log_prob, _, value, _ = collector.policy(rollout.obs, None, rollout.action)
    assert torch.allclose(log_prob, rollout.log_prob, atol=1e-6) and torch.allclose(value, rollout.value, atol=1e-6)


def test_episodes_go_on_from_one_rollout_to_the_next():
    collector = make("toy/counter", steps=2, num_envs=1)
    returns = [stats["episode_return"] for stats in (collector.collect()[0] for _ in range(6))]
    assert returns == [[], [6.0, 1.0], [], [], [15.0], [3.0]] and collector.agent_steps == 12


def test_a_number_of_steps():
    collector = make(steps=16, num_envs=3)
    assert collector.collect(10)[1] == 12 and collector.experience.filled == 4
    assert collector.collect()[1] == 36 and collector.experience.ready_for_training
    assert collector.collect(1000)[1] == 48  # the full rollout gives way to the next, which ends the collecting


def test_reset_steps_of_vector_environments_do_not_count():
    envs = worldmpc.make_envs(SyncVectorEnv([Counter, lambda: Counter(lengths=(2, 4))], autoreset_mode=AutoresetMode.NEXT_STEP))
    experience = Experience(12, 2, (3,), 1)
    collector = RolloutCollector(envs, ActorCritic(3, 1, (8,)), experience)
    _, steps = collector.collect()
    assert steps == collector.agent_steps == int(experience.valid.sum()) < 24
    batch = experience.flat(experience.reward)
    assert torch.equal(batch.reward, batch.obs[:, 0] + 1)


def test_environments_that_were_reset_are_not_reset_again():
    collector = make("toy/counter", num_envs=1)
    collector.vecenv.reset()
    collector.collect()
    assert collector.experience.obs[0, 0, 1] == 0  # first episode


def test_noise_depends_on_the_seed_alone():
    before = torch.get_rng_state()
    one, two, other = make(seed=1), make(seed=1), make(seed=2)
    for collector in (one, two, other):
        collector.collect()
    assert torch.equal(one.experience.action, two.experience.action) and not torch.equal(one.experience.action, other.experience.action)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("task", ["toy/balance", "toy/identity-discrete"])
def test_interrupted_and_resumed_equals_uninterrupted(task):
    whole, first, second = (make(task, steps=7) for _ in range(3))
    for _ in range(3):
        stats = whole.collect()[0]
    first.collect()
    first.collect()
    second.load_state_dict(first.state_dict())
    assert second.collect()[0] == stats
    assert not differences(whole.state_dict(), second.state_dict())
    assert not differences(whole.experience.state_dict(), second.experience.state_dict())


def test_environments_that_cannot_be_resumed_begin_afresh():
    one, two = make("toy/counter", steps=3, num_envs=1), make("toy/counter", steps=3, num_envs=1)
    one.collect(2)
    two.vecenv.reset()  # its episodes are numbered over the life of the object
    with pytest.warns(UserWarning, match="not resumed exactly"):
        two.load_state_dict(one.state_dict())
    returns = two.collect()[0]["episode_return"] + two.collect()[0]["episode_return"]
    assert returns[0] == 15.0 and two.experience.obs[0, 0, 0] == 3  # five steps from the beginning, nothing of the two before


def test_any_callable_of_the_call_shape():
    """A policy without ``eps`` samples by itself."""

    def policy(obs, state, action=None):
        assert state is None and action is None
        return torch.full((len(obs), 1), 0.5), torch.zeros(len(obs)), torch.zeros(len(obs)), obs[:, 0], "whatever"

    collector = make(policy=policy)
    collector.collect()
    assert collector.experience.action.unique().tolist() == [0.5]
    assert torch.equal(collector.experience.value, collector.experience.obs[..., 0])


def test_a_rollout_for_something_else_is_refused():
    collector = make()
    for experience in (Experience(4, 2, (1,), 1), Experience(4, 3, (2,), 1), Experience(4, 3, (1,), 2)):
        with pytest.raises(ConfigError, match="toy/balance has"):
            RolloutCollector(collector.vecenv, collector.policy, experience)
