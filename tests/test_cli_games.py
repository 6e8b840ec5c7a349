"""Commands for games of two: evaluate against opponents, tournament, clone, and play with the keyboard."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import worldmpc
from worldmpc.cli import main
from worldmpc.config import EnvConfig
from worldmpc.models.cloning import Clone
from worldmpc.training.cloning import save_decoy
from worldmpc.training.two_player import load_saved

pygame = pytest.importorskip("pygame")
SHORT = "hockey/self-play-shooting"


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An agent that has learned next to nothing, against the weak bot."""
    folder = tmp_path_factory.mktemp("agents") / "mine"
    with worldmpc.make_envs(SHORT, EnvConfig(num_envs=2, episode_length=20), opponents="weak") as envs:
        made = worldmpc.make_agent(envs, "debug")
        worldmpc.train(made, envs, 60, progress=False)
    return worldmpc.save(made, folder)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLDMPC_TRACEBACK", raising=False)


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must fail with one line on stderr, and return that line."""

    def run(*words: str, status: int = 2) -> str:
        capsys.readouterr()
        found = main(list(words))
        err = capsys.readouterr().err
        assert found == status and len(err.splitlines()) == 1 and err.startswith("worldmpc: error: "), err
        return err.strip()

    return run


# Evaluation.


def test_evaluate_plays_each_opponent_and_writes_every_game(agent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    decoy = save_decoy(Clone(18, 4, [8]), tmp_path / "decoy", {})
    words = [
        f"opponents=[strong,DECOYPOLICY:{decoy},{agent}]",
        "episodes=4",
        "json=out/e.json",
        "video=out/v.mp4",
        "mode=prior",
        "threads=1",
    ]
    assert main(["evaluate", f"checkpoint={agent}", *words]) == 0
    out = capsys.readouterr().out
    record = json.loads(Path("out/e.json").read_text())
    assert list(record["opponents"]) == ["strong", str(decoy), str(agent)] and record["episodes"] == 12
    for own in record["opponents"].values():
        assert own["won"] + own["drawn"] + own["lost"] == own["games"] == len(own["list"]) == 4
        assert [(game["seat"], game["starter"]) for game in own["list"]] == [(1, 1), (2, 1), (1, 2), (2, 2)]
        assert own["return_mean"] == pytest.approx(sum(game["return"] for game in own["list"]) / 4)
        assert own["by_seat"]["1"]["games"] == own["by_starter"]["2"]["games"] == 2
    assert {"command", "commit", "machine", "seed", "config", "checkpoint"} <= record.keys() and record["schema"] == "worldmpc.games/1"
    assert record["agent"] == "tdmpc2" and record["mode"] == "prior" and record["lengths"] == [20] * 12
    assert "12 games" in out and "in seat 2" in out and "opponent begins" in out and "one episode, return" in out
    assert Path("out/v.mp4").stat().st_size > 0


def test_evaluate_plays_whom_training_played_and_repeats_it(agent: Path, capsys: pytest.CaptureFixture[str]):
    def played(*words: str) -> dict[str, Any]:
        capsys.readouterr()
        assert main(["evaluate", str(agent), "episodes=2", "mode=prior", "threads=1", "json=-", *words]) == 0
        return {name: own["list"] for name, own in json.loads(capsys.readouterr().out)["opponents"].items()}

    first = played()
    assert list(first) == ["weak"] and played() == first and played("opponents=weak") == first
    assert played("seed=2")["weak"] != first["weak"]


def test_evaluate_plays_a_task_of_one_player_as_ever(agent: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["evaluate", str(agent), "task=hockey/vs-weak-shooting", "episodes=2", "mode=prior", "json=-"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert "opponents" not in record and len(record["returns"]) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["opponents=[weak,stron]"], "opponents: 'stron' is no known opponent, and there is no such file or folder; did you mean strong?"),
        (["opponents=SCA:runs/x"], "opponents: unknown type 'SCA' in 'SCA:runs/x'"),
        (["opponents=SAC:nowhere"], "opponents: nowhere: no such file or folder (of SAC:nowhere)"),
        (["opponents=SAC:AGENT"], "holds agent=tdmpc2, not SAC; leave the type out"),
        (["opponents=[weak,weak]"], "opponents: weak is named twice"),
        (["opponents=[weak"], "opponents: expected a list as in opponents=[a,b], got '[weak'"),
        (["opponents=[weak,]"], "opponents: expected names, as in opponents=[a,b], got '[weak,]'"),
        (["opponents=self_play"], "opponents: self_play stands for snapshots in training"),
        (["opponents=."], ".: neither a run folder"),
        (["opponents=DECOY"], "small was made for 7 observations and 4 actions, its seat in hockey/self-play-shooting has 18"),
        (["opponents=weak", "task=hockey/vs-weak"], "opponents: hockey/vs-weak has one player; leave them out"),
        (["opponents=weak", "task=hockey/self-play-nokeep"], "was trained on 18 observations and 4 actions"),
    ],
)
def test_evaluate_mistakes(words: list[str], message: str, agent: Path, tmp_path: Path, fails: Callable[..., str]):
    decoy = save_decoy(Clone(7, 4, [8]), tmp_path / "small", {})
    words = [word.replace("AGENT", str(agent)).replace("DECOY", str(decoy)) for word in words]
    assert message in fails("evaluate", f"checkpoint={agent}", "episodes=1", *words)


# Tournaments.


def test_a_tournament_is_played_written_and_gone_on_with(agent: Path, capsys: pytest.CaptureFixture[str]):
    words = ["tournament", f"task={SHORT}", "games=2", "mode=prior", "out=cup"]
    assert main([*words, f"players=[weak,mine=TDMPC2:{agent}]"]) == 0
    out = capsys.readouterr().out
    assert "1 of 1: mine against weak: 2 of 2 games" in out and "rating" in out and "wrote tournament.json" in out
    record, lines = json.loads(Path("cup/tournament.json").read_text()), Path("cup/history.jsonl").read_text().splitlines()
    assert {player["name"] for player in record["players"]} == {"weak", "mine"} and len(lines) == 2
    assert {"command", "commit", "machine", "seed", "pairs"} <= record.keys() and record["mode"] == "prior"
    assert Path("cup/tournament.png").stat().st_size > 0
    assert main([*words, f"players=[mine=TDMPC2:{agent},still,weak]"]) == 0
    out = capsys.readouterr().out
    assert out.count("played before") == 1 and out.count("2 of 2 games") == 2
    assert Path("cup/history.jsonl").read_text().splitlines()[:2] == lines
    ratings = [player["rating"] for player in json.loads(Path("cup/tournament.json").read_text())["players"]]
    assert len(ratings) == 3 and ratings == sorted(ratings, reverse=True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "players: expected at least two, as in players=[weak,strong,runs/a]"),
        (["players=[weak]"], "players: expected at least two different ones"),
        (["players=[weak,weak]"], "players: weak is there twice"),
        (["players=[weak,stron]"], "did you mean strong?"),
        (["players=[weak,runs/nowhere]"], "'runs/nowhere' is no known opponent, and there is no such file or folder"),
        (["players=[weak,CUT]"], "agent.safetensors: checkpoint is damaged"),
        (["players=[weak,strong]", "games=0"], "games: expected at least 1, got 0"),
        (["players=[weak,strong]", "task=toy/pointmass"], "task: toy/pointmass has one player"),
        (["players=[weak,strong]", "task=hocky"], "task: unknown task"),
        (["players=[weak,strong]", "task=hockey/self-play-discrete"], "weak is a bot of hockey with Box actions"),
        (["players=[weak,strong]", "planner.horizon=3"], "planner.horizon=3: tournament takes task=, players="),
        (["players=[weak,strong]", "mode=fast"], "mode: expected one of eval, prior"),
        (["players=[weak,strong]", "out=file"], "out: cannot write file/tournament.json"),
    ],
)
def test_tournament_mistakes(words: list[str], message: str, agent: Path, fails: Callable[..., str]):
    Path("file").touch()
    cut = Path(shutil.copytree(agent, "cut"))
    file = cut / "agent.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    words = [word.replace("CUT", str(cut)) for word in words]
    assert message in fails("tournament", *words)
    assert not list(Path().rglob("history.jsonl"))  # nothing has been played


# Decoys.


def test_a_decoy_is_cloned_and_played_against(agent: Path, capsys: pytest.CaptureFixture[str]):
    words = ["opponent=strong", "against=[weak,still]", "games=8", "out=decoys/strong", "hidden=[32]", "epochs=12", "lr=5e-3"]
    assert main(["clone", f"task={SHORT}", *words]) == 0
    out = capsys.readouterr().out
    assert "strong plays 8 games against each of weak, still" in out and "DECOYPOLICY:decoys/strong" in out
    clone = load_saved(Path("decoys/strong"))
    assert isinstance(clone, Clone) and clone.hidden == (32,)
    meta = json.loads(Path("decoys/strong/meta.json").read_text())["meta"]["training"]
    assert meta["result"]["log_likelihood"] > meta["result"]["marginal"]  # it has looked
    assert meta["opponent"] == meta["id"] == "strong" and meta["against"] == ["weak", "still"] and {"command", "commit"} <= meta.keys()
    assert f"clone {meta['result']['log_likelihood']:.3f}" in out and f"alone {meta['result']['marginal']:.3f}" in out
    assert main(["evaluate", str(agent), "opponents=[DECOYPOLICY:decoys/strong]", "episodes=2", "mode=prior"]) == 0
    assert "decoys/strong" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "opponent: expected opponent=..., as in opponent=strong"),
        (["opponent=strong"], "out: expected out=..., as in out=decoys/strong"),
        (["opponent=stron", "out=x"], "did you mean strong?"),
        (["opponent=strong", "out=x", "against=[weak,nobody]"], "'nobody' is no known opponent"),
        (["opponent=strong", "out=x", "games=0"], "games: expected at least 1, got 0"),
        (["opponent=strong", "out=x", "holdout=1"], "holdout: expected a share between 0 and 1, got 1"),
        (["opponent=strong", "out=x", "lr=0"], "lr: expected a number between 0 and 1, got 0"),
        (["opponent=strong", "out=x", "hidden=[16,many]"], "hidden: expected whole numbers above 0, as in hidden=[128,128]"),
        (["opponent=strong", "out=AGENT"], "exists and is no decoy; choose another folder"),
        (["opponent=strong", "out=x", "task=toy/pointmass"], "task: toy/pointmass has one player"),
        (["opponent=strong", "out=x", "game=5"], "game=5: clone takes task=, opponent="),
    ],
)
def test_clone_mistakes(words: list[str], message: str, agent: Path, tmp_path: Path, fails: Callable[..., str]):
    assert message in fails("clone", *(word.replace("AGENT", str(agent)) for word in words))
    assert not list(tmp_path.iterdir())


# The keyboard.


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[int, list[tuple[int, int]]]]:
    """Frame -> events (type, key) that come then, in a window that nobody sees; the states that were drawn are under ``keys[-1]``."""
    import worldmpc.cli.play as module
    from worldmpc.envs.hockey import render

    plan: dict[int, list[Any]] = {-1: []}

    class Watched(render.Screen):
        def draw(self, state: Any) -> Any:
            for kind, key in plan.get(len(plan[-1]), []):
                pygame.event.post(pygame.event.Event(kind, {"key": key} if kind != pygame.QUIT else {}))
            plan[-1].append(state)
            return super().draw(state)

    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    monkeypatch.setattr(module, "Screen", Watched)
    monkeypatch.setattr(render, "FPS", 100_000)
    yield plan


@pytest.mark.parametrize(("seat", "start"), [(1, -3.0), (2, 3.0)])
def test_keys_work_together_and_point_as_on_the_screen(seat: int, start: float, keys: dict[int, list[Any]]):
    down = [(pygame.KEYDOWN, key) for key in (pygame.K_LEFT, pygame.K_UP, pygame.K_s)]
    keys |= {0: down, 8: [(pygame.KEYUP, pygame.K_LEFT), (pygame.KEYUP, pygame.K_s), (pygame.KEYDOWN, pygame.K_RIGHT)]}
    keys[25] = [(pygame.KEYDOWN, pygame.K_ESCAPE)]
    assert main(["play", "opponent=still", f"seat={seat}"]) == 0
    rackets = [state[seat - 1] for state in keys[-1]]
    others = [state[2 - seat] for state in keys[-1]]
    assert len(rackets) == 26  # Esc ended it
    x, y, angle = zip(*(racket[:3] for racket in rackets), strict=True)
    assert x[0] == pytest.approx(start) and x[8] < x[0] - 0.1 and x[-1] > x[8]  # left, then right
    assert y[0] == pytest.approx(0.0, abs=1e-6) and y[-1] > y[8] > y[0] + 0.1  # up all the time
    assert angle[8] > 0.1
    assert all(other[:2] == pytest.approx(others[0][:2]) for other in others)


def test_keys_that_contradict_each_other_and_those_of_a_racket_that_cannot_catch():
    from worldmpc.cli.play import Keyboard

    pygame.display.init()
    keyboard = Keyboard()
    for key in (pygame.K_LEFT, pygame.K_RIGHT, pygame.K_DOWN, pygame.K_w, pygame.K_SPACE):
        pygame.event.post(pygame.event.Event(pygame.KEYDOWN, {"key": key}))
    keyboard.read()
    assert keyboard.action(1, 4) == [0.0, -1.0, -1.0, 1.0] and keyboard.action(2, 4) == [0.0, 1.0, -1.0, 1.0]
    assert keyboard.action(1, 3) == [0.0, -1.0, -1.0] and not keyboard.ended
    pygame.event.post(pygame.event.Event(pygame.KEYUP, {"key": pygame.K_LEFT}))
    pygame.event.post(pygame.event.Event(pygame.QUIT))
    keyboard.read()
    assert keyboard.action(1, 4)[0] == 1.0 and keyboard.ended
    pygame.display.quit()


def test_games_against_an_agent_and_their_score(agent: Path, keys: dict[int, list[Any]], capsys: pytest.CaptureFixture[str]):
    assert main(["play", f"task={SHORT}", f"checkpoint={agent}", "games=2", "mode=prior"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[1:3]] == ["game 1", "game 2"] and all(", " in line for line in lines[1:3])
    score = [sum(word in line for line in lines[1:3]) for word in ("you won", "you lost", "a draw")]
    assert lines[-1] == f"you {score[0]}, {agent} {score[1]}, drawn {score[2]}" and sum(score) == 2
    assert 2 * 2 < len(keys[-1]) <= 2 * 82 and not pygame.display.get_init()


def test_closing_the_window_ends_all_games(keys: dict[int, list[Any]], capsys: pytest.CaptureFixture[str]):
    keys[5] = [(pygame.QUIT, 0)]
    assert main(["play", "opponent=strong", "games=3"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == ["game 1: not finished", "you 0, strong 0, drawn 0"]


def test_without_a_display_nobody_plays(monkeypatch: pytest.MonkeyPatch, fails: Callable[..., str]):
    for name in ("SDL_VIDEODRIVER", "DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    assert "play: there is no display; play on a machine with a display" in fails("play", "opponent=strong")
    monkeypatch.setenv("SDL_VIDEODRIVER", "none such")
    assert "play: no window can be opened (none such not available)" in fails("play", "opponent=strong")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "opponent: expected either checkpoint=PATH or opponent=NAME"),
        (["opponent=weak", "checkpoint=x"], "opponent: expected either checkpoint=PATH or opponent=NAME"),
        (["opponent=weka"], "did you mean weak?"),
        (["checkpoint=nowhere"], "'nowhere' is no known opponent, and there is no such file or folder"),
        (["opponent=weak", "seat=3"], "seat: expected 1 or 2, got 3"),
        (["opponent=weak", "games=0"], "games: expected at least 1, got 0"),
        (["opponent=weak", "task=toy/pointmass"], "task: people play hockey alone, got toy/pointmass"),
        (["opponent=weak", "task=hockey/vs-weak"], "task: hockey/vs-weak has one player or no Box actions"),
        (["opponent=weak", "task=hockey/self-play-discrete"], "task: hockey/self-play-discrete has one player or no Box actions"),
        (["opponent=weak", "speed=2"], "speed=2: play takes task=, checkpoint="),
    ],
)
def test_play_mistakes(words: list[str], message: str, fails: Callable[..., str]):
    assert message in fails("play", *words)
