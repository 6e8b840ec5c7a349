"""Planning models put together out of parts."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from worldmpc.config import ConfigError, DynamicsConfig
from worldmpc.envs import make_env
from worldmpc.models.analytic import Acrobot, CartPole, LinearQuadratic, Pendulum, PointMass
from worldmpc.models.composed import ComposedModel, Dynamics, FunctionDynamics, check_model
from worldmpc.models.one_step import OneStepDynamics
from worldmpc.planners import propose, rollout, rollout_return
from worldmpc.types import Model, ModelStep

CRITICS = torch.zeros(2, dtype=torch.long)


class Policy(nn.Module):
    def __init__(self, obs_dim: int, action_dim: int) -> None:
        super().__init__()
        self.net = nn.Linear(obs_dim, action_dim)

    def sample(self, obs: Tensor, eps: Tensor) -> Tensor:
        return torch.tanh(self.net(obs) + eps)


class Chooser(Policy):
    def probs(self, obs: Tensor) -> Tensor:
        return torch.softmax(self.net(obs), -1)


class Critic(nn.Module):
    """A value with a last axis of one, as networks have it."""

    def __init__(self, obs_dim: int) -> None:
        super().__init__()
        self.net = nn.Linear(obs_dim, 1)

    def forward(self, obs: Tensor) -> Tensor:
        return self.net(obs)


def test_a_plan_is_worth_what_the_environment_pays() -> None:
    """Score of action sequences by the planners' own function = return of the environment, value of the last state included."""
    env = make_env("gym/Pendulum-v1")
    model = ComposedModel(Pendulum(), value=lambda obs: 10 * obs[..., 0] + obs[..., 2])
    generator = np.random.default_rng(0)
    actions = generator.uniform(-1, 1, (8, 5, 1)).astype(np.float32)
    first, expected = env.reset(seed=2)[0], []
    for candidate in range(5):
        env.reset(seed=2)
        total = 0.0
        for step in range(8):
            obs, reward, *_ = env.step(actions[step, candidate])
            total += 0.9**step * reward
        expected.append(total + 0.9**8 * (10 * obs[0] + obs[2]))
    z = model.encode(torch.from_numpy(first)).expand(5, -1)
    returns = rollout_return(model, z, torch.from_numpy(actions), 0.9, torch.zeros(5, 1), CRITICS)
    np.testing.assert_allclose(returns.numpy(), expected, atol=1e-4, rtol=1e-5)


def test_parts_see_observations_not_states() -> None:
    torch.manual_seed(0)
    model = ComposedModel(Acrobot(), Chooser(6, 3), Critic(6))
    obs, eps = Acrobot().observe(torch.randn(4, 2, 4)), torch.randn(4, 2, 3)
    z = model.encode(obs)
    torch.testing.assert_close(model.propose(z, eps), model.policy.sample(obs, eps))
    torch.testing.assert_close(model.action_probs(z), model.policy.probs(obs))
    torch.testing.assert_close(model.terminal_value(z, eps, CRITICS), model.value(obs)[..., 0])
    assert propose(model, z[:, 0], torch.randn(3, 4, 5, 3)).shape == (3, 4, 5, 3)
    assert isinstance(model, Model) and isinstance(model.dynamics, Dynamics)


def test_parts_that_are_left_out() -> None:
    model = ComposedModel(PointMass())
    z, eps = torch.randn(4, 3, 2), torch.randn(4, 3, 2)
    assert torch.equal(model.terminal_value(z, eps, CRITICS), torch.zeros(4, 3))
    with pytest.raises(ConfigError, match=r"planner.num_pi_trajs: .* no policy .* set it to 0"):
        model.propose(z, eps)
    assert propose(model, z[:, 0], eps[None, :, :0]).shape == (1, 4, 0, 2)
    for name in ("next", "rollout", "action_probs"):
        assert not hasattr(model, name)
    assert not hasattr(ComposedModel(PointMass(), Policy(2, 2)), "action_probs")
    assert model.num_particles == 1 and model.trajectory is None
    prior = nn.Linear(1, 1)
    assert ComposedModel(PointMass(), trajectory=prior).trajectory is prior


def test_function_dynamics_are_the_function() -> None:
    def following(z: Tensor, action: Tensor) -> Tensor:
        return 1.1 * z + 0.1 * action

    dynamics = FunctionDynamics(following, lambda z, action, after: after[..., 0] - z[..., 0], lambda z, action, after: 0.5 + 0 * z[..., 0])
    model, z, action = ComposedModel(dynamics), torch.randn(4, 3, 1), torch.randn(4, 3, 1)
    step = model.step(model.encode(z), action)
    torch.testing.assert_close(step.z, 1.1 * z + 0.1 * action)
    torch.testing.assert_close(step.reward, (0.1 * z + 0.1 * action)[..., 0])
    assert torch.equal(step.cont, torch.full((4, 3), 0.5)) and torch.equal(model.next(z, action), step.z)
    assert torch.equal(FunctionDynamics(following).step(z, action).cont, torch.ones(4, 3))
    net = nn.Bilinear(1, 1, 1)
    assert set(ComposedModel(FunctionDynamics(net, dynamics._reward)).parameters()) == set(net.parameters())


def test_the_reward_that_is_passed_counts() -> None:
    def reward(z: Tensor, action: Tensor, following: Tensor) -> Tensor:
        return 100 * z[..., 0] + 10 * action[..., 0] + following[..., 0]

    z, actions = torch.randn(5, 2), torch.randn(3, 5, 2).clamp(-1, 1)
    model = ComposedModel(PointMass(), reward=reward)
    steps = rollout(model, z, actions)
    torch.testing.assert_close(steps.reward, reward(steps.z[:-1], actions, steps.z[1:]))
    assert not torch.allclose(steps.reward, rollout(ComposedModel(PointMass()), z, actions).reward)
    silent = FunctionDynamics(lambda z, action: z + action)
    torch.testing.assert_close(ComposedModel(silent, reward=reward).step(z, actions[0]).reward, reward(z, actions[0], z + actions[0]))
    with pytest.raises(ConfigError, match=r"dynamics: FunctionDynamics predicts no reward; pass reward=..., a function of"):
        ComposedModel(silent)


def test_dynamics_that_forget_their_reward() -> None:
    class Forgetful(PointMass):
        def step(self, z: Tensor, action: Tensor) -> Any:
            return super().step(z, action)._replace(reward=None)

    with pytest.raises(ConfigError, match="dynamics: Forgetful predicts no reward"):
        ComposedModel(Forgetful()).step(torch.zeros(2), torch.zeros(2))


@pytest.mark.parametrize("name", ["mlp", "ensemble"])
@pytest.mark.parametrize("rewarded", [False, True])
def test_what_learned_dynamics_offer_passes_through(name: Any, rewarded: bool) -> None:
    dynamics = OneStepDynamics(DynamicsConfig(name=name, hidden=(8,), members=2, particles=4), 2, 2, terminates=True, seed=1)
    z, actions = torch.randn(6, 5, 2), torch.rand(3, 6, 5, 2)
    model = ComposedModel(dynamics, Policy(2, 2), Critic(2), reward=(lambda z, action, after: after[..., 1]) if rewarded else None)
    assert model.num_particles == dynamics.num_particles
    assert torch.equal(model.next(z, actions[0]), dynamics.next(z, actions[0]))
    if name == "ensemble":
        z, actions = z.expand(4, 6, 5, 2), actions[:, None].expand(3, 4, 6, 5, 2)
    own, steps = dynamics.rollout(z, actions), model.rollout(z, actions)
    assert torch.equal(steps.z, own.z) and torch.equal(steps.cont, own.cont)
    assert torch.equal(steps.reward, own.z[1:, ..., 1] if rewarded else own.reward)
    check_model(model, (2,), 2)
    assert {key.split(".")[0] for key in model.state_dict()} == {"dynamics", "policy", "value"}


def test_copies_are_apart() -> None:
    """What planners find on a copy belongs to the copy."""
    dynamics = OneStepDynamics(DynamicsConfig(name="mlp", hidden=(8,)), 2, 2, terminates=False, seed=1)
    model = ComposedModel(dynamics, Chooser(2, 2))
    z, actions = torch.randn(5, 2), torch.rand(3, 5, 2)
    before = model.rollout(z, actions).z, model.next(z, actions[0]), model.action_probs(z)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.add_(1.0)
        after = other.rollout(z, actions).z, other.next(z, actions[0]), other.action_probs(z)
        assert not any(torch.equal(*pair) for pair in zip(before, after, strict=True))
        assert torch.equal(model.rollout(z, actions).z, before[0]) and torch.equal(model.action_probs(z), before[2])


def test_gradients_reach_actions_and_parameters() -> None:
    model = ComposedModel(LinearQuadratic(), Policy(2, 1), Critic(2))
    actions = torch.zeros(4, 3, 1, requires_grad=True)
    rollout_return(model, torch.randn(3, 2), actions, 0.9, torch.zeros(3, 1), CRITICS).sum().backward()
    assert (actions.grad is not None) and (actions.grad.abs() > 0).all()
    assert isinstance(model.value, Critic) and model.value.net.weight.grad is not None


def test_good_models_pass_the_check() -> None:
    check_model(ComposedModel(PointMass()), (2,), 2)
    check_model(ComposedModel(CartPole(), Chooser(4, 2), Critic(4)), (4,), 2)
    check_model(ComposedModel(Pendulum(), Policy(3, 1), value=lambda obs: obs[..., 0]), (3,), 1)


def spoil(**changes: Any) -> Any:
    """Dynamics whose steps are changed: name -> function of the right value."""

    class Spoilt(PointMass):
        def step(self, z: Tensor, action: Tensor) -> ModelStep:
            step = super().step(z, action)
            return step._replace(**{name: change(getattr(step, name)) for name, change in changes.items()})

    return Spoilt()


BAD_MODELS: list[tuple[ComposedModel, str]] = [
    (ComposedModel(spoil(z=lambda z: z[..., :1])), r"model: z of step should be a tensor \[2, 3, 2\], but is a tensor \[2, 3, 1\]"),
    (
        ComposedModel(spoil(reward=lambda r: r[..., None])),
        r"model: reward of step should be a tensor \[2, 3\], but is a tensor \[2, 3, 1\]",
    ),
    (ComposedModel(spoil(cont=lambda c: 1.0)), r"model: cont of step should be a tensor \[2, 3\], but is float"),
    (ComposedModel(PointMass(), Policy(2, 3)), r"model: propose raised RuntimeError on z \[2, 3, 2\] and action \[2, 3, 2\]"),
    (ComposedModel(PointMass(), Chooser(2, 1)), r"model: action_probs should be a tensor \[2, 3, 2\], but is a tensor \[2, 3, 1\]"),
    (ComposedModel(PointMass(), value=lambda obs: obs), r"model: terminal_value should be a tensor \[2, 3\], but is a tensor \[2, 3, 2\]"),
    (ComposedModel(PointMass(), value=Critic(5)), r"model: terminal_value raised RuntimeError"),
    (ComposedModel(Pendulum()), r"model: encode raised IndexError on observations \[2, 3, 2\]"),
    (
        ComposedModel(FunctionDynamics(lambda z, a: z, lambda z, a, n: z)),
        r"model: reward of step should be a tensor \[2, 3\], but is a tensor \[2, 3, 2\]",
    ),
]


@pytest.mark.parametrize(("model", "message"), BAD_MODELS)
def test_the_check_names_what_is_wrong(model: ComposedModel, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_model(model, (2,), 2)
