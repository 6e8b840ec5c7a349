"""Known dynamics under every planner: equations and copies of the simulator; what cannot be combined says why."""

from __future__ import annotations

import dataclasses

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box

from examples.own_planner import AntitheticShooting
from worldmpc.agents import make_agent
from worldmpc.agents.mpc import MPC
from worldmpc.config import ConfigError, DynamicsConfig, EnvConfig, make_config
from worldmpc.envs import make_envs
from worldmpc.models.composed import FunctionDynamics
from worldmpc.models.one_step import OneStepDynamics
from worldmpc.training.evaluator import evaluate
from worldmpc.training.run import run

PLANNERS = ["random_shooting", "cem", "icem", "mppi", "diffusion"]


def play(task, episodes=1, length=None, **overrides):
    config = make_config(agent="mpc", task=task, **{"env.episode_length": length, **overrides})
    with make_envs(task, dataclasses.replace(config.env, num_envs=episodes), seed=3) as envs:
        return evaluate(make_agent(config, envs.spec), envs, episodes).mean_return


@pytest.mark.parametrize("planner", [*PLANNERS, "mcts"])
def test_balances_a_pole(planner):
    small = {"planner.num_samples": 64, "planner.num_elites": 8, "planner.iterations": 2}
    small |= {"planner.num_simulations": 20} if planner == "mcts" else {}
    assert play("gym/CartPole-v1", length=40, planner=planner, **small, **{"planner.horizon": 12}) == 40


@pytest.mark.parametrize("planner", PLANNERS)
def test_moves_a_point_to_the_origin(planner):
    assert play("toy/pointmass", episodes=5, planner=planner, **{"planner.horizon": 5, "planner.num_samples": 128}) > 45.0


def test_a_gradient_finds_what_few_samples_do_not():
    few = {"planner.num_samples": 8, "planner.num_elites": 2, "planner.iterations": 1, "planner.horizon": 8, "env.discount": 0.99}
    alone = play("toy/linear-quadratic", episodes=3, planner="cem", **few)
    climbing = play("toy/linear-quadratic", episodes=3, planner="cem", **few, **{"planner.gradient_steps": 10})
    assert climbing > alone + 0.2


def test_plans_with_copies_of_the_simulator():
    overrides = {"dynamics.name": "simulator", "env.simulator_state": True, "planner.num_samples": 16, "planner.num_elites": 4}
    reached = play("gym/InvertedPendulum-v5", length=30, planner="cem", **overrides, **{"planner.horizon": 8, "planner.iterations": 2})
    assert reached == 30


def test_a_run_learns_nothing_and_says_so(tmp_path):
    config = make_config("debug", agent="mpc", task="toy/pointmass", steps=60, run_dir=str(tmp_path / "run"), **{"eval.video": False})
    result = run(config)
    assert result.finished and result.decisions == 60 and result.last_return > 40
    assert run(dataclasses.replace(config, resume="auto")).decisions == 60


class Sliding(gymnasium.Env):
    """An environment without a name: a point on a line, which the action moves by a tenth; standing at 0 pays 1."""

    observation_space, action_space = Box(-5.0, 5.0, (1,), np.float32), Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place = np.ones(1, np.float32)
        return self.place.copy(), {}

    def step(self, action):
        self.place = self.place + 0.1 * action
        return self.place.copy(), 1.0 - float(abs(self.place[0])), False, False, {}


def test_own_dynamics_of_an_own_environment():
    dynamics = FunctionDynamics(lambda z, action: z + 0.1 * action, reward=lambda z, action, following: 1 - following.abs().sum(-1))
    with make_envs(Sliding, EnvConfig(episode_length=30)) as envs:
        config = make_config(agent="mpc", planner="cem", **{"planner.horizon": 4})
        assert evaluate(MPC(config, envs.spec, dynamics=dynamics), envs, 1).mean_return > 24.0  # 24.5 at best: ten steps to get there
        with pytest.raises(ConfigError, match="z of step"):
            MPC(config, envs.spec, dynamics=FunctionDynamics(lambda z, action: z[..., :0], reward=lambda z, action, following: z[..., 0]))
        for dynamics in ("analytic", "simulator"):
            own = make_config(agent="mpc", dynamics=dynamics, **{"env.simulator_state": True})
            with pytest.raises(ConfigError, match=r"Sliding is an environment of your own.*MPC\(config, spec, dynamics=\.\.\.\), or use"):
                make_agent(own, envs.spec)


def small():
    sizes = {"planner.num_samples": 16, "planner.num_elites": 4, "planner.iterations": 1, "planner.horizon": 3}
    config = make_config(agent="mpc", task="toy/pointmass", **sizes)
    return make_agent(config, make_envs("toy/pointmass").spec)


def test_evaluations_do_not_change_what_training_does():
    one, two = small(), small()
    obs = torch.tensor([[0.3, -0.4]])
    found = []
    for agent in (one, two):
        carry, actions = agent.init_carry(1), []
        for step in range(3):
            output = agent.act(carry, obs, "explore")
            carry = output.carry
            actions.append(output.action)
            if agent is two and step == 0:
                agent.reset_eval_noise(0)
                agent.act(agent.init_carry(1), obs, "eval")
        found.append(torch.cat(actions))
    assert torch.equal(*found)


def test_another_planner():
    agent = small()
    agent.planner = AntitheticShooting(2, agent.discount, horizon=4, pairs=8)
    assert agent.act(agent.init_carry(3), torch.zeros(3, 2), "eval").carry.plan.mean.shape == (3, 4, 2)


def test_parameters_of_own_dynamics_are_restored():
    def make():
        dynamics = FunctionDynamics(torch.nn.Bilinear(2, 2, 2), lambda z, action, following: -following.square().sum(-1))
        config = make_config(agent="mpc", task="toy/pointmass")
        return MPC(config, make_envs("toy/pointmass").spec, dynamics=dynamics)

    one, two = make(), make()
    two.load_state_dict(one.state_dict())
    assert torch.equal(one.model.state_dict()["dynamics._next.weight"], two.model.state_dict()["dynamics._next.weight"])


def test_an_ensemble_of_ones_own_is_sampled_from():
    config = make_config(agent="mpc", task="toy/pointmass", planner="cem", **{"planner.num_samples": 32, "planner.num_elites": 4})
    spec = make_envs("toy/pointmass").spec
    ensemble = OneStepDynamics(DynamicsConfig("ensemble", (8,), members=2, particles=4), 2, 2, terminates=False, seed=1)
    agent, seen = MPC(config, spec, dynamics=ensemble), []
    bind = ensemble.bind
    ensemble.bind = lambda noise: seen.append(noise["dynamics"]) or bind(noise)
    carry, obs = agent.init_carry(3), torch.zeros(3, 2)
    for _ in range(2):
        assert agent.act(carry, obs, "eval").action.isfinite().all()
    assert seen[0].shape == (config.planner.horizon, 4, 3, 1, 2) and not torch.equal(*seen)


def test_updates_are_refused():
    config = make_config(agent="mpc", task="toy/pointmass")
    with make_envs("toy/pointmass") as envs:
        agent = make_agent(config, envs.spec)
        source = agent.make_source(1, torch.Generator())
        for refused in (lambda: agent.update(None), source.next):
            with pytest.raises(RuntimeError, match="learns nothing"):
                refused()
        assert source.ready() == 0


@pytest.mark.parametrize(
    ("task", "overrides", "message"),
    [
        ("gym/LunarLander-v3", {}, "dynamics.name: no known equations for gym/LunarLander-v3; .*agent=mbmpc"),
        ("toy/pointmass", {"dynamics.name": "simulator"}, "env.simulator_state: dynamics=simulator needs .* set it to true"),
        ("gym/Pendulum-v1", {"planner.name": "mcts"}, "planner.name: mcts needs a discrete action space; use planner=mppi"),
        ("gym/CartPole-v1", {"planner.gradient_steps": 5}, "planner.gradient_steps: .* discrete actions; use gradient_steps=0"),
        ("gym/Pendulum-v1", {"planner.name": "policy_guided"}, "policy_guided needs a policy prior, .* agent=mpc .* planner=cem"),
        ("gym/Pendulum-v1", {"planner.num_pi_trajs": 4}, "planner.num_pi_trajs: proposals come from a policy prior.*num_pi_trajs=0"),
        ("gym/Pendulum-v1", {"dynamics.name": "mlp"}, "dynamics.name: agent=mpc learns nothing; .* agent=mbmpc"),
        (
            "gym/Pendulum-v1",
            {"seeds": [1, 2]},
            "seeds: only agent=tdmpc2, tdmpc_square, bmpc and boom train stacked seeds; .* -m seed=1,2,3",
        ),
    ],
)
def test_what_cannot_be_says_what_to_use(task, overrides, message):
    spec_task = "toy/pointmass" if "Lunar" in task else task
    with pytest.raises(ConfigError, match=message), make_envs(spec_task) as envs:
        make_agent(make_config(agent="mpc", task=task, **overrides), dataclasses.replace(envs.spec, name=task))
