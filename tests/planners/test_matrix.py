"""Every planner with every model, in both kinds of action spaces, through the same two protocols."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from worldmpc.config import ConfigError, DynamicsConfig, EnvConfig, ModelConfig, PlannerConfig
from worldmpc.envs import make_env
from worldmpc.models.analytic import analytic_dynamics
from worldmpc.models.behaviour import BehaviourPolicy, BehaviourValue
from worldmpc.models.composed import ComposedModel, FunctionDynamics, check_model
from worldmpc.models.normalizer import Normalizer
from worldmpc.models.one_step import OneStepDynamics
from worldmpc.models.simulator import SimulatorModel
from worldmpc.models.trajectory import TrajectoryModel
from worldmpc.models.value_based import initialise
from worldmpc.models.world_model import WorldModel
from worldmpc.noise import NoiseStream
from worldmpc.planners import make_planner
from worldmpc.types import Model, Planner

PLANNERS = ("mppi", "cem", "icem", "random_shooting", "policy_guided", "diffusion", "mcts")
SMALL = {"horizon": 3, "num_samples": 12, "num_elites": 4, "num_pi_trajs": 2, "iterations": 2, "num_simulations": 6}
TINY = ModelConfig(enc_dim=16, mlp_dim=16, latent_dim=16, num_enc_layers=2, num_q=2)


class Case(NamedTuple):
    model: Model
    obs: torch.Tensor
    action_dim: int
    discrete: bool
    has_policy: bool


def world(discrete: bool) -> Case:
    return Case(WorldModel(TINY, 3, 2, terminates=True, discrete=discrete), torch.randn(2, 3), 2, discrete, True)


def analytic(task: str, dims: int, actions: int, discrete: bool) -> Case:
    return Case(ComposedModel(analytic_dynamics(task)), 0.1 * torch.randn(2, dims), actions, discrete, False)


def learned(name: str, discrete: bool) -> Case:
    config = DynamicsConfig(name=name, hidden=(16,), members=2, particles=4)  # type: ignore[arg-type]
    dynamics = OneStepDynamics(config, 3, 2, terminates=True, seed=1)
    policy = BehaviourPolicy(dynamics.observations, 3, 2, (16,), discrete)
    value = BehaviourValue(dynamics.observations, 3, (16,), 0.9)
    initialise([policy.net, value.net], 1)
    bound = dynamics.bind(NoiseStream(1, "x").draw(dynamics.noise_specs(3, 2)))
    return Case(ComposedModel(bound, policy, value), torch.randn(2, 3), 2, discrete, True)


def simulator() -> Case:
    env = EnvConfig(simulator_state=True)
    obs, _ = make_env("gym/InvertedPendulum-v5", config=env).reset(seed=1)
    model = ComposedModel(SimulatorModel(lambda: make_env("gym/InvertedPendulum-v5", config=env)))
    return Case(model, torch.from_numpy(obs).expand(2, -1).clone(), 1, False, False)


def function() -> Case:
    move = FunctionDynamics(lambda z, action: z + 0.1 * action)
    return Case(ComposedModel(move, reward=lambda z, action, following: -following.square().sum(-1)), torch.randn(2, 2), 2, False, False)


MODELS: dict[str, Callable[[], Case]] = {
    "tdmpc2": lambda: world(False),
    "tdmpc2-discrete": lambda: world(True),
    "cartpole": lambda: analytic("gym/CartPole-v1", 4, 2, True),
    "acrobot": lambda: analytic("gym/Acrobot-v1", 6, 3, True),
    "pendulum": lambda: analytic("gym/Pendulum-v1", 3, 1, False),
    "linear-quadratic": lambda: analytic("toy/linear-quadratic", 2, 1, False),
    "mlp": lambda: learned("mlp", False),
    "mlp-discrete": lambda: learned("mlp", True),
    "ensemble": lambda: learned("ensemble", False),
    "ensemble-discrete": lambda: learned("ensemble", True),
    "simulator": simulator,
    "function": function,
}


def planner_for(name: str, case: Case, **overrides) -> Planner:
    sizes = {**SMALL, "num_pi_trajs": 2 if case.has_policy else 0, **overrides}
    return make_planner(PlannerConfig(name=name, **sizes), case.action_dim, 0.97, 2, case.discrete)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", PLANNERS)
@pytest.mark.parametrize("kind", MODELS)
def test_plans(kind, name):
    torch.manual_seed(0)
    case = MODELS[kind]()
    if name == "mcts" and not case.discrete:
        with pytest.raises(ConfigError, match="mcts needs a discrete action space"):
            planner_for(name, case)
        return
    planner = planner_for(name, case)
    z, state = case.model.encode(case.obs), planner.init(2, torch.device("cpu"))
    noise = NoiseStream(3, "plan").draw(planner.noise_specs(2))
    if name == "policy_guided" and not case.has_policy:
        with pytest.raises(ConfigError, match="no policy"):
            planner.plan(case.model, z, state, noise, True)
        return
    for explore in (True, False):
        result = planner.plan(case.model, z, state, noise, explore)
        again = planner.plan(case.model, z, state, noise, explore)
        assert torch.equal(result.action, again.action) and torch.equal(result.mean, again.mean)
        assert result.action.shape == (2, case.action_dim) and result.mean.shape == result.std.shape == (2, 3, case.action_dim)
        assert result.value.shape == (2,) and result.value.isfinite().all() and 0 <= float(result.metrics["plan_bad"]) <= 1
        if case.discrete:
            assert (result.action.sort(-1).values == torch.tensor([*[0.0] * (case.action_dim - 1), 1.0])).all()
            torch.testing.assert_close(result.mean.sum(-1), torch.ones(2, 3))
        else:
            assert (result.action.abs() <= 1).all() and (result.mean.abs() <= 1).all()
        state = result.state


@pytest.mark.parametrize("kind", MODELS)
def test_models_keep_the_protocol(kind):
    case = MODELS[kind]()
    if kind != "ensemble" and kind != "ensemble-discrete":  # those are bound to the noise of two environments
        check_model(case.model, tuple(case.obs.shape[1:]), case.action_dim)
    assert isinstance(case.model, Model)


@pytest.mark.parametrize("kind", ["tdmpc2", "mlp", "tdmpc2-discrete", "mlp-discrete"])
def test_diffusion_with_a_learned_prior_under_every_learned_model(kind):
    case = MODELS[kind]()
    dims = case.model.encode(case.obs).shape[-1]
    case.model.trajectory = TrajectoryModel(case.action_dim, 3, dims, (16,), discrete=case.discrete)  # type: ignore[attr-defined]
    planner = planner_for("diffusion", case, prior="learned", guidance=0.1)
    noise = NoiseStream(3, "plan").draw(planner.noise_specs(2))
    result = planner.plan(case.model, case.model.encode(case.obs), planner.init(2, torch.device("cpu")), noise, True)
    assert result.action.isfinite().all() and result.value.isfinite().all()


@pytest.mark.parametrize("kind", ["tdmpc2", "pendulum", "linear-quadratic", "mlp", "ensemble", "function"])
@pytest.mark.parametrize("name", ["cem", "mppi", "icem"])
def test_gradients_refine_plans_through_differentiable_models(kind, name):
    torch.manual_seed(0)
    case = MODELS[kind]()
    if kind == "tdmpc2":  # whose reward and value are 0 everywhere at first
        with torch.no_grad():
            for parameter in case.model.parameters():  # type: ignore[attr-defined]
                parameter += 0.1 * torch.randn_like(parameter)
    results = []
    for steps, lr in ((1, 1e-12), (5, 0.05)):  # the first one stays where it is, and says what that is worth
        planner = planner_for(name, case, gradient_steps=steps, gradient_lr=lr)
        noise = NoiseStream(3, "plan").draw(planner.noise_specs(2))
        results.append(planner.plan(case.model, case.model.encode(case.obs), planner.init(2, torch.device("cpu")), noise, False))
    still, climbed = results
    assert (climbed.value >= still.value).all() and (climbed.value > still.value).any()
    assert not torch.allclose(climbed.action, still.action) and (climbed.action.abs() <= 1).all()
    assert all(parameter.grad is None for parameter in getattr(case.model, "parameters", list)())


def test_the_normaliser_of_a_policy_is_the_dynamics_own():
    case = learned("mlp", False)
    assert isinstance(case.model.policy.normalizer, Normalizer)  # type: ignore[attr-defined]
    assert case.model.policy.normalizer is case.model.value.normalizer  # type: ignore[attr-defined]


class Ending(FunctionDynamics):
    """A line on which reaching 1 pays and ends; what is said behind the end is no number, as the root of something negative."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        def reward(z: torch.Tensor, action: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
            return (10.0 * (following[..., 0] >= 1) - 0.01 * (1 - z[..., 0]).sqrt()).to(dtype)

        super().__init__(lambda z, action: z + 0.5 * action, reward, lambda z, action, following: (following[..., 0] < 1).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", PLANNERS[:-1])
def test_what_is_said_behind_an_end_does_not_matter(name: str, dtype: torch.dtype) -> None:
    """The way to the end is taken at once; a reward in float64 leaves actions and warm starts in float32."""
    model = ComposedModel(Ending(dtype), value=lambda obs: (1 - obs[..., 0]).sqrt() * 0)
    config = PlannerConfig(name=name, horizon=3, num_samples=64, num_elites=8, num_pi_trajs=0, iterations=3)  # type: ignore[arg-type]
    if name == "policy_guided":
        pytest.skip("has no policy here")
    planner = make_planner(config, 1, 0.99, 2)
    z = torch.full((2, 1), 0.8)
    plan = planner.plan(model, z, planner.init(2, z.device), NoiseStream(1, "x").draw(planner.noise_specs(2)), False)
    assert (plan.value > 9.9).all() and plan.metrics["plan_bad"] == 0
    assert {part.dtype for part in (plan.action, plan.mean, plan.std, plan.value, *plan.state)} == {torch.float32}


def test_a_search_does_not_mind_what_its_playouts_meet_behind_an_end() -> None:
    dynamics = Ending()
    step = dynamics._next
    dynamics._next = lambda z, choice: step(z, choice[..., :1] - choice[..., 1:])
    config = PlannerConfig(name="mcts", horizon=8, num_simulations=20, num_playouts=4)
    planner = make_planner(config, 2, 0.99, 2, discrete=True)
    z = torch.full((2, 1), 0.3)
    plan = planner.plan(ComposedModel(dynamics), z, planner.init(2, z.device), NoiseStream(1, "x").draw(planner.noise_specs(2)), False)
    assert plan.metrics["plan_bad"] == 0 and plan.action.argmax(1).tolist() == [0, 0]
