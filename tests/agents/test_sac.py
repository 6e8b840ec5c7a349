"""SAC: targets by hand, the price of entropy, closed-form optima, skipped updates, exact resumption."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from tests.trees import differences, leaves
from worldmpc.agents.sac import SAC
from worldmpc.config import ConfigError, make_config
from worldmpc.types import Agent, EnvSpec, TransitionBatch

BOX = EnvSpec("test", (3,), 2, 50)
DISCRETE = EnvSpec("test", (3,), 4, 50, discrete=True)
BOTH = pytest.mark.parametrize("spec", [BOX, DISCRETE], ids=["box", "discrete"])


def make(spec=BOX, **overrides):
    return SAC(make_config("debug", agent="sac", **overrides), spec)


def random_actions(spec, size, generator):
    if spec.discrete:
        return torch.eye(spec.action_dim)[torch.randint(spec.action_dim, (size,), generator=generator)]
    return torch.rand(size, spec.action_dim, generator=generator) * 2 - 1


def make_batch(spec, size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return TransitionBatch(
        obs=torch.randn(size, 3, generator=generator),
        action=random_actions(spec, size, generator),
        reward=torch.randn(size, generator=generator),
        next_obs=torch.randn(size, 3, generator=generator),
        terminated=(torch.arange(size) % 3 == 0).float(),
        discount=torch.full((size,), 0.9),
    )


@BOTH
def test_is_an_agent(spec):
    agent = make(spec)
    assert isinstance(agent, Agent) and agent.modes == ("explore", "eval") and agent.init_carry(3) == ()


def test_box_target():
    """r + 0.9 (1 - terminated) (min of the slow critics - alpha log pi), at the action that the noise gives."""
    agent, batch = make(BOX, **{"sac.alpha": 0.3}), make_batch(BOX)
    noise = agent.streams["update"].draw(agent.noise_specs(8))
    sample = agent.actor(batch.next_obs, noise["next"])
    q = agent.target_critic(torch.cat((batch.next_obs, sample.action), -1))[..., 0]
    expected = batch.reward + 0.9 * (1 - batch.terminated) * (torch.minimum(q[0], q[1]) - 0.3 * sample.log_prob)
    assert_close(agent.target(batch, torch.tensor(0.3), noise), expected.detach())


def test_discrete_target():
    """The same with an expectation over all actions."""
    agent, batch = make(DISCRETE), make_batch(DISCRETE)
    log_probs = agent.actor(batch.next_obs).log_softmax(-1)
    q = agent.target_critic(batch.next_obs)
    value = sum(log_probs[:, a].exp() * (torch.minimum(q[0, :, a], q[1, :, a]) - 0.3 * log_probs[:, a]) for a in range(4))
    expected = batch.reward + 0.9 * (1 - batch.terminated) * value
    assert_close(agent.target(batch, torch.tensor(0.3), {}), expected.detach())


@BOTH
def test_losses_reach_what_they_train_alone(spec):
    """Critics learn nothing from the policy's loss and the other way round; slow critics follow by ``tau``."""
    agent, batch = make(spec, **{"sac.tau": 0.1}), make_batch(spec)
    before = {name: value.clone() for name, value in agent.model.state_dict().items()}
    learned = {part: set(optimizer.names) for part, optimizer in agent.descent.optimizers.items()}
    assert all(name.startswith(f"{part}.") for part, names in learned.items() for name in names)
    assert set().union(*learned.values()) == {name for name, value in agent.model.named_parameters() if value.requires_grad}
    agent.update(batch)
    after = agent.model.state_dict()
    for name, value in agent.target_critic.state_dict().items():
        slow, fast = before[f"target_critic.{name}"], after[f"critic.{name}"]
        assert_close(value, slow + 0.1 * (fast - slow))
    agent.descent.optimizers["critic"].lrs[0].zero_()
    frozen = {name: value.clone() for name, value in agent.critic.state_dict().items()}
    agent.update(batch)
    assert all(torch.equal(value, frozen[name]) for name, value in agent.critic.state_dict().items())


@BOTH
def test_default_target_entropy(spec):
    assert make(spec).target_entropy == (0.5 * math.log(4) if spec.discrete else -2.0)
    assert make(spec, **{"sac.target_entropy": -0.5}).target_entropy == -0.5


@BOTH
@pytest.mark.parametrize(("target", "rises"), [(-50.0, False), (50.0, True)])
def test_temperature_moves_towards_the_target_entropy(spec, target, rises):
    agent = make(spec, **{"sac.target_entropy": target, "sac.alpha_init": 0.5})
    alphas = [agent.update(make_batch(spec, seed=seed))["alpha"].item() for seed in range(4)]
    assert alphas == sorted(alphas, reverse=not rises) and alphas[0] == pytest.approx(0.5) and alphas[3] != alphas[0]


@BOTH
def test_a_given_temperature_stays(spec):
    agent = make(spec, **{"sac.alpha": 0.3})
    metrics = [agent.update(make_batch(spec, seed=seed)) for seed in range(3)][-1]
    assert metrics["alpha"] == torch.tensor(0.3) and "alpha_loss" not in metrics
    assert not [name for name, _ in agent.model.named_parameters() if "alpha" in name]


@BOTH
def test_actions(spec):
    """Exploration samples, evaluation does not; both are valid actions."""
    agent, obs = make(spec), torch.randn(1, 3).expand(200, 3)
    explore, best = (agent.act((), obs, mode).action for mode in ("explore", "eval"))
    assert (best == best[0]).all() and not (explore == explore[0]).all()
    if spec.discrete:
        assert (explore.sum(-1) == 1).all() and ((explore == 0) | (explore == 1)).all()
        assert best[0].argmax() == agent.actor(obs)[0].argmax()
    else:
        assert explore.abs().max() <= 1
        assert_close(best, agent.actor(obs, torch.zeros(200, 2)).mean)


def test_discrete_exploration_follows_the_policy():
    agent, size = make(DISCRETE), 20_000
    with torch.no_grad():
        agent.actor[-1].bias += torch.tensor([1.0, 0.0, -1.0, 0.5])
    obs = torch.randn(1, 3).expand(size, 3)
    frequencies = agent.act((), obs, "explore").action.mean(0)
    assert_close(frequencies, agent.actor(obs)[0].softmax(-1).detach(), atol=5 * math.sqrt(0.25 / size), rtol=0)


def test_evaluations_leave_no_trace():
    agent = make()
    before = dict(leaves(agent.state_dict()))
    agent.act((), torch.randn(4, 3), "eval")
    assert all(torch.equal(value, before[name]) for name, value in leaves(agent.state_dict()))


@BOTH
@pytest.mark.parametrize("bad", [torch.nan, 1e9])
def test_bad_losses_change_nothing(spec, bad):
    agent = make(spec)
    agent.update(make_batch(spec))
    before = dict(leaves(agent.state_dict()))
    metrics = agent.update(make_batch(spec)._replace(reward=torch.full((8,), bad)))
    after = dict(leaves(agent.state_dict()))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert all(name == "updates" or name.startswith("streams.") for name in changed)
    assert metrics["skipped_updates"] == 1 and agent.update(make_batch(spec))["skipped_updates"] == 1


@BOTH
def test_state_continues_exactly(spec):
    agent, obs = make(spec, **{"optim.schedule": "cosine"}), torch.randn(2, 3)
    for seed in range(3):
        agent.update(make_batch(spec, seed=seed))
        agent.act((), obs, "explore")
    resumed = make(spec, seed=9, **{"optim.schedule": "cosine"})
    resumed.load_state_dict(agent.state_dict())
    metrics = [[one.update(make_batch(spec, seed=seed)) for seed in (5, 6)][-1] for one in (agent, resumed)]
    assert differences(agent.state_dict(), resumed.state_dict()) == [] and agent.updates == resumed.updates == 5
    assert differences(metrics[0] | {"skipped_updates": torch.zeros(())}, metrics[1] | {"skipped_updates": torch.zeros(())}) == []
    assert torch.equal(agent.act((), obs, "explore").action, resumed.act((), obs, "explore").action)


def bandit(spec, reward, updates, **overrides):
    """Train on one state, where episodes end with the first action."""
    base = {"optim.lr": 1e-2, "sac.hidden": (32,), "sac.tau": 1.0}
    agent, generator = make(spec, **{**base, **overrides}), torch.Generator().manual_seed(0)
    nothing = torch.zeros(32, 3)
    for _ in range(updates):
        action = random_actions(spec, 32, generator)
        agent.update(TransitionBatch(nothing, action, reward(action), nothing, torch.ones(32), torch.full((32,), 0.9)))
    return agent


def test_a_discrete_bandit_ends_at_the_softmax_of_its_rewards():
    """The policy of maximum entropy at temperature 0.5 is softmax(rewards / 0.5)."""
    rewards = torch.tensor([1.0, 0.0, 0.5, -1.0])
    agent = bandit(DISCRETE, lambda action: action @ rewards, 300, **{"sac.alpha": 0.5})
    assert_close(agent.actor(torch.zeros(3)).softmax(-1), (rewards / 0.5).softmax(-1), atol=0.03, rtol=0)


def test_a_discrete_bandit_reaches_its_target_entropy():
    rewards = torch.tensor([1.0, 0.0, 0.5, -1.0])
    agent = bandit(DISCRETE, lambda action: action @ rewards, 400, **{"sac.alpha_init": 0.2})
    log_probs = agent.actor(torch.zeros(3)).log_softmax(-1)
    assert_close(-(log_probs.exp() * log_probs).sum().item(), 0.5 * math.log(4), atol=0.05, rtol=0)


def test_a_box_bandit_finds_its_best_action():
    """-(a - b)**2 with b = (0.3, -0.6): the mean goes there, and its spread is that of entropy's price."""
    best = torch.tensor([0.3, -0.6])
    agent = bandit(BOX, lambda action: -(action - best).square().sum(-1), 400, **{"sac.alpha": 0.01})
    assert_close(agent.act((), torch.zeros(1, 3), "eval").action[0], best, atol=0.1, rtol=0)


def test_pixels_are_refused():
    with pytest.raises(ConfigError, match="not supported, only vectors"):
        make(EnvSpec("pixels", (3, 64, 64), 2, 50))
