"""Known dynamics under every planner: equations and copies of the simulator; what cannot be combined says why."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from worldmpc.agents import make_agent
from worldmpc.config import ConfigError, make_config
from worldmpc.envs import make_envs
from worldmpc.training.evaluator import evaluate
from worldmpc.training.run import run

PLANNERS = ["random_shooting", "cem", "icem", "mppi", "diffusion"]


def play(task, episodes=1, length=None, **overrides):
    config = make_config(agent="mpc", task=task, **{"env.episode_length": length, **overrides})
    with make_envs(task, dataclasses.replace(config.env, num_envs=episodes), seed=3) as envs:
        return evaluate(make_agent(config, envs.spec), envs, episodes).mean_return


@pytest.mark.parametrize("planner", [*PLANNERS, "mcts"])
def test_balances_a_pole(planner):
    small = {"planner.num_samples": 64, "planner.num_elites": 8, "planner.iterations": 2, "planner.num_simulations": 20}
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
        ("gym/Pendulum-v1", {"seeds": [1, 2]}, "seeds: only agent=tdmpc2 trains stacked seeds; .* -m seed=1,2,3"),
    ],
)
def test_what_cannot_be_says_what_to_use(task, overrides, message):
    spec_task = "toy/pointmass" if "Lunar" in task else task
    with pytest.raises(ConfigError, match=message), make_envs(spec_task) as envs:
        make_agent(make_config(agent="mpc", task=task, **overrides), dataclasses.replace(envs.spec, name=task))
