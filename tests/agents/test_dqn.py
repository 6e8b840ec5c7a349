"""DQN: targets of its variants, exploration, skipped updates, exact resumption, and values that are known."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from tests.trees import differences, leaves
from worldmpc.agents.dqn import DQN
from worldmpc.config import ConfigError, make_config
from worldmpc.types import Agent, EnvSpec, Transition, TransitionBatch

SPEC = EnvSpec("test", (3,), 4, 50, discrete=True)


def make(spec=SPEC, **overrides):
    return DQN(make_config("debug", agent="dqn", **overrides), spec)


def make_batch(size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return TransitionBatch(
        obs=torch.randn(size, 3, generator=generator),
        action=torch.eye(4)[torch.randint(4, (size,), generator=generator)],
        reward=torch.randn(size, generator=generator),
        next_obs=torch.randn(size, 3, generator=generator),
        terminated=(torch.arange(size) % 3 == 0).float(),
        discount=torch.full((size,), 0.9),
    )


def test_is_an_agent():
    agent = make()
    assert isinstance(agent, Agent) and agent.modes == ("explore", "eval") and agent.init_carry(3) == ()


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dueling", [True, False])
def test_target(double, dueling):
    """The target network's value, of the action that the online one chooses (double) or of its own best (plain)."""
    agent, batch = make(**{"dqn.double": double, "dqn.dueling": dueling, "dqn.hidden": (16, 16)}), make_batch(200)
    with torch.no_grad():
        for parameter in agent.q.parameters():
            parameter += 0.3 * torch.randn(parameter.shape)
    slow, fast = agent.target_q(batch.next_obs), agent.q(batch.next_obs)
    own, other = slow.max(-1).values, slow[torch.arange(200), fast.argmax(-1)]
    assert not torch.equal(own, other)
    expected = batch.reward + 0.9 * (1 - batch.terminated) * (other if double else own)
    assert_close(agent.target(batch), expected)


def test_an_update_moves_chosen_values_towards_their_targets():
    agent, batch = make(**{"optim.lr": 1e-2, "dqn.target_every": 10_000}), make_batch()
    first = agent.update(batch)
    for _ in range(300):
        last = agent.update(batch)
    assert last["q_loss"] < 0.1 * first["q_loss"] and last["total_loss"] == last["q_loss"] and agent.updates == 301


def test_target_network_is_a_copy_every_so_many_updates():
    agent = make(**{"dqn.target_every": 3})
    for update in range(1, 8):
        before = [parameter.clone() for parameter in agent.target_q.parameters()]
        agent.update(make_batch(seed=update))
        pairs = zip(agent.target_q.parameters(), agent.q.parameters(), before, strict=True)
        for slow, fast, old in pairs:
            assert torch.equal(slow, fast if update % 3 == 0 else old)


def test_epsilon_follows_the_decisions_of_all_environments():
    """400 of 1000 simulator steps at action repeat 2 are 200 decisions: 20 calls for 10 environments."""
    spec = EnvSpec("test", (3,), 4, 50, action_repeat=2, discrete=True)
    agent = make(spec, steps=1000, **{"dqn.epsilon_fraction": 0.4, "dqn.epsilon_start": 1.0, "dqn.epsilon_end": 0.2})
    obs, seen = torch.randn(10, 3), []
    for _ in range(22):
        seen.append(agent.act((), obs, "explore").metrics["epsilon"].item())
        agent.act((), obs, "eval")
    assert_close(torch.tensor(seen), 1.0 - 0.8 * (torch.arange(22) / 20).clamp(max=1))


@pytest.mark.parametrize("epsilon", [0.0, 0.3, 1.0])
def test_random_actions_are_as_frequent_as_epsilon_says(epsilon):
    """Of many environments a share of 1 - epsilon + epsilon / 4 takes the best action, the others are uniform."""
    agent, size = make(**{"dqn.epsilon_start": epsilon, "dqn.epsilon_end": epsilon}), 20_000
    obs = torch.randn(1, 3).expand(size, 3)
    action = agent.act((), obs, "explore").action
    best = agent.act((), obs[:1], "eval").action[0]
    assert (action.sum(-1) == 1).all() and ((action == 0) | (action == 1)).all()
    expected = torch.where(best > 0, 1 - epsilon + epsilon / 4, epsilon / 4)
    assert_close(action.mean(0), expected, atol=5 * math.sqrt(0.25 / size), rtol=0)


def test_greedy_actions_need_no_noise():
    agent, obs = make(), torch.randn(5, 3)
    before = dict(leaves(agent.state_dict()))
    action = agent.act((), obs, "eval").action
    assert torch.equal(action.argmax(-1), agent.q(obs).argmax(-1))
    assert all(torch.equal(value, before[name]) for name, value in leaves(agent.state_dict()))


@pytest.mark.parametrize("bad", [torch.nan, 1e9])
def test_bad_losses_change_nothing(bad):
    agent = make(**{"dqn.target_every": 1})
    agent.update(make_batch())
    before = dict(leaves(agent.state_dict()))
    metrics = agent.update(make_batch()._replace(reward=torch.full((8,), bad)))
    after = dict(leaves(agent.state_dict()))
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"updates"}
    assert metrics["skipped_updates"] == 1 and agent.update(make_batch())["skipped_updates"] == 1


@pytest.mark.parametrize("dueling", [True, False])
def test_state_continues_exactly(dueling):
    overrides = {"dqn.dueling": dueling, "dqn.target_every": 2, "optim.schedule": "cosine"}
    agent, obs = make(**overrides), torch.randn(2, 3)
    for seed in range(3):
        agent.update(make_batch(seed=seed))
        agent.act((), obs, "explore")
    resumed = make(seed=9, **overrides)
    resumed.load_state_dict(agent.state_dict())
    for one in (agent, resumed):
        one.last = [one.update(make_batch(seed=seed)) for seed in (5, 6)]
    assert differences(agent.state_dict(), resumed.state_dict()) == [] and agent.explored == resumed.explored == 6
    assert differences(agent.last[1], resumed.last[1]) == []
    assert torch.equal(agent.act((), obs, "explore").action, resumed.act((), obs, "explore").action)


def test_the_learning_rate_follows_its_schedule():
    """Half of the way down after half of the updates, down at the end."""
    overrides = {"optim.lr": 0.1, "optim.schedule": "cosine", "optim.final_lr_scale": 0.2}
    agent, seen = DQN(make_config("debug", agent="dqn", **overrides), SPEC, total_updates=4), []
    for seed in range(5):
        agent.update(make_batch(seed=seed))
        seen.append(agent.descent.optimizers["q"].lrs[0].item())
    assert_close(torch.tensor(seen)[[0, 2, 4]], torch.tensor([0.1, 0.06, 0.02]))


def test_seeds_decide_everything():
    agents = [make(seed=seed) for seed in (1, 1, 2)]
    for agent in agents:
        agent.update(make_batch())
    assert differences(agents[0].state_dict(), agents[1].state_dict()) == []
    assert "model.q.q.0.weight" in differences(agents[0].state_dict(), agents[2].state_dict())


def chain(source, episodes, first_action, length=4):
    """Fill a source with random walks of a chain: action 0 ends the episode with reward 1, any other goes on, the last step pays 10."""
    generator = torch.Generator().manual_seed(0)
    no = torch.tensor([False])
    for _ in range(episodes):
        for place in range(length):
            action = torch.eye(4)[torch.randint(first_action, 4, (1,), generator=generator)]
            stop = bool(action[0, 0])
            reward = 1.0 if stop else 10.0 * (place == length - 1)
            over = torch.tensor([stop or place == length - 1])
            obs, after = (torch.eye(5)[[index]][:, 1:] for index in (place, min(place + 1, 4)))
            source.observe(Transition(obs, action, torch.tensor([reward]), over, no, after, ~no))
            if over:
                break


@pytest.mark.parametrize("n_step", [1, 3])
def test_values_of_a_chain(n_step):
    """With discount 0.5 going on is worth 10 / 8, 10 / 4, 10 / 2 and 10, and stopping 1, which walks of n-step sums never do."""
    spec = EnvSpec("chain", (4,), 4, None, discrete=True)
    overrides = {"env.discount": 0.5, "optim.lr": 1e-2, "dqn.target_every": 20, "train.seed_decisions": 1, "dqn.hidden": (32,)}
    agent = make(spec, **{**overrides, "dqn.n_step": n_step, "loss.batch_size": 32})
    source = agent.make_source(1, torch.Generator().manual_seed(0))
    chain(source, 80, first_action=int(n_step > 1))
    for _ in range(400):
        agent.update(source.next())
    q = agent.q(torch.eye(5)[:4, 1:])
    assert_close(q[:, 1:], torch.tensor([[1.25], [2.5], [5.0], [10.0]]).expand(4, 3), atol=0.2, rtol=0)
    if n_step == 1:
        assert_close(q[:, 0], torch.ones(4), atol=0.2, rtol=0)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (EnvSpec("gym/Pendulum-v1", (3,), 1, 200), "agent: dqn needs a discrete action space, gym/Pendulum-v1 has Box actions"),
        (EnvSpec("pixels", (3, 64, 64), 4, 200, discrete=True), "not supported, only vectors"),
    ],
)
def test_unfit_environments_are_refused(spec, message):
    with pytest.raises(ConfigError, match=message):
        make(spec)
