"""Whole runs of games: agents, opponents of every kind, resuming, curricula, and everything that is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.duel import Duel
from tests.training.test_run import assert_same_end, config, evaluations, state_of
from worldmpc.agents import make_agent
from worldmpc.config import ConfigError, make_config
from worldmpc.data.shaping import shape_wins
from worldmpc.envs import EnvConfig, make_envs
from worldmpc.models.cloning import Clone, decoy_meta
from worldmpc.opponents.loaders import load_player
from worldmpc.opponents.match import Match, player_spec
from worldmpc.opponents.players import AgentPlayer, ClonePlayer
from worldmpc.training.checkpoint import CheckpointError, CheckpointStore, save_checkpoint
from worldmpc.training.run import run, run_seeds
from worldmpc.training.trainer import make_state, train
from worldmpc.training.two_player import Fixtures, context_of, evaluation_opponents, game_rows, load_saved, seat_opponents
from worldmpc.types import Seat

SHORT = "hockey/self-play-defense"  # games of 81 steps at most
HOCKEY = Seat((18,), 4)


def game(folder: Path | None, **overrides: Any) -> Any:
    own = {
        "task": SHORT,
        "agent": "td3",
        "steps": 200,
        "eval_freq": 1000,
        "eval.episodes": 1,
        "eval.opponents": ["random"],
        "opponents": ["random"],
        "checkpoint.every": 1000,
    }
    if overrides.get("agent") not in ("ppo", "mbmpc"):
        own |= {"replay.capacity": 2000, "train.utd": 0.25}
    if overrides.get("agent", "td3") == "td3":
        own["td3.hidden"] = [16, 16]
    return config(folder, **{**own, **overrides})


def games(folder: Path, kind: str = "training") -> list[dict[str, Any]]:
    return [row for row in map(json.loads, (folder / "games.jsonl").read_text().splitlines()) if row["kind"] == kind]


@pytest.fixture(autouse=True)
def _no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than all that is tested here."""
    monkeypatch.setattr("worldmpc.training.run.plot_curves", lambda runs, path: None)


class Stop:
    """Stops a run as a signal would, behind the updates of a step."""

    def __init__(self, decisions: int) -> None:
        self.decisions = decisions

    def __call__(self, state: Any, metrics: Any) -> None:
        if state.decisions == self.decisions:
            state.stop = True


RESUMED: dict[str, dict[str, Any]] = {
    "actor-critic": {"opponents.snapshot_every": 60, "opponents.snapshots": 2, "opponents.choose": "pfsp", "env.num_envs": 2},
    "planner": {
        "agent": "tdmpc2",
        "env.action_repeat": 3,
        "env.num_envs": 2,
        "steps": 390,
        "opponents.snapshot_every": 50,
        "opponents.win_bonus": 5.0,
        "opponents.win_bonus_games": 4,
        "replay.mirror": True,
    },
    "workers": {"opponents.snapshot_every": 60, "env.num_envs": 2, "env.workers": "async", "env.num_workers": 2},
}


@pytest.mark.parametrize("name", RESUMED)
def test_stopped_and_resumed_equals_uninterrupted(name: str, tmp_path: Path) -> None:
    own = {"opponents": ["weak", "strong", "random", "self_play"], "steps": 300, "eval_freq": 150, "checkpoint.every": 90, **RESUMED[name]}
    run(game(tmp_path / "whole", **own))
    halted = run(game(tmp_path / "parts", **own), extra_hooks=(Stop(86),))
    assert not halted.finished and halted.decisions == 86
    run(game(tmp_path / "parts", resume="auto", **own), extra_hooks=(Stop(124),))
    assert run(game(tmp_path / "parts", resume="auto", **own)).finished
    assert_same_end(tmp_path / "whole", tmp_path / "parts")
    assert (tmp_path / "whole" / "games.jsonl").read_text() == (tmp_path / "parts" / "games.jsonl").read_text()
    played = games(tmp_path / "whole")
    assert len(played) >= 3 and len(games(tmp_path / "whole", "evaluation")) >= 3
    assert any(name.startswith("replay.") for name in state_of(tmp_path / "whole"))


AGENTS: dict[str, dict[str, Any]] = {
    "tdmpc2": {},
    "sac": {},
    "td3": {},
    "ppo": {"ppo.rollout_steps": 8},
    "director": {},
    "dqn": {"task": f"{SHORT}-discrete"},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs of every kind of agent, each made once."""
    base, made = tmp_path_factory.mktemp("trained"), set()

    def folder(agent: str) -> Path:
        if agent not in made:
            torch.set_num_threads(1)
            run(game(base / agent, agent=agent, steps=96, **AGENTS[agent]))
            made.add(agent)
        return base / agent

    return folder


def decoy(folder: Path, obs_dim: int = 18) -> Path:
    clone = Clone(obs_dim, 4, (8,))
    return save_checkpoint(folder.parent, folder.name, {"clone": dict(clone.state_dict())}, decoy_meta(clone))


@pytest.mark.parametrize("agent", AGENTS)
def test_every_agent_learns_and_is_evaluated(agent: str, trained: Any) -> None:
    folder = trained(agent)
    assert [int(row["decisions"]) for row in evaluations(folder)] == [0, 96]
    rows = games(folder, "evaluation")
    assert [row["opponent"] for row in rows] == ["random", "random"] and all(row["won"] + row["drawn"] + row["lost"] == 1 for row in rows)
    assert (
        rows[-1]["updates"] > 0
        and len(games(folder)) >= 1
        and all(row["opponent"] == "random" and row["winner"] in (-1, 0, 1) for row in games(folder))
    )
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["spec"]["other"]["obs_shape"] == [18] and meta["spec"]["obs_shape"] == [18]


@pytest.mark.parametrize("agent", ["tdmpc2", "sac", "td3", "ppo"])
def test_checkpoints_of_every_kind_sit_opposite(agent: str, trained: Any) -> None:
    for name in (
        f"{agent.upper()}:{trained(agent)}",
        str(trained(agent)),
        str(CheckpointStore(trained(agent) / "checkpoints", keep=2).newest_valid()),
    ):
        player = load_player(name, context_of(SHORT, HOCKEY))
        assert isinstance(player, AgentPlayer)
        action, _ = player.act(player.init_carry(2, torch.Generator()), torch.randn(2, 18), torch.Generator())
        assert action.shape == (2, 4) and action.abs().max() <= 1


def test_a_run_against_all_kinds_is_resumed_exactly(trained: Any, tmp_path: Path) -> None:
    files = [f"{agent.upper()}:{trained(agent)}" for agent in ("sac", "ppo", "tdmpc2")]
    own = {
        "opponents": [*files, f"DecoyPolicy:{decoy(tmp_path / 'decoy')}", "random"],
        "opponents.mode": "prior",
        "env.num_envs": 3,
        "steps": 240,
    }
    run(game(tmp_path / "whole", **own))
    run(game(tmp_path / "parts", **own), extra_hooks=(Stop(150),))
    run(game(tmp_path / "parts", resume="auto", **own))
    assert_same_end(tmp_path / "whole", tmp_path / "parts")
    assert len({row["opponent"] for row in games(tmp_path / "whole")}) >= 2


def test_decoys_are_loaded_by_path(tmp_path: Path) -> None:
    assert isinstance(load_saved(decoy(tmp_path / "decoy")), Clone)
    assert isinstance(load_player(str(tmp_path / "decoy"), context_of(SHORT, HOCKEY)), ClonePlayer)


def test_a_function_that_makes_a_game_is_trained_on(tmp_path: Path) -> None:
    own = {"opponents": ["self_play", "random"], "opponents.snapshot_every": 40, "eval.opponents": []}
    result = run(game(tmp_path / "run", **own), Duel)
    assert result.finished and json.loads((tmp_path / "run" / "config.json").read_text())["task"] == "duel_v0"
    assert {row["opponent"] for row in games(tmp_path / "run", "evaluation")} == {"random"}
    assert {"random", "snapshot-000000000"} <= {row["opponent"] for row in games(tmp_path / "run")}
    assert {row["seat"] for row in games(tmp_path / "run")} == {1, 2}


def test_players_who_differ_play_from_one_seat(tmp_path: Path) -> None:
    run(game(tmp_path / "run", steps=120), lambda: Duel(wide=2))
    assert {row["seat"] for row in games(tmp_path / "run")} == {1}
    with pytest.raises(ConfigError, match="the learner cannot sit opposite itself; use random"):
        run(game(tmp_path / "none", opponents="self_play"), lambda: Duel(wide=2))
    assert not (tmp_path / "none").exists()


def test_a_curriculum_is_followed(tmp_path: Path) -> None:
    defense = {"environment": {"mode": "TRAIN_DEFENSE"}}
    shaping = {"N": 100, "CLOSENESS_START": 0.0, "TOUCH_START": 0.0, "DIRECTION_START": 0.0}
    phases = [
        {"name": "a", "episodes": 3, "opponent": {"type": "random"}, "clear_buffer": False, "reward_shaping": shaping, **defense},
        {"name": "b", "episodes": 2, "opponent": {"type": "none"}, "reward_bonus": {"K": 2}, **defense},
        {
            "name": "c",
            "episodes": 2,
            "opponent": {"type": "self_play"},
            "clear_buffer": False,
            "environment": {"keep_mode": True, "mode": "TRAIN_SHOOTING"},
        },
    ]
    file = tmp_path / "curriculum.yaml"
    file.write_text(json.dumps({"curriculum": {"phases": phases}}))
    own = {"opponents": str(file), "steps": 700, "eval_freq": 350}
    sizes: list[tuple[str, int]] = []

    def note(state: Any, metrics: Any) -> None:
        sizes.append((state.envs.pool.phase.name, len(state.source.replay)))

    run(game(tmp_path / "whole", **own), extra_hooks=(note,))
    played = [row["opponent"] for row in games(tmp_path / "whole")]
    assert played[:5] == ["random"] * 3 + ["still"] * 2 and set(played[5:]) == {"snapshot-000000000"} and len(played) > 6
    names = [name for name, _ in sizes]
    assert sorted(set(names), key=names.index) == ["a", "b", "c"]
    grown = {name: [size for own, size in sizes if own == name] for name in "abc"}
    assert grown["a"] == list(range(1, len(grown["a"]) + 1)) and grown["b"][0] == 0 and grown["c"][0] > grown["b"][0] == 0
    run(game(tmp_path / "parts", **own), extra_hooks=(Stop(names.index("b") + 1),))  # where the replay was emptied
    run(game(tmp_path / "parts", resume="auto", **own), extra_hooks=(Stop(400),))
    run(game(tmp_path / "parts", resume="auto", **own))
    assert_same_end(tmp_path / "whole", tmp_path / "parts")


def test_updates_learn_from_shaped_and_mirrored_windows() -> None:
    made = make_config(
        "debug",
        task=SHORT,
        agent="td3",
        opponents="random",
        **{"opponents.win_bonus": 3.0, "opponents.win_bonus_final": 1.0, "opponents.win_bonus_games": 4, "replay.mirror": True},
        **{"train.utd": 0.1, "td3.hidden": [16, 16]},
    )
    with seat_opponents(make_envs(SHORT, EnvConfig(num_envs=2), seed=1), made) as envs:
        assert isinstance(envs, Match)
        state = make_state(make_agent(made, envs.spec), envs)
        train(state, [], 400)
        source: Any = state.source
        pool: Any = envs.pool
        assert pool.begun > 4 and pool.win_bonus == (1.0, 0.92) and pool.games["random"][0] > 0
        seen: list[Any] = []
        source.convert = lambda batch: seen.append(batch) or batch
        generator = source.generator.get_state()
        source.next()
        again = torch.Generator()
        again.set_state(generator)
        plain = source.replay.sample(torch.rand(source.batch_size, dtype=torch.float64, generator=again))
        flipped = torch.rand(source.batch_size, generator=again) < 0.5
        (batch,) = seen
        assert torch.equal(batch.reward, shape_wins(plain, 1.0, 0.92).reward)
        signs = torch.where(flipped[:, None], torch.tensor([1.0, -1, -1, 1]), torch.ones(4))
        assert torch.equal(batch.action, plain.action * signs) and 0 < flipped.sum() < len(flipped)


def test_evaluations_are_repeatable() -> None:
    made = game(None, run_dir=None, agent="sac", **{"eval.opponents": ["weak", "random"], "opponents": ["random", "weak"]})
    with make_envs(SHORT, EnvConfig(num_envs=2), seed=1) as envs:
        agent = make_agent(made, player_spec(envs.spec))
        fixtures = Fixtures(envs, evaluation_opponents(made, envs.spec))
        one, two, other = fixtures.play(agent, 3, index=4), fixtures.play(agent, 3, index=4), fixtures.play(agent, 3, index=5)
        assert one == two and one.returns != other.returns
        rows = game_rows(one)
        assert [(row["opponent"], row["games"]) for row in rows] == [("weak", 3), ("random", 3)]
        assert one.success == [(1 + result.winner) / 2 for series in one.games.values() for result in series]


def test_whom_evaluations_play() -> None:
    def names(task: str, **overrides: Any) -> list[str]:
        made = make_config("debug", task=task, **overrides)
        with make_envs(task) as envs:
            return list(evaluation_opponents(made, envs.spec))

    with make_envs(Duel) as envs:
        assert list(evaluation_opponents(make_config("debug", task="hockey"), envs.spec)) == ["random"]
    assert names("hockey") == ["weak", "strong"] and names("hockey/self-play-discrete") == ["random"]
    assert names("hockey", opponents=["random", "self_play", "random"]) == ["random"]
    assert names("hockey", opponents=["random"], **{"eval.opponents": ["strong"]}) == ["strong"]
    with pytest.raises(ConfigError, match=r"eval\.opponents: self_play changes while the agent learns"):
        names("hockey", **{"eval.opponents": ["self_play"]})


def refused(tmp_path: Path, message: str, error: type[Exception] = ConfigError, task: Any = None, **overrides: Any) -> None:
    """A run is refused in one line, and leaves nothing behind."""
    with pytest.raises(error, match=message) as caught:
        run_seeds(game(tmp_path / "none", **overrides), task)
    assert "\n" not in str(caught.value) and not (tmp_path / "none").exists()


def test_opponents_that_cannot_be_had(trained: Any, tmp_path: Path) -> None:
    refused(tmp_path, "'week' is no known opponent.*did you mean weak", opponents="week")
    refused(tmp_path, "unknown type 'TDMCP2'.*did you mean TDMPC2:<path>", opponents="TDMCP2:somewhere")
    refused(tmp_path, "nowhere: no such file or folder", opponents="SAC:nowhere")
    refused(tmp_path, "missing.json: cannot be read", opponents="missing.json")
    refused(tmp_path, "holds agent=td3, not SAC", opponents=f"SAC:{trained('td3')}")
    refused(tmp_path, "has 16 observations and 3 actions", task="hockey/self-play-nokeep", opponents=str(trained("td3")))
    refused(tmp_path, "has 18 observations and 8 choices", task="hockey/self-play-discrete", agent="dqn", opponents=str(trained("td3")))
    refused(tmp_path, "was made for 18 observations and 8 choices", opponents=str(trained("dqn")))
    refused(tmp_path, "was made for 16 observations", opponents=str(decoy(tmp_path / "decoy16", 16)))
    refused(tmp_path, "week", **{"eval.opponents": ["week"]})
    refused(tmp_path, "bot of hockey with Box actions", task="hockey/self-play-discrete", agent="dqn", opponents="weak")


def test_damaged_opponents(trained: Any, tmp_path: Path) -> None:
    shutil.copytree(trained("td3"), tmp_path / "copy")
    for file in (tmp_path / "copy").glob("checkpoints/*/agent.safetensors"):
        data = bytearray(file.read_bytes())
        data[-100] ^= 1
        file.write_bytes(data)
    with pytest.warns(UserWarning):
        refused(tmp_path, "no usable checkpoint", CheckpointError, opponents=str(tmp_path / "copy"))
    newest = sorted((tmp_path / "copy" / "checkpoints").glob("step_*"))[-1]
    refused(tmp_path, newest.name, CheckpointError, opponents=str(newest))
    (clone,) = decoy(tmp_path / "decoy").glob("*.safetensors")
    data = bytearray(clone.read_bytes())
    data[-1] ^= 1
    clone.write_bytes(data)
    refused(tmp_path, "decoy", CheckpointError, opponents=str(tmp_path / "decoy"))
    (tmp_path / "empty").mkdir()
    refused(tmp_path, "empty: neither a run folder", CheckpointError, opponents=str(tmp_path / "empty"))


def test_games_and_settings_that_do_not_go_together(tmp_path: Path) -> None:
    refused(tmp_path, "opponents: toy/balance has one player", task="toy/balance")
    refused(tmp_path, "opponents: toy/balance has one player", task="toy/balance", opponents="self_play")
    refused(tmp_path, "seeds: games are trained one run per seed", agent="tdmpc2", seeds=[1, 2])
    refused(tmp_path, "draws no windows from a replay", agent="ppo", **{"opponents.win_bonus": 1.0})
    refused(tmp_path, "draws no windows from a replay", agent="mbmpc", **{"opponents.win_bonus": 1.0})
    refused(tmp_path, "draws no windows from a replay", agent="mbmpc", **{"replay.mirror": True})
    own = {"opponents": "self_play", "eval.opponents": []}
    refused(tmp_path, "replay.mirror: toy/balance says of no symmetry", task="toy/balance", **own, **{"replay.mirror": True})
    file = tmp_path / "nokeep.json"
    file.write_text(json.dumps({"phases": [{"episodes": 1, "opponent": {"type": "weak"}, "environment": {"keep_mode": False}}]}))
    refused(tmp_path, "nokeep.json has keep_mode=false, hockey/self-play-defense has not; use the task that does", opponents=str(file))


def test_a_run_goes_on_against_the_same_opponents_only(trained: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"another opponents.name; choose another run_dir"):
        run(game(trained("td3"), opponents=["weak"], resume="auto"))
    with pytest.raises(ConfigError, match=r"was made with opponents.name=.*random.*, which cannot become .*weak.*; begin a new run"):
        run(game(None, run_dir=None, opponents=["weak"], resume=str(trained("td3")), steps=130))
