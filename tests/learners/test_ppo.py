"""The update of PPO alone: what it returns, custom losses, and what is never applied."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math

import pytest
import torch

from worldmpc.config import ConfigError, PPOConfig
from worldmpc.data.rollout import Experience
from worldmpc.data.stream import minibatches
from worldmpc.learners.ppo import PPOOptimizer
from worldmpc.models.actor_critic import ActorCritic
from worldmpc.on_policy import LossError, gae
from worldmpc.types import RolloutBatch, Transition

KEYS = {"policy_loss", "value_loss", "entropy_loss", "total_loss", "approx_kl", "clipfrac"}
CONFIG = PPOConfig(minibatch_size=8, update_epochs=2)


def make(config=CONFIG, discrete=False, lr=1e-2, **kwargs):
    policy = ActorCritic(3, 2, (16,), discrete)
    return PPOOptimizer(policy, torch.optim.Adam(policy.parameters(), lr=lr), "cpu", config, **kwargs)


def rollout(ppo, steps=8, envs=2, seed=0, reward=None):
    """A full rollout of random observations, with episodes of four steps that end by truncation, then by termination."""
    generator = torch.Generator().manual_seed(seed)
    experience = Experience(steps, envs, (3,), 2)
    obs = torch.randn(envs, 3, generator=generator)
    for step in range(steps):
        with torch.no_grad():
            action, log_prob, _, value, _ = ppo.policy(obs, eps=torch.randn(envs, 2, generator=generator))
        following = torch.randn(envs, 3, generator=generator)
        got = torch.randn(envs, generator=generator) if reward is None else reward(obs, action)
        terminated, truncated = torch.full((envs,), step % 8 == 7), torch.full((envs,), step % 8 == 3)
        extras = {"log_prob": log_prob, "value": value}
        experience.add(Transition(obs, action, got, terminated, truncated, following, torch.ones(envs, dtype=torch.bool), extras))
        obs = torch.randn(envs, 3, generator=generator) if step % 4 == 3 else following
    return experience


def batch_of(ppo):
    return ppo.prepare(rollout(ppo))


def parameters(ppo):
    return torch.cat([parameter.detach().flatten() for parameter in ppo.policy.parameters()]).clone()


def test_prepare_bootstraps_from_the_values_of_what_followed():
    ppo = make()
    experience = rollout(ppo)
    with torch.no_grad():
        following = ppo.policy.value(experience.next_obs)
    assert torch.allclose(following[0], experience.value[1], atol=1e-6) and not torch.allclose(following[3], experience.value[4])
    ended = (experience.terminated | experience.truncated).float()
    expected = gae(experience.reward, experience.value, following, experience.terminated.float(), ended, CONFIG.gamma, CONFIG.gae_lambda)
    batch = ppo.prepare(experience)
    assert torch.allclose(batch.advantage, expected.flatten(), atol=1e-6)
    assert torch.equal(batch.returns, batch.advantage + batch.value) and not batch.returns.requires_grad


@pytest.mark.parametrize("discrete", [False, True])
def test_losses_have_their_names_and_add_up(discrete):
    config = dataclasses.replace(CONFIG, ent_coef=0.1, vf_coef=0.7)
    ppo = make(config, discrete)
    batch = batch_of(ppo)
    found = ppo.compute_ppo_loss(batch.obs, batch.action, batch.log_prob, batch.advantage, batch.returns, batch.value)
    assert set(found) == KEYS and all(value.shape == () for value in found.values())
    assert torch.allclose(found["total_loss"], found["policy_loss"] + 0.7 * found["value_loss"] + 0.1 * found["entropy_loss"])
    # The policy is still the one that acted: ratios are 1, and standardised advantages have mean 0.
    assert abs(float(found["policy_loss"].detach())) < 1e-5 and float(found["clipfrac"]) == 0 and abs(float(found["approx_kl"])) < 1e-6


def test_update_trains_in_passes_and_clears():
    ppo = make()
    seen = []
    step = ppo.step
    ppo.step = lambda batch, *args, **kwargs: seen.append(batch) or step(batch, *args, **kwargs)
    before, experience = parameters(ppo), rollout(ppo)
    stats = ppo.update(experience)
    assert len(seen) == 2 * minibatches(16, 8) and all(len(batch.reward) == 8 for batch in seen)
    assert set(stats) >= KEYS and all(isinstance(value, float) for value in stats.values()) and stats["applied"] == 1.0
    assert not torch.equal(before, parameters(ppo)) and not experience.ready_for_training
    ppo.update(rollout(ppo), update_epochs=5)
    assert len(seen) == 4 + 10
    with pytest.raises(ConfigError, match="fill it"):
        ppo.update(experience)


def test_custom_loss_is_added_and_called_with_keywords():
    ppo = make()
    calls = []

    def curiosity_loss(*, policy, obs, actions, rewards, values, advantages):
        calls.append((policy, obs, actions, rewards, values, advantages))
        return 3.0 * policy.log_std.sum() + 100.0

    batch = batch_of(ppo)
    plain = make().step(batch)
    before = ppo.policy.log_std.detach().clone()
    found = ppo.step(batch, [curiosity_loss])
    assert len(calls) == 1 and calls[0][0] is ppo.policy
    assert [part.shape for part in calls[0][1:]] == [(16, 3), (16, 2), (16,), (16,), (16,)]
    assert torch.equal(calls[0][3], batch.reward) and torch.equal(calls[0][5], batch.advantage)
    assert float(found["custom/curiosity_loss"]) == 100.0 and math.isclose(
        float(found["total_loss"]), float(plain["total_loss"]) + 100, rel_tol=1e-6
    )
    assert all(torch.equal(found[name], plain[name]) for name in KEYS - {"total_loss"})
    assert bool((ppo.policy.log_std < before).all())


def test_custom_losses_reach_every_update():
    ppo = make()
    count = []

    def first(policy, obs, actions, rewards, values, advantages):
        count.append("first")
        return torch.ones(1)

    def second(**batch):
        count.append("second")
        return torch.tensor(2.0)

    stats = ppo.update(rollout(ppo), custom_loss_fns=[first, second])
    assert count == ["first", "second"] * 4 and stats["custom/first"] == 1.0 and stats["custom/second"] == 2.0


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (1.0, "got a float"),
        (None, "got a NoneType"),
        (torch.ones(2), r"shape \[2\]"),
        (torch.tensor(3), "int64"),
        (torch.tensor(math.nan), "is nan"),
        (torch.tensor(math.inf), "is inf"),
    ],
)
def test_bad_custom_losses_are_named_and_change_nothing(loss, message):
    ppo = make()

    def broken_loss(**batch):
        return loss

    batch, before = batch_of(ppo), parameters(ppo)
    with pytest.raises(LossError, match=f"custom loss broken_loss: .*{message}"):
        ppo.step(batch, [broken_loss])
    assert torch.equal(before, parameters(ppo)) and not ppo.optimizer.state


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (
            lambda policy, obs, actions, rewards, **rest: (obs * rewards).mean(),
            r"size of tensor .* policy, obs \[16, 3\], .*rewards \[16\]",
        ),
        (lambda observations, actions: actions.mean(), "TypeError: .*keywords policy, obs"),
    ],
)
def test_custom_losses_that_fail_are_named(loss, message):
    ppo = make()
    loss.__name__ = "mine"
    batch, before = batch_of(ppo), parameters(ppo)
    with pytest.raises(LossError, match=f"custom loss mine: .*{message}") as caught:
        ppo.step(batch, [functools.partial(loss)])
    assert isinstance(caught.value.__cause__, RuntimeError | TypeError) and torch.equal(before, parameters(ppo))


def test_custom_losses_of_one_name_are_numbered():
    def scaled(scale, **batch):
        return torch.tensor(scale)

    ppo = make()
    found = ppo.step(batch_of(ppo), [functools.partial(scaled, 1.0), lambda **batch: torch.tensor(2.0), functools.partial(scaled, 3.0)])
    assert {name: float(value) for name, value in found.items() if name.startswith("custom/")} == {
        "custom/scaled": 1.0,
        "custom/<lambda>": 2.0,
        "custom/scaled_2": 3.0,
    }


def test_a_custom_loss_without_a_gradient_is_pointed_at():
    def root(policy, **batch):
        return (0 * policy.log_std.sum()).sqrt()  # 0, with a gradient of infinity times 0

    ppo = make()
    with pytest.raises(LossError, match=r"the gradient is not finite .*custom/root 0\).* and at the custom losses; that update was not"):
        ppo.update(rollout(ppo), custom_loss_fns=[root])


@pytest.mark.parametrize("name", ["log_prob", "value", "advantage", "returns"])
def test_batches_of_other_shapes_are_refused(name):
    ppo = make()
    batch = batch_of(ppo)
    with pytest.raises(LossError, match=rf"the batch's {name}: expected one number per observation, \[16\], got shape \[16, 1\]"):
        ppo.step(batch._replace(**{name: getattr(batch, name)[:, None]}))


@pytest.mark.parametrize(("place", "name"), [(1, "log_prob"), (2, "entropy"), (3, "value")])
def test_policies_that_return_other_shapes_are_refused(place, name):
    ppo = make()
    batch, inner = batch_of(ppo), ppo.policy

    def policy(*arguments):
        found = list(inner(*arguments))
        found[place] = found[place][:, None]
        return found

    ppo.policy = policy
    with pytest.raises(LossError, match=rf"the policy's {name}: .*got shape \[16, 1\]"):
        ppo.step(batch)


def test_update_that_is_not_finite_is_not_applied():
    for reward in (math.nan, math.inf, 1e30):
        ppo = make(dataclasses.replace(CONFIG, norm_adv=False))
        ppo.update(rollout(ppo))
        batch, before = batch_of(ppo), parameters(ppo)
        state = {name: value.clone() for name, value in ppo.optimizer.state[next(iter(ppo.policy.parameters()))].items()}
        metrics = ppo.step(batch._replace(returns=torch.full_like(batch.returns, reward)))
        assert float(metrics["skipped_updates"]) == 1 and torch.equal(before, parameters(ppo))
        after = ppo.optimizer.state[next(iter(ppo.policy.parameters()))]
        assert all(torch.equal(state[name], after[name]) for name in state)
        assert float(ppo.step(batch)["skipped_updates"]) == 1 and not torch.equal(before, parameters(ppo))


def test_too_large_a_loss_is_not_applied():
    ppo = make(max_loss=1.0)
    batch, before = batch_of(ppo), parameters(ppo)
    assert float(ppo.step(batch._replace(returns=batch.returns + 50))["skipped_updates"]) == 1
    assert torch.equal(before, parameters(ppo))
    with pytest.raises(LossError, match="value_loss"):
        ppo.update(rollout(ppo, reward=lambda obs, action: torch.full((2,), 50.0)))


def test_gradients_are_clipped():
    """Adam does not show it, so plain descent."""
    policy = ActorCritic(3, 2, (16,))
    ppo = PPOOptimizer(policy, torch.optim.SGD(policy.parameters(), lr=1.0), "cpu", dataclasses.replace(CONFIG, max_grad_norm=0.01))
    batch, before = batch_of(ppo), parameters(ppo)
    assert float(ppo.step(batch)["grad_norm"]) > 0.01
    assert math.isclose(float((parameters(ppo) - before).norm()), 0.01, rel_tol=1e-3)


def test_target_kl_leaves_out_the_rest_of_the_rollout():
    ppo = make(dataclasses.replace(CONFIG, target_kl=0.01, update_epochs=20), lr=0.05)
    batch = batch_of(ppo)
    while float(ppo.step(batch)["applied"]):
        pass
    before = parameters(ppo)
    metrics = ppo.step(batch)
    assert float(metrics["applied"]) == 0 and float(metrics["approx_kl"]) > 0.01 and torch.equal(before, parameters(ppo))
    other = make(ppo.config)
    other.load_state_dict(ppo.state_dict())
    assert other.stopped
    batch = batch_of(ppo)  # a new rollout begins
    assert float(ppo.step(batch)["applied"]) == 1 and not torch.equal(before, parameters(ppo))


def test_clip_can_be_annealed():
    ppo = make(dataclasses.replace(CONFIG, anneal_clip=True))
    batch = batch_of(ppo)
    shifted = batch._replace(log_prob=batch.log_prob - 0.05)
    parts = shifted.obs, shifted.action, shifted.log_prob, shifted.advantage, shifted.returns, shifted.value
    assert float(ppo.compute_ppo_loss(*parts, progress=0.0)["clipfrac"]) == 0.0
    assert float(ppo.compute_ppo_loss(*parts, progress=0.9)["clipfrac"]) == 1.0


def test_shuffling_depends_on_the_seed_and_is_resumed():
    one, two, other = make(seed=1), make(seed=1), make(seed=2)
    for ppo in (one, two, other):
        ppo.update(rollout(ppo))
    assert torch.equal(parameters(one), parameters(two)) and not torch.equal(parameters(one), parameters(other))
    resumed = make(seed=3)
    resumed.policy.load_state_dict(one.policy.state_dict())
    resumed.optimizer.load_state_dict(copy.deepcopy(one.optimizer.state_dict()))
    resumed.load_state_dict(one.state_dict())
    for ppo in (one, resumed):
        ppo.update(rollout(ppo, seed=5))
    assert torch.equal(parameters(one), parameters(resumed))


def test_any_policy_of_the_same_call_shape_learns():
    """A bandit: the reward is the chosen arm's, and the best arm's probability rises."""

    class Bandit(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.logits, self.baseline = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(()))

        def forward(self, obs, state=None, action=None, eps=None):
            log_probs = self.logits.log_softmax(0).expand(*obs.shape[:-1], 2)
            if action is None:
                action = torch.eye(2)[(log_probs + (0 if eps is None else eps)).argmax(-1)]
            entropy = -(log_probs.exp() * log_probs).sum(-1)
            return action, (log_probs * action).sum(-1), entropy, self.baseline.expand(obs.shape[:-1]), None

    policy = Bandit()
    ppo = PPOOptimizer(policy, torch.optim.Adam(policy.parameters(), lr=0.05), "cpu", dataclasses.replace(CONFIG, gamma=0.0))
    for seed in range(10):
        ppo.update(rollout(ppo, seed=seed, reward=lambda obs, action: action[:, 1]))
    assert float(policy.logits.detach().softmax(0)[1]) > 0.8


def test_batches_may_be_any_rollout_batch():
    ppo = make()
    batch = batch_of(ppo)
    assert isinstance(batch, RolloutBatch)
    one = ppo.step(RolloutBatch(*(values[:1] for values in batch)))
    assert math.isfinite(float(one["total_loss"]))
