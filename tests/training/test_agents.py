"""Every agent through whole runs: files, the command line, and a run that was stopped half-way equals one that was not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

import worldmpc
from tests.trees import leaves
from worldmpc.cli import main
from worldmpc.config import AGENTS, TUNED, ConfigError, RunConfig, make_config
from worldmpc.report.runs import load_run
from worldmpc.training.checkpoint import CheckpointStore, load_checkpoint
from worldmpc.training.run import run

QUIET = {"log.progress": "none", "log.tensorboard": False, "eval.video": False, "eval.episodes": 1, "threads": 1}
TASKS = {"dqn": "gym/CartPole-v1", "td3": "toy/pointmass", "mpc": "toy/pointmass", "pets": "toy/pointmass"}
AGENT_TASKS = [(agent, TASKS.get(agent, task)) for agent in AGENTS for task in ("toy/pointmass", "toy/identity-discrete")]
AGENT_TASKS = [case for case in dict.fromkeys(AGENT_TASKS) if case != ("boom", "toy/identity-discrete")]  # defined for Box actions


def config(agent: str, task: str, folder: Path, steps: int = 150, **overrides: Any):
    fits = {"mbmpc.fit_every": 40} if agent in ("mbmpc", "pets") else {}
    own = {"eval_freq": steps, "checkpoint.every": 10 * steps, **fits, **QUIET, **overrides}
    return make_config("debug", agent=agent, task=task, steps=steps, run_dir=str(folder), **own)


def saved(folder: Path) -> dict[str, torch.Tensor]:
    newest = CheckpointStore(folder / "checkpoints", keep=1).all()[0]
    tree, _ = load_checkpoint(newest)
    del tree["loop"]["seconds"]
    return dict(leaves(tree))


@pytest.mark.parametrize(("agent", "task"), AGENT_TASKS, ids=[f"{agent}-{task.partition('/')[2]}" for agent, task in AGENT_TASKS])
def test_stopped_and_resumed_equals_uninterrupted(agent, task, tmp_path):
    run(config(agent, task, tmp_path / "whole"))

    def stop(state, metrics):
        state.stop = state.decisions >= 93

    halfway = run(config(agent, task, tmp_path / "parts"), extra_hooks=(stop,))
    assert not halfway.finished and 93 <= halfway.decisions < 150
    assert run(config(agent, task, tmp_path / "parts", resume="auto")).finished
    one, other = saved(tmp_path / "whole"), saved(tmp_path / "parts")
    torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    returns = [[row.return_mean for row in load_run(tmp_path / name).evals] for name in ("whole", "parts")]
    assert returns[0] == returns[1] and len(returns[0]) == 2


@pytest.mark.parametrize("agent", AGENTS)
def test_the_five_verbs(agent, tmp_path):
    task = TASKS.get(agent, "toy/pointmass")
    envs = worldmpc.make_envs(task, worldmpc.EnvConfig(num_envs=2))
    mine = worldmpc.make_agent(envs, "debug", agent=agent)
    state = worldmpc.train(mine, envs, steps=120, progress=False)
    assert state.env_steps == 120 and mine.config.agent == agent
    worldmpc.save(mine, tmp_path / "mine")
    loaded = worldmpc.load(tmp_path / "mine")
    assert worldmpc.evaluate(loaded, episodes=2).returns == worldmpc.evaluate(mine, episodes=2).returns


def test_command_line_takes_agents_and_planners(tmp_path, capsys):
    words = [f"{name}={value}".replace("True", "true").replace("False", "false") for name, value in QUIET.items()]
    common = ["preset=debug", "steps=60", *words]
    assert main(["train", "agent=dqn", "task=toy/identity-discrete", f"run_dir={tmp_path}/dqn", *common]) == 0
    assert main(["train", "agent=mpc", "planner=icem", "task=toy/pointmass", f"run_dir={tmp_path}/mpc", *common]) == 0
    assert main(["train", "planner=diffusion", "task=toy/identity-discrete", f"run_dir={tmp_path}/diffusion", *common]) == 0
    for name, agent, planner in (("dqn", "dqn", "mppi"), ("mpc", "mpc", "icem"), ("diffusion", "tdmpc2", "diffusion")):
        written = json.loads((tmp_path / name / "config.json").read_text())
        assert (written["agent"], written["planner"]["name"]) == (agent, planner)
    assert main(["evaluate", f"checkpoint={tmp_path}/mpc", "episodes=1", "planner=cem"]) == 0
    capsys.readouterr()
    for name, word, message in (
        ("dqn", "planner=cem", "planner.name: agent=dqn never reads it"),
        ("mpc", "mode=prior", "mode: agent=mpc as configured acts in explore or eval, not in 'prior'"),
        ("diffusion", "planner.prior=learned", "planner.prior: "),
    ):
        assert main(["evaluate", f"checkpoint={tmp_path}/{name}", word]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["agent=dqn", "task=gym/Pendulum-v1"], "agent: dqn needs a discrete action space, gym/Pendulum-v1 has Box actions; use agent=sac"),
        (["agent=td3", "task=gym/CartPole-v1"], "agent: td3 needs a Box action space, gym/CartPole-v1 has Discrete actions; use agent=dqn"),
        (["planner=mcts", "task=gym/Pendulum-v1"], "planner.name: mcts needs a discrete action space; use planner=mppi"),
        (["agent=mpc", "task=dmc/cartpole-swingup"], "dynamics.name: no known equations for dmc/cartpole-swingup"),
        (["agent=mpc", "planner=policy_guided"], "planner.name: policy_guided needs a policy prior, and agent=mpc has none"),
        (["agent=ppo", "seeds=[1,2]"], "seeds: only agent=tdmpc2, tdmpc_square, bmpc and boom train stacked seeds"),
        (["agent=sac", "compile=true"], "compile: only agent=tdmpc2, tdmpc_square, bmpc, boom and director have it"),
        (["agent=dqn", "planner=cem"], "planner.name: agent=dqn never reads it; leave it out, or use agent=tdmpc2"),
        (["agent=ppo", "train={utd: 2}"], "train.utd: agent=ppo never reads it"),
        (["-m", "agent=sac,td3", "sac.alpha=0.1"], "sac.alpha: agent=td3 never reads it; leave it out, or use agent=sac"),
        (["agent=pets", "planner.mpc=false"], "planner.mpc: false acts with the policy prior alone, and agent=pets has none"),
        (["agent=td3", "preset=tuned"], "preset: agent=td3 needs no tuned settings: its defaults are tuned for gym/Pendulum-v1"),
        (["preset=tuned"], "preset: agent=tdmpc2 has no tuned settings for its default task; it has them for task=gym/CartPole-v1"),
        (["agent=dqn", "preset=tuned", "task=gym/MountainCar-v0"], "preset: agent=dqn has no tuned settings for gym/MountainCar-v0"),
    ],
)
def test_combinations_that_are_refused_say_why(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *words]) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_defaults_of_agents_lie_below_presets_and_overrides():
    assert make_config(agent="dqn").env.discount == 0.99 and make_config(agent="dqn", **{"env.discount": 0.9}).env.discount == 0.9
    assert make_config(agent="dqn").task == "gym/CartPole-v1" and make_config(agent="dqn", task="toy/identity-discrete").steps == 50_000
    assert make_config("debug", agent="dqn").steps == 500 and make_config("debug", agent="dqn").env.discount == 0.99
    assert make_config("cpu", agent="sac") == make_config(agent="sac", preset="cpu") and make_config("cpu", agent="sac").steps == 20_000
    tuned = make_config("tuned", agent="ppo", task="gym/Pendulum-v1")
    assert tuned.ppo.gamma == 0.9 and make_config("tuned", agent="ppo", task="gym/Pendulum-v1", **{"ppo.gamma": 0.8}).ppo.gamma == 0.8
    with pytest.raises(ConfigError, match="no tuned settings for toy/pointmass; it has them for task=gym/CartPole-v1"):
        make_config("tuned", agent="ppo", task="toy/pointmass")


@pytest.mark.parametrize("agent", sorted(set(TUNED) - {"tdmpc2"}))  # which has none for its own task
def test_tuned_without_a_task_is_tuned_for_the_agents_own(agent, capsys):
    """On the command line as in Python."""
    assert main(["train", f"agent={agent}", "preset=tuned", "--cfg"]) == 0
    shown = RunConfig.from_dict(OmegaConf.to_container(OmegaConf.create(capsys.readouterr().out)))
    assert shown == make_config("tuned", agent=agent) and shown.task == AGENTS[agent]["task"]
