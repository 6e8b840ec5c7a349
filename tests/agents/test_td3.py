"""TD3: targets by hand, delayed policy, exploration, a known optimum, skipped updates, exact resumption."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from tests.trees import differences, leaves
from worldmpc.agents.td3 import TD3
from worldmpc.config import ConfigError, make_config
from worldmpc.types import Agent, EnvSpec, TransitionBatch

SPEC = EnvSpec("test", (3,), 2, 50)


def make(spec=SPEC, **overrides):
    return TD3(make_config("debug", agent="td3", **overrides), spec)


def make_batch(size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return TransitionBatch(
        obs=torch.randn(size, 3, generator=generator),
        action=torch.rand(size, 2, generator=generator) * 2 - 1,
        reward=torch.randn(size, generator=generator),
        next_obs=torch.randn(size, 3, generator=generator),
        terminated=(torch.arange(size) % 3 == 0).float(),
        discount=torch.full((size,), 0.9),
    )


def test_is_an_agent():
    agent = make()
    assert isinstance(agent, Agent) and agent.modes == ("explore", "eval") and agent.init_carry(3) == ()


def test_target():
    """r + 0.9 (1 - terminated) min of the slow critics at the slow policy's action with noise of 0.2, cut at 0.5, in [-1, 1]."""
    agent, batch = make(), make_batch()
    noise = {"next": torch.linspace(-5, 5, 16).view(8, 2)}
    action = (agent.target_actor(batch.next_obs) + (0.2 * noise["next"]).clamp(-0.5, 0.5)).clamp(-1, 1)
    q = agent.target_critic(torch.cat((batch.next_obs, action), -1))[..., 0]
    expected = batch.reward + 0.9 * (1 - batch.terminated) * torch.minimum(q[0], q[1])
    assert_close(agent.target(batch, noise), expected.detach())


def test_policy_and_targets_wait_for_the_critics():
    """With a delay of 3 nothing but the critics moves in updates 1, 2, 4 and 5; then the targets move by ``tau``."""
    agent = make(**{"td3.policy_delay": 3, "td3.tau": 0.1})
    for update in range(1, 7):
        before = {name: value.clone() for name, value in agent.model.state_dict().items()}
        metrics = agent.update(make_batch(seed=update))
        after = agent.model.state_dict()
        moved = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
        if update % 3:
            assert moved == {"critic"} and "pi_loss" not in metrics
            continue
        assert moved == {"critic", "actor", "target_critic", "target_actor"} and "pi_loss" in metrics
        for part in ("critic", "actor"):
            for name in getattr(agent, part).state_dict():
                slow, fast = before[f"target_{part}.{name}"], after[f"{part}.{name}"]
                assert_close(after[f"target_{part}.{name}"], slow + 0.1 * (fast - slow))


def test_the_policy_climbs_the_first_critic():
    agent, batch = make(**{"td3.policy_delay": 1, "optim.lr": 1e-2}), make_batch()
    agent.descent.optimizers["critic"].lrs[0].zero_()

    def q():
        return agent.critic(batch.obs, agent.actor(batch.obs))[..., 0].mean(-1)

    before = q()
    assert_close(agent.update(batch)["pi_loss"], -before[0])
    for _ in range(20):
        agent.update(batch)
    assert q()[0] > before[0]


@pytest.mark.parametrize("std", [0.0, 0.1, 5.0])
def test_exploration_noise(std):
    agent, obs = make(**{"td3.exploration_noise": std}), torch.randn(1, 3).expand(5000, 3)
    explore, best = (agent.act((), obs, mode).action for mode in ("explore", "eval"))
    assert (best == best[0]).all() and explore.abs().max() <= 1
    if std < 1:
        assert_close(explore.mean(0), best[0], atol=0.01, rtol=0)
        assert_close(explore.std(0), torch.full((2,), std), atol=0.01, rtol=0)
    else:
        assert (explore.abs() == 1).float().mean() > 0.7


def test_evaluations_leave_no_trace():
    agent = make()
    before = dict(leaves(agent.state_dict()))
    agent.act((), torch.randn(4, 3), "eval")
    assert all(torch.equal(value, before[name]) for name, value in leaves(agent.state_dict()))


@pytest.mark.parametrize("bad", [torch.nan, 1e9])
def test_bad_losses_change_nothing(bad):
    agent = make(**{"td3.policy_delay": 1})
    agent.update(make_batch())
    before = dict(leaves(agent.state_dict()))
    metrics = agent.update(make_batch()._replace(reward=torch.full((8,), bad)))
    after = dict(leaves(agent.state_dict()))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert all(name == "updates" or name.startswith("streams.") for name in changed)
    assert metrics["skipped_updates"] == 1 and agent.update(make_batch())["skipped_updates"] == 1


@pytest.mark.parametrize("updates", [3, 4])
def test_state_continues_exactly(updates):
    """Also between two updates of the policy."""
    agent, obs = make(**{"optim.schedule": "cosine"}), torch.randn(2, 3)
    for seed in range(updates):
        agent.update(make_batch(seed=seed))
        agent.act((), obs, "explore")
    resumed = make(seed=9, **{"optim.schedule": "cosine"})
    resumed.load_state_dict(agent.state_dict())
    metrics = [[one.update(make_batch(seed=seed)) for seed in (5, 6)][-1] for one in (agent, resumed)]
    assert differences(agent.state_dict(), resumed.state_dict()) == [] and differences(*metrics) == []
    assert torch.equal(agent.act((), obs, "explore").action, resumed.act((), obs, "explore").action)


def test_a_bandit_finds_its_best_action():
    """-(a - b)**2 with b = (0.3, -0.6), episodes of one step."""
    agent = make(**{"optim.lr": 1e-2, "td3.hidden": (32,), "td3.tau": 1.0})
    best, nothing, generator = torch.tensor([0.3, -0.6]), torch.zeros(64, 3), torch.Generator().manual_seed(0)
    for _ in range(500):
        action = torch.rand(64, 2, generator=generator) * 2 - 1
        reward = -(action - best).square().sum(-1)
        agent.update(TransitionBatch(nothing, action, reward, nothing, torch.ones(64), torch.full((64,), 0.9)))
    assert_close(agent.act((), torch.zeros(1, 3), "eval").action[0], best, atol=0.1, rtol=0)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            EnvSpec("gym/CartPole-v1", (4,), 2, 500, discrete=True),
            "agent: td3 needs a Box action space, gym/CartPole-v1 has Discrete actions",
        ),
        (EnvSpec("pixels", (3, 64, 64), 2, 50), "not supported, only vectors"),
    ],
)
def test_unfit_environments_are_refused(spec, message):
    with pytest.raises(ConfigError, match=message):
        make(spec)
