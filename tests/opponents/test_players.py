"""Who can take a seat, and how they are loaded by name."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.opponents.people import Learner
from worldmpc.agents import make_agent
from worldmpc.config import ConfigError, make_config
from worldmpc.envs.hockey.bots import ScriptedBot
from worldmpc.functional import tree_where
from worldmpc.models.cloning import Clone
from worldmpc.opponents.loaders import Context, load_player, read_name
from worldmpc.opponents.players import AgentPlayer, BotPlayer, ClonePlayer, RandomPlayer, StillPlayer
from worldmpc.training.two_player import copy_agent
from worldmpc.types import EnvSpec, Seat

BOX, CHOICES, HOCKEY = Seat((3,), 2), Seat((3,), 4, True), Seat((18,), 4)


def stream(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_chance_is_uniform() -> None:
    actions, _ = RandomPlayer(BOX).act((), torch.zeros(2000, 3), stream())
    assert actions.shape == (2000, 2) and -1 <= actions.min() < -0.99 and 0.99 < actions.max() <= 1 and abs(float(actions.mean())) < 0.05
    choices, _ = RandomPlayer(CHOICES).act((), torch.zeros(2000, 3), stream())
    assert (
        choices.unique().tolist() == [0, 1]
        and (choices.sum(1) == 1).all()
        and choices.mean(0).tolist() == pytest.approx([0.25] * 4, abs=0.04)
    )


def test_who_does_nothing() -> None:
    assert StillPlayer(BOX).act((), torch.zeros(2, 3), stream())[0].tolist() == [[0, 0]] * 2
    assert StillPlayer(CHOICES).act((), torch.zeros(2, 3), stream())[0].tolist() == [[1, 0, 0, 0]] * 2


@pytest.mark.parametrize("keep_mode", [True, False])
@pytest.mark.parametrize("kind", ["weak", "strong"])
def test_bots_are_the_games_own(kind: str, keep_mode: bool) -> None:
    """Every game has its own phase, which goes on by random steps, as that of the original."""
    size = 18 if keep_mode else 16
    player, bot = BotPlayer(kind, keep_mode), ScriptedBot(kind, np.random.default_rng(0), keep_mode)
    generator = stream()
    carry = player.init_carry(5, generator)
    assert ((carry[0] >= 0) & (carry[0] < math.pi)).all() and len(carry[0].unique()) == 5
    for _ in range(4):
        obs = torch.randn(5, size) * 2
        actions, then = player.act(carry, obs, generator)
        step = then[0] - carry[0]
        assert ((step >= 0) & (step < 0.2)).all() and len(step.unique()) == 5
        expected = [bot.aim(view, phase) for view, phase in zip(obs.numpy(), then[0].tolist(), strict=True)]
        assert actions.dtype == torch.float32 and torch.equal(actions, torch.from_numpy(np.array(expected, np.float32)))
        carry = then


def test_clones_act_by_sample_or_expectation() -> None:
    clone = Clone(3, 2, (8,))
    obs = torch.randn(4, 3)
    actions, _ = ClonePlayer(clone).act((), obs, stream(5))
    assert torch.equal(actions, clone.sample(obs, torch.rand(4, 2, generator=stream(5))))
    assert torch.equal(ClonePlayer(clone, deterministic=True).act((), obs, stream())[0], clone.mean(obs))


def test_agents_hold_their_actions_as_in_training() -> None:
    learner = Learner(0.0, EnvSpec("duel_v0", (3,), 2, 6, action_repeat=3))
    player = AgentPlayer(learner)  # type: ignore[arg-type]
    carry = player.init_carry(2, stream())
    acted = []
    for step in range(7):
        learner.be(float(step))
        action, carry = player.act(carry, torch.zeros(2, 3), stream())
        acted.append(action[:, 0].tolist())
        if step == 3:  # the first game is over
            carry = tree_where(torch.tensor([True, False]), player.init_carry(2, stream()), carry)
    assert acted == [[0, 0], [0, 0], [0, 0], [3, 3], [4, 3], [4, 3], [4, 6]] and player.state_dict() == {"turns": 4}


def test_agents_see_the_mean_of_what_the_other_did_while_their_action_held() -> None:
    class Watching(Learner):
        simulation, seen = "somebody", []  # type: ignore[var-annotated]

        def watch_game(self, carry: Any, obs: torch.Tensor, extras: dict[str, torch.Tensor]) -> Any:
            self.seen.append((obs[:, 0].tolist(), extras["other_action"][:, 0].tolist()))
            return carry

    learner = Watching(0.0, EnvSpec("duel_v0", (3,), 2, 6, action_repeat=2, other=Seat((3,), 1)))
    player = AgentPlayer(learner)  # type: ignore[arg-type]
    carry = player.init_carry(2, stream())
    for step, others in enumerate([[0.5, -0.5], [1.0, 0.5], [0.25, 0.0], [0.75, 0.0], [1.0, 1.0], [1.0, 1.0]]):
        obs = torch.full((2, 3), float(step))
        _, carry = player.act(carry, obs, stream())
        carry = player.watch(carry, obs, torch.tensor(others)[:, None])
        if step == 4:  # the first game is over, in the middle of a decision: nobody counts that
            carry = tree_where(torch.tensor([True, False]), player.init_carry(2, stream()), carry)
    assert learner.seen == [([0, 0], [0.75, 0.0]), ([2, 2], [0.5, 0.0]), ([4], [1.0])]


AGENTS: dict[str, dict[str, Any]] = {
    "tdmpc2": {},
    "tdmpc_square": {},
    "director": {},
    "sac": {},
    "td3": {},
    "ppo": {},
    "imagining": {"agent": "tdmpc2", "opponent_simulation": {"enabled": True, "opponent_agents": ["weak"]}},
}


@pytest.mark.parametrize("name", AGENTS)
def test_a_copy_acts_as_its_original_did(name: str) -> None:
    config = make_config("debug", task="hockey", **{"agent": name, **AGENTS[name]})
    spec = EnvSpec("hockey/self-play", (18,), 4, 251, other=HOCKEY)
    agent = make_agent(config, spec)
    with torch.no_grad():
        for parameter in agent.model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    obs = torch.randn(3, 18)

    def acts(one: Any) -> Any:
        player, actions = AgentPlayer(one), []
        carry = player.init_carry(3, stream())
        for _ in range(2):
            action, carry = player.act(carry, obs, stream())
            carry = player.watch(carry, obs, -action)
            actions.append(action)
        return torch.stack(actions)

    copy = copy_agent(agent)
    before = acts(agent)
    assert torch.equal(acts(copy), before) and (before.abs() <= 1).all()
    with torch.no_grad():
        for parameter in agent.model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    assert torch.equal(acts(copy), before) and not torch.equal(acts(agent), before)


def nothing(path: Path) -> Any:
    raise AssertionError(path)


def test_names() -> None:
    for name in ("weak", "strong"):
        player = load_player(name, Context("hockey/self-play", HOCKEY, nothing))
        assert isinstance(player, BotPlayer) and player.bot.kind == name and player.bot.keep_mode
    player = load_player("weak", Context("hockey-real/self-play-nokeep", Seat((16,), 3), nothing))
    assert isinstance(player, BotPlayer) and not player.bot.keep_mode
    assert isinstance(load_player("random", Context("duel_v0", BOX, nothing)), RandomPlayer)
    assert isinstance(load_player("still", Context("duel_v0", BOX, nothing)), StillPlayer)


@pytest.mark.parametrize(("task", "seat"), [("duel_v0", BOX), ("hockey/self-play-discrete", Seat((18,), 8, True))])
def test_bots_play_hockey_with_box_actions_alone(task: str, seat: Seat) -> None:
    with pytest.raises(ConfigError, match=f"weak is a bot of hockey with Box actions; {task} needs others, as random or self_play"):
        load_player("weak", Context(task, seat, nothing))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("week", "'week' is no known opponent, and there is no such file or folder; did you mean weak?"),
        ("self_plai", "did you mean self_play?"),
        ("TDMPC:run", "unknown type 'TDMPC' in 'TDMPC:run'; did you mean TDMPC2:<path>?"),
        ("zzzz", "'zzzz' is no known opponent, .*; use weak, strong, random, still, self_play, TDMPC2:<path>"),
        ("SAC:nowhere/run", r"nowhere/run: no such file or folder \(of SAC:nowhere/run\)"),
        ("runs/nowhere", "'runs/nowhere' is no known opponent, and there is no such file or folder"),
        ("", "'' is no known opponent"),
        ("SAC:", r"no such file or folder \(of SAC:\)"),
    ],
)
def test_unknown_names_are_told_with_the_nearest(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_player(text, Context("hockey", HOCKEY, nothing))
    assert "\n" not in str(caught.value)


def test_names_with_paths(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    named = read_name(f"tdmpc2:{tmp_path}/run/")
    assert (named.kind, named.path, named.label) == ("TDMPC2", f"{tmp_path}/run/", f"{tmp_path}/run")
    assert read_name(str(tmp_path / "run")).kind is None


def loaded(found: Any, text: str, seat: Seat) -> Any:
    return load_player(text, Context("hockey", seat, lambda path: found))


def test_what_is_loaded_has_to_be_what_was_named_and_to_fit(tmp_path: Path) -> None:
    agent = make_agent(make_config("debug", task="hockey", agent="td3"), EnvSpec("hockey", (18,), 4, 251))
    clone = Clone(18, 4, (8,))
    assert isinstance(loaded(agent, f"TD3:{tmp_path}", HOCKEY), AgentPlayer) and isinstance(
        loaded(agent, str(tmp_path), HOCKEY), AgentPlayer
    )
    assert isinstance(loaded(clone, f"DecoyPolicy:{tmp_path}", HOCKEY), ClonePlayer) and isinstance(
        loaded(clone, str(tmp_path), HOCKEY), ClonePlayer
    )
    for found, kind, message in (
        (agent, "SAC", "holds agent=td3, not SAC; leave the type out"),
        (agent, "DECOYPOLICY", "holds agent=td3, not DECOYPOLICY"),
        (clone, "TD3", "holds a decoy, not TD3"),
    ):
        with pytest.raises(ConfigError, match=f"{tmp_path} {message}"):
            loaded(found, f"{kind}:{tmp_path}", HOCKEY)
    for found in (agent, clone):
        for seat, message in (
            (Seat((16,), 4), "was made for 18 observations and 4 actions, its seat in hockey has 16 observations and 4 actions"),
            (Seat((18,), 3), "its seat in hockey has 18 observations and 3 actions"),
            (Seat((18,), 4, True), "was made for 18 observations and 4 actions, its seat in hockey has 18 observations and 4 choices"),
        ):
            with pytest.raises(ConfigError, match=message):
                loaded(found, str(tmp_path), seat)
