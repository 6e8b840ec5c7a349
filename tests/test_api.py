"""The six verbs of the library, and imports that only go downward."""

from __future__ import annotations

import ast
import dataclasses
import subprocess
import sys
from pathlib import Path

import gymnasium
import pytest
import torch

import worldmpc
from worldmpc.config import ConfigError
from worldmpc.envs.toy import Balance, PointMass

PACKAGE = Path(worldmpc.__file__).parent
ORDER = (
    "types",
    "config",
    "runtime",
    "noise",
    "files",
    "envs",
    "data",
    "models",
    "functional",
    "optim",
    "planners",
    "losses",
    "off_policy",
    "on_policy",
    "learners",
    "opponents",
    "agents",
    "report",
    "training",
    "api",
    "bench",
    "cli",
)


def test_train_evaluate_save_and_load(tmp_path):
    envs = worldmpc.make_envs("toy/pointmass")
    agent = worldmpc.make_agent(envs, preset="debug", seed=3)
    state = worldmpc.train(agent, envs, steps=80, progress=False)
    result = worldmpc.evaluate(agent, episodes=3)
    assert state.env_steps == 80 and len(result.returns) == 3 and result.mean_return == sum(result.returns) / 3
    worldmpc.save(agent, tmp_path / "agents" / "mine")
    loaded = worldmpc.load(tmp_path / "agents" / "mine")
    assert dataclasses.replace(loaded.config, device="auto") == agent.config and loaded.updates == agent.updates == 80
    assert worldmpc.evaluate(loaded, episodes=3).returns == result.returns
    assert worldmpc.evaluate(loaded, episodes=3, mode="prior").returns != result.returns


def test_a_single_discount_is_warned_of():
    envs = worldmpc.make_envs("toy/pointmass")
    with pytest.warns(UserWarning, match="the task's own discount alone"):
        agent = worldmpc.make_agent(envs, "debug", **{"multi_gamma.enabled": True, "multi_gamma.gammas": ["primary"]})
    assert agent.model.auxiliary is None


def test_training_goes_on_and_hooks_can_stop_it():
    envs = worldmpc.make_envs("toy/balance")
    agent = worldmpc.make_agent(envs, preset="debug")
    state = worldmpc.train(agent, envs, steps=60, progress=False)

    def stop(state, metrics):
        state.stop = state.decisions >= 70

    assert worldmpc.train(agent, envs, steps=200, state=state, hooks=[stop], progress=False).decisions == 70
    assert worldmpc.train(agent, envs, steps=75, state=state, progress=False).decisions == 75


def test_a_state_goes_on_with_what_it_belongs_to():
    envs = worldmpc.make_envs("toy/pointmass")
    agents = [worldmpc.make_agent(envs, preset="debug", seed=seed) for seed in (1, 2)]
    state = worldmpc.train(agents[0], envs, 10, progress=False)
    for agent, other in ((agents[1], envs), (agents[0], worldmpc.make_envs("toy/pointmass"))):
        with pytest.raises(ConfigError, match="state: belongs to another agent or other environments"):
            worldmpc.train(agent, other, 20, state=state, progress=False)


def test_evaluation_plays_the_environment_that_was_trained_on(tmp_path):
    envs = worldmpc.make_envs("toy/pointmass", worldmpc.EnvConfig(action_repeat=2, episode_length=7))
    agent = worldmpc.make_agent(envs, preset="debug")
    worldmpc.save(agent, tmp_path / "mine")
    for one in (agent, worldmpc.load(tmp_path / "mine")):
        assert worldmpc.evaluate(one, episodes=2).lengths == [7, 7]


def test_an_agent_knows_how_its_environments_were_made():
    envs = worldmpc.make_envs("toy/pointmass", worldmpc.EnvConfig(num_envs=2, discount=0.9))
    agent = worldmpc.make_agent(envs, preset="debug")
    assert agent.discount == 0.9 and agent.config.env.num_envs == 2
    assert worldmpc.make_agent(envs, preset="debug", env={"discount": 0.8}).discount == 0.8
    silent = worldmpc.make_envs("toy/pointmass")
    assert worldmpc.make_agent(silent, agent="td3").discount == worldmpc.make_config(agent="td3").env.discount == 0.98


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"env.num_envs": 3}, "env.num_envs: the environments were made with 2, got 3; pass it to make_envs, in EnvConfig"),
        ({"env": {"action_repeat": 4}}, "env.action_repeat: the environments were made with 1, got 4; pass it to make_envs, in EnvConfig"),
        ({"env.simulator_state": True}, "env.simulator_state: the environments were made with False, got True; .*"),
        ({"threads": 1}, "threads: only worldmpc.run reads it, an agent in memory does not; leave it out"),
        ({"eval.episodes": 3}, "eval: only worldmpc.run reads it, .*"),
        ({"seeds": [1, 2]}, "seeds: only worldmpc.run reads it, .*"),
    ],
)
def test_what_the_agent_cannot_change_is_refused(overrides, message):
    envs = worldmpc.make_envs("toy/pointmass", worldmpc.EnvConfig(num_envs=2))
    with pytest.raises(ConfigError, match=f"^{message}$"):
        worldmpc.make_agent(envs, "debug", **overrides)
    assert worldmpc.make_agent(envs.spec, "debug", **{"env.num_envs": 3}).config.env.num_envs == 3


def test_a_game_is_trained_evaluated_saved_and_loaded(tmp_path):
    config = worldmpc.EnvConfig(num_envs=2, episode_length=15)
    with worldmpc.make_envs("hockey", config, opponents=["weak", "still"]) as envs:
        assert isinstance(envs, worldmpc.Match) and set(envs.pool.players) == {"weak", "still"}
        agent = worldmpc.make_agent(envs, preset="debug", agent="sac", seed=3)
        state = worldmpc.train(agent, envs, steps=80, progress=False)
        result = worldmpc.evaluate(agent, episodes=4)
        assert list(result.games) == ["weak", "still"] and [len(games) for games in result.games.values()] == [4, 4]
        assert {(game.seat, game.starter) for game in result.games["weak"]} == {(1, 1), (2, 1), (1, 2), (2, 2)}
        within = worldmpc.evaluate(agent, envs, episodes=2, opponents="random")  # on the environments that are learned in
        assert list(within.games) == ["random"] and worldmpc.train(agent, envs, 120, state=state, progress=False).env_steps == 120
        assert set(envs.opponents) <= {"weak", "still"}
    worldmpc.save(agent, tmp_path / "mine")
    loaded = worldmpc.load(tmp_path / "mine")
    again = worldmpc.evaluate(loaded, episodes=4, opponents=["weak", f"SAC:{tmp_path}/mine"])
    assert list(again.games) == ["weak", f"{tmp_path}/mine"]
    assert again.games["weak"] == worldmpc.evaluate(agent, episodes=4).games["weak"]


def test_a_game_without_names_is_played_against_oneself():
    with worldmpc.make_envs("hockey", worldmpc.EnvConfig(num_envs=2, episode_length=15)) as envs:
        agent = worldmpc.make_agent(envs, preset="debug", agent="sac")
        worldmpc.train(agent, envs, steps=40, progress=False)
        assert set(envs.opponents) == {"snapshot-000000000"}
        assert list(worldmpc.evaluate(agent, episodes=1).games) == ["weak", "strong"]
    section = worldmpc.make_config(opponents={"name": ["random", "still"], "weights": [1, 3]}).opponents
    with worldmpc.make_envs("hockey", opponents=section) as envs:
        assert [(entry.name, entry.weight) for entry in envs.pool.phase.entries] == [("random", 1.0), ("still", 3.0)]


def test_opponents_that_cannot_be_are_refused():
    agent = worldmpc.make_agent(worldmpc.make_envs("toy/pointmass"), "debug", agent="sac")
    for refused, message in (
        (lambda: worldmpc.make_envs("toy/pointmass", opponents="weak"), "^opponents: toy/pointmass has one player; leave them out"),
        (lambda: worldmpc.make_envs("hockey", opponents="weka"), "^opponents: 'weka' is no known opponent, .* did you mean weak"),
        (lambda: worldmpc.evaluate(agent, episodes=1, opponents="weak"), "^opponents: toy/pointmass has one player; leave them out"),
        (lambda: worldmpc.evaluate(agent, "hockey", episodes=1), "^task: the agent was trained on 2 observations and 2 actions, hockey/"),
    ):
        with pytest.raises(ConfigError, match=message):
            refused()


@pytest.mark.parametrize("task", [Balance, lambda: PointMass()])
def test_own_environment(task):
    envs = worldmpc.make_envs(task, worldmpc.EnvConfig(num_envs=2))
    agent = worldmpc.make_agent(envs, preset="debug")
    worldmpc.train(agent, envs, steps=60, progress=False)
    assert len(worldmpc.evaluate(agent, task, episodes=2).returns) == 2
    with pytest.raises(worldmpc.ConfigError, match="pass a function"):
        worldmpc.evaluate(agent)


def test_environments_of_the_caller_stay_open(tmp_path):
    closed = []

    class Watched(Balance):
        def close(self):
            closed.append(self)

    agent = worldmpc.make_agent(worldmpc.make_envs(Balance), "debug")
    worldmpc.save(agent, tmp_path / "mine")
    mine, vector = Watched(), gymnasium.vector.SyncVectorEnv([lambda: gymnasium.wrappers.TimeLimit(Watched(), 20)])
    for task in (mine, vector):
        assert len(worldmpc.evaluate(agent, task, episodes=1).returns) == 1
        worldmpc.load(tmp_path / "mine", task)
        assert closed == []
        assert len(worldmpc.evaluate(agent, task, episodes=1).returns) == 1
    worldmpc.evaluate(agent, Watched, episodes=2)
    assert len(closed) == 2


@pytest.mark.parametrize("num_envs", [1, 3])
def test_ppo_with_its_defaults_learns_in_any_number_of_environments(num_envs):
    envs = worldmpc.make_envs("toy/identity-discrete", worldmpc.EnvConfig(num_envs=num_envs))
    agent = worldmpc.make_agent(envs, agent="ppo")
    state = worldmpc.train(agent, envs, steps=128 * num_envs, progress=False)
    assert state.updates == agent.updates == 4 * {1: 1, 3: 2}[num_envs]  # passes x minibatches of about 256
    assert worldmpc.evaluate(agent, episodes=2).returns


def test_what_does_not_fit_the_agent_is_named():
    envs, others = worldmpc.make_envs("toy/pointmass"), worldmpc.make_envs("toy/balance")
    agent = worldmpc.make_agent(envs, "debug", agent="td3")
    for refused in (lambda: worldmpc.train(agent, others, steps=10), lambda: worldmpc.evaluate(agent, "toy/balance")):
        with pytest.raises(worldmpc.ConfigError, match=r"^task: the agent was trained on 2 observations .* toy/balance has 1 obs"):
            refused()
    for mode in ("prior", "junk"):
        with pytest.raises(worldmpc.ConfigError, match=f"^mode: agent=td3 .* acts in explore or eval, not in '{mode}'"):
            worldmpc.evaluate(agent, episodes=1, mode=mode)
    with pytest.raises(worldmpc.ConfigError, match="^planner.name: agent=td3 never reads it"):
        worldmpc.make_agent(envs, "debug", agent="td3", planner="cem")


def test_official_checkpoint_acts(tmp_path):
    model = worldmpc.load_official(Path(__file__).parent / "golden" / "tiny_ckpt_new.pt")
    z = model.encode(torch.zeros(2, 7))
    step = model.step(z, torch.zeros(2, 3))
    assert step.z.shape == z.shape and step.reward.shape == step.cont.shape == (2,)
    assert model.q_values(z, torch.zeros(2, 3)).shape == (5, 2)
    assert {"action", "mean", "log_std"} <= set(model.policy(z, torch.zeros(2, 3))._fields)


def test_import_is_cheap():
    code = "import sys, worldmpc, worldmpc.config; assert 'torch' not in sys.modules; print(worldmpc.__version__)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == worldmpc.__version__


def test_every_public_name_exists():
    for name in worldmpc.__all__:
        assert getattr(worldmpc, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = worldmpc.nonsense


def test_imports_go_downward():
    """A module imports only from its own package or from those before it in ORDER."""
    for path in PACKAGE.rglob("*.py"):
        here = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if here in ("__init__", "__main__"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                parts = name.split(".")
                if parts[0] == "worldmpc" and len(parts) > 1:
                    assert ORDER.index(parts[1]) <= ORDER.index(here), f"{path.name} ({here}) imports {name}"


def test_agents_only_wire():
    for path in (PACKAGE / "agents").glob("*.py"):
        assert path.read_text().count("\n") <= 170, path.name
